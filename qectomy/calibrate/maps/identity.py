"""`identity`: the query is x̂ itself, slice by slice (Karbevski & Mijoski, arXiv 2510.23912).

With RoPE each channel has a gain, which goes into the norm's, and pairs of channels are rotated together in W_Q and
W_K to where they match best. Without, W_K takes in any change of a slice, and the norm's shift holds a query bias.
Weights are (D, out). Dimensions: D d_model, H n_heads, G n_kv_heads, K d_head, F = K/2 pairs.
"""

import math

import torch

from qectomy.calibrate.channels import biases_in_basis, channel_rms, correlations, own_channels, slices
from qectomy.calibrate.free_keys import regress_on_channels, roots
from qectomy.calibrate.preconditioning import Preconditioned, output_rms, precondition_keys, scaled
from qectomy.calibrate.problem import LayerProblem, QueryKeyParams
from qectomy.calibrate.refine import RefineSettings
from qectomy.calibrate.rope import Rope, pair_power, rotate_pairs
from qectomy.models.query_maps import QueryMapSpec


def init(problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator) -> QueryKeyParams:
    gain, W_K = gain_and_keys(problem)
    wanted, b_K = biases_in_basis(problem, W_K)
    query = {}
    if wanted is not None:
        channels, _ = own_channels(problem.teacher.W_Q)
        query["bias"] = wanted - (problem.moments.student_mean * gain)[channels]
    return QueryKeyParams(W_K, query, b_K, norm_gain=gain)


def init_without_rope(problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator) -> QueryKeyParams:
    assert problem.key_moments is not None
    L = roots(problem.key_moments)
    W_K, shift = regress_on_channels(problem, slices(problem.dims.d_model, len(L), L.device), L)
    return QueryKeyParams(W_K, {}, norm_shift=shift.flatten())


def preconditioned(
    params: QueryKeyParams, problem: LayerProblem, settings: RefineSettings
) -> dict[str, Preconditioned]:
    free = precondition_keys(params, problem, settings.lr_key_fixed_channels)
    if params.norm_gain is not None:
        gain, limit = params.norm_gain.float(), math.log(settings.max_gain_change)
        free["norm_gain"] = Preconditioned(
            gain, lambda u: gain * (torch.exp(u.clamp(-limit, limit)) - 1), settings.lr_gain
        )
    if params.norm_shift is not None:
        size = problem.moments.student.diagonal().sqrt()
        free["norm_shift"] = scaled(params.norm_shift, size, settings.lr_query)
    if "bias" in params.query:
        size = output_rms(problem.moments.student, problem.teacher.W_Q)
        free["query.bias"] = scaled(params.query["bias"], size, settings.lr_query)
    return free


def gain_and_keys(problem: LayerProblem) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (gain (D,), W_K'): RoPE pairs rotated for the slice's channels, each gain by least squares.

    A gain is divided out of W_K and W_V later, so none comes nearer to 0 than a tenth of their typical size.
    """
    C, rope, (W_Q, W_K) = problem.spread.student, problem.rope, problem.carried
    channels, columns = own_channels(W_Q)
    angle = _best_angles(correlations(C, W_Q), channels, pair_power(problem.covariance(), W_K, rope), rope)
    W_Q = rotate_pairs(W_Q, angle.repeat_interleave(rope.per_group, 0))
    matched = correlations(C, W_Q)[channels, columns] / channel_rms(C)[channels]
    gain = torch.ones(len(C), dtype=C.dtype, device=C.device) * matched.abs().mean()
    gain[channels] = matched
    floor = 0.1 * output_rms(C, W_Q).square().mean().sqrt() / channel_rms(C)
    sign = torch.where(gain < 0, -1.0, 1.0)
    return sign * torch.maximum(gain.abs(), floor), rotate_pairs(W_K, angle)


def _best_angles(
    scores: torch.Tensor, channels: torch.Tensor, weights: torch.Tensor, rope: Rope, steps: int = 16
) -> torch.Tensor:
    """Return the angle (G, F) of each pair at which the slice's own two channels match the rotated queries best."""
    pairs = (len(channels) // rope.d_head, 2, rope.d_head // 2)
    columns = torch.arange(len(channels), device=channels.device).view(pairs)
    own = channels.view(pairs)
    (a, b), (c, d) = (
        [scores[own[:, i], columns[:, j]] for j in (0, 1)] for i in (0, 1)
    )  # channel i of the pair with query j of the pair, (H, F) each
    angles = torch.arange(steps, dtype=scores.dtype, device=scores.device) * torch.pi / steps
    cos, sin = angles.cos()[:, None, None], angles.sin()[:, None, None]
    match = (cos * a - sin * b).square() + (sin * c + cos * d).square()  # (steps, H, F)
    match = match.view(steps, rope.n_kv_heads, rope.per_group, -1).sum(2) * weights
    return angles[match.argmax(0)]
