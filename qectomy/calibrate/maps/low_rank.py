"""`low-rank:R`: a diagonal by least squares, the rest by singular values, and the bias that goes with both.

The factors are the best of their rank under x̂'s second moment C (Eckart & Young 1936), as in activation-aware SVD.
Without RoPE, a head's queries are first brought as near to its slice of x̂ as a rotation in the keys' whitened
coordinates can (orthogonal Procrustes, Schönemann 1966).
Weights are (D, out), as in x̂ W. Dimensions: D d_model, H n_heads, K d_head, R rank.
"""

import torch

from qectomy.calibrate.channels import channel_rms, correlations, own_channels, slices
from qectomy.calibrate.free_keys import per_head, roots
from qectomy.calibrate.moments import Moments
from qectomy.calibrate.preconditioning import Preconditioned, output_rms, precondition_gain, precondition_keys, scaled
from qectomy.calibrate.problem import LayerProblem, QueryKeyParams
from qectomy.calibrate.refine import RefineSettings
from qectomy.models.query_maps import QueryMapSpec


def init(problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator) -> QueryKeyParams:
    W_Q, W_K = problem.carried
    query = factors(problem.spread, W_Q, spec.rank)
    if problem.mean_query is not None:
        query["bias"] = bias(problem.mean_query, problem.moments.student_mean, query)
    return QueryKeyParams(W_K, query, problem.teacher.b_K)


def init_without_rope(problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator) -> QueryKeyParams:
    assert problem.key_moments is not None
    assert problem.mean_query is not None
    L = roots(problem.key_moments)
    W_Q, W_K, changes = near_slices(problem.spread.student, *problem.carried, L)
    wanted = torch.einsum("hi,hij->hj", per_head(problem.mean_query, len(L)), changes).flatten()
    query = factors(problem.spread, W_Q, spec.rank)
    query["bias"] = bias(wanted, problem.moments.student_mean, query)
    return QueryKeyParams(W_K, query)


def preconditioned(
    params: QueryKeyParams, problem: LayerProblem, settings: RefineSettings
) -> dict[str, Preconditioned]:
    query, lr = params.query, settings.lr_query
    free = precondition_keys(params, problem, settings.lr_key)
    free["query.gain"] = precondition_gain(query["gain"], settings.lr_gain)
    for name in ("down", "up"):
        free[f"query.{name}"] = scaled(query[name], query[name].square().mean().sqrt(), lr)
    if "bias" in query:
        W = (query["up"] @ query["down"]).T  # the queries' coordinates need not be those of W_Q
        W[own_channels(W)] += query["gain"]
        free["query.bias"] = scaled(query["bias"], output_rms(problem.moments.student, W.double()), lr)
    return free


def factors(moments: Moments, W_Q: torch.Tensor, rank: int | None) -> dict[str, torch.Tensor]:
    """Return gain (H*K,), down (R, D), up (H*K, R): diagonal by least squares, the rest by SVD of C^½ (W_Q - diag)."""
    assert rank is not None
    C, own = moments.student, own_channels(W_Q)
    gain = correlations(C, W_Q)[own] / channel_rms(C)[own[0]]
    rest = W_Q.clone()
    rest[own] -= gain
    values, vectors = moments.eigen_in_float64()
    root = values.clamp_min(1e-4 * values.mean()).sqrt()
    U, S, V = torch.linalg.svd(root[:, None] * (vectors.T @ rest), full_matrices=False)
    scale = S[:rank].sqrt()
    down = (vectors / root) @ U[:, :rank] * scale
    return {"gain": gain, "down": down.T.contiguous(), "up": (V[:rank] * scale[:, None]).T.contiguous()}


def bias(wanted: torch.Tensor, mean: torch.Tensor, query: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the bias (H*K,) with which queries of x̂'s mean (D,) are `wanted` (H*K,)."""
    channels = torch.arange(len(wanted), device=mean.device) % len(mean)
    return wanted - mean[channels] * query["gain"] - query["up"] @ (query["down"] @ mean)


def near_slices(
    C: torch.Tensor, W_Q: torch.Tensor, W_K: torch.Tensor, roots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (W_Q', W_K', N (H, K, K)) with the same logits, W_Q' = W_Q N as near to the heads' slices as may be."""
    queries, keys, changes = [], [], []
    heads = (per_head(W, len(roots)) for W in (W_Q, W_K))
    for own, Q, K, L in zip(slices(len(C), len(roots), C.device), *heads, roots, strict=True):
        seen = Q @ L
        U, _, Vh = torch.linalg.svd((C[own] @ seen) / channel_rms(C)[own, None])
        N = L @ (Vh.mT @ U.mT)
        queries.append(Q @ N)
        keys.append(K @ torch.linalg.inv(N).mT)
        changes.append(N)
    return torch.cat(queries, 1), torch.cat(keys, 1), torch.stack(changes)
