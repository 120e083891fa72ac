"""Where the fit begins: closed-form starts for each query map, from second moments of x̂.

Weights are (D, out), as in x̂ W. Dimensions: D d_model, H n_heads, G n_kv_heads, K d_head.
"""

import torch

from qectomy.calibrate.init_without_rope import free_key_start
from qectomy.calibrate.key_shared import joint_start
from qectomy.calibrate.low_rank import low_rank, low_rank_bias
from qectomy.calibrate.moments import Moments, ridge
from qectomy.calibrate.projections import Projections, Start
from qectomy.calibrate.rope import Rope, pair_power, rotate_pairs
from qectomy.calibrate.select import channel_rms, choose_channels, correlations
from qectomy.models.family import Dimensions
from qectomy.models.query_maps import QueryMapSpec

SHRINKAGE = 1e-3  # of the mean diagonal: how strongly weights carried over to the student's stream keep to the old


def make_start(
    spec: QueryMapSpec,
    moments: Moments,
    key_moments: torch.Tensor | None,
    teacher: Projections,
    dims: Dimensions,
    rope: Rope,
    generator: torch.Generator,
) -> Start:
    """Return the start of one layer.

    `key_moments` is the covariance under the teacher's attention of x̂, (G, D, D), for `key-shared`; of each head's
    keys, (H, K, K), for the other maps of a model without RoPE; else None.
    """
    plain = moments.centred() if dims.attention_bias else moments
    C, mean = plain.student, plain.student_mean
    W_Q, W_K = carry_over(plain, teacher.W_Q), carry_over(plain, teacher.W_K)
    gain, b_K = None, teacher.b_K
    if not dims.rope:
        assert key_moments is not None
        carried = Projections(W_Q, teacher.b_Q, W_K, None)
        return free_key_start(spec, moments, key_moments, carried, teacher.W_Q, rope, generator)
    if spec.name == "key-shared":
        assert key_moments is not None
        W_K, mix = joint_start(C, key_moments, W_Q, W_K, rope, generator)
        query = {"mix": mix}
    elif spec.name == "select":
        index, gains, W_K = choose_channels(C, mean, W_Q, W_K, rope)
        query = {"index": index.to(torch.int32), "gain": gains}
    elif spec.name == "low-rank":
        assert spec.rank is not None
        query = low_rank(C, W_Q, spec.rank)
    else:
        gain, W_K = identity_gain(C, mean, W_Q, W_K, rope)
        query = {}
    if teacher.b_Q is not None and b_K is not None:
        wanted = moments.teacher_mean @ teacher.W_Q + teacher.b_Q
        if spec.name in ("select", "identity"):  # whose keys are the teacher's in other coordinates
            wanted, b_K = turn_biases(wanted, b_K, carry_over(plain, teacher.W_K), W_K, rope)
        query["bias"] = _query_bias(spec, moments, wanted, Start(W_K, query, b_K, gain), dims)
    return Start(W_K, query, b_K, gain)


def turn_biases(
    query: torch.Tensor, key: torch.Tensor, W_K: torch.Tensor, turned: torch.Tensor, rope: Rope
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a query (H*K,) and a key (G*K,) in the coordinates in which W_K (D, G*K) became `turned`.

    W_K' = W_K T head by head, so that keys become k T and queries q T⁻ᵀ.
    """
    heads = (rope.n_kv_heads, rope.d_head)
    before, after = (W.view(-1, *heads).transpose(0, 1) for W in (W_K, turned))  # (G, D, K)
    T = torch.linalg.pinv(before) @ after
    queries = query.view(rope.n_kv_heads, rope.per_group, rope.d_head) @ torch.linalg.pinv(T).mT
    return queries.flatten(), (key.view(rope.n_kv_heads, 1, rope.d_head) @ T).flatten()


def carry_over(moments: Moments, W: torch.Tensor) -> torch.Tensor:
    """Return W' (D, out) that gives on the student's x̂ what W gives on the teacher's, shrunk towards W."""
    return W + ridge(moments.student, (moments.cross - moments.student) @ W, SHRINKAGE)


def identity_gain(
    C: torch.Tensor, mean: torch.Tensor, W_Q: torch.Tensor, W_K: torch.Tensor, rope: Rope
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (gain (D,), W_K'): RoPE pairs rotated for the slice's channels, each gain by least squares.

    A gain is divided out of W_K and W_V later, so none comes nearer to 0 than a tenth of their typical size.
    """
    columns = torch.arange(W_Q.shape[1], device=C.device)
    channels = columns % len(C)
    angle = _identity_angles(correlations(C, W_Q), channels, pair_power(C, mean, W_K, rope), rope)
    W_Q = rotate_pairs(W_Q, angle.repeat_interleave(rope.per_group, 0))
    matched = correlations(C, W_Q)[channels, columns] / channel_rms(C)[channels]
    gain = torch.ones(len(C), dtype=C.dtype, device=C.device) * matched.abs().mean()
    gain[channels] = matched
    floor = 0.1 * output_size(C, W_Q) / channel_rms(C)
    sign = torch.where(gain < 0, -1.0, 1.0)
    return sign * torch.maximum(gain.abs(), floor), rotate_pairs(W_K, angle)


def output_size(C: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Return the rms over all outputs of x̂ W, a scalar."""
    return (W * (C @ W)).sum(0).clamp_min(1e-30).mean().sqrt()


def _identity_angles(
    scores: torch.Tensor, channels: torch.Tensor, weights: torch.Tensor, rope: Rope, steps: int = 16
) -> torch.Tensor:
    """Return the angle (G, F) of each pair at which the slice's own two channels match the turned queries best."""
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


def _query_bias(
    spec: QueryMapSpec, moments: Moments, wanted: torch.Tensor, start: Start, dims: Dimensions
) -> torch.Tensor:
    """Return the bias (H*K,) that gives the queries the mean that is wanted."""
    mean, query = moments.student_mean, start.query
    channels = torch.arange(len(wanted), device=mean.device) % dims.d_model
    if spec.name == "select":
        return wanted - mean[query["index"].long()] * query["gain"]
    if spec.name == "key-shared":
        keys = mean @ start.W_K.to(mean.dtype) + (0 if start.b_K is None else start.b_K)
        keys = keys.view(dims.n_kv_heads, 1, dims.d_head)
        mix = query["mix"].to(mean.dtype).view(dims.n_kv_heads, -1, dims.d_head, dims.d_head)
        return wanted - torch.einsum("goi,ghij->ghj", keys, mix).flatten()
    if spec.name == "low-rank":
        return low_rank_bias(wanted, mean, query)
    assert start.norm_gain is not None
    return wanted - (mean * start.norm_gain)[channels]
