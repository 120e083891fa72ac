"""Starts for models without RoPE, whose keys can take in any invertible change of a head's queries.

A head's logits are (x̂ W_Q + b) W_Kᵀ x̂_kᵀ. With queries made of chosen channels, x̂_S + b', and a new key K' = W_K Mᵀ,
they are (x̂_S + b') M W_Kᵀ x̂_kᵀ: M and b' M are an ordinary affine regression from the channels to the teacher's query,
so no gain is stored, and no channel need match a query channel alone. Errors are weighed by L, where
L Lᵀ = W_Kᵀ C_k W_K and C_k is the covariance of x̂ under the teacher's attention.
Weights are (D, out). Dimensions: D d_model, H n_heads, K d_head.
"""

import torch

from qectomy.calibrate.key_shared import joint_start
from qectomy.calibrate.low_rank import low_rank, low_rank_bias
from qectomy.calibrate.moments import Moments, ridge
from qectomy.calibrate.projections import Projections, Start
from qectomy.calibrate.rope import Rope
from qectomy.calibrate.select import JointChoice, channel_rms
from qectomy.models.query_maps import QueryMapSpec

RIDGE = 1e-4
DAMPING = 1e-2  # of the bias: a channel that the keys hardly see is not moved far


def free_key_start(
    spec: QueryMapSpec,
    moments: Moments,
    key_moments: torch.Tensor,
    carried: Projections,
    teacher_W_Q: torch.Tensor,
    rope: Rope,
    generator: torch.Generator,
) -> Start:
    """Return the start of one layer of a model without RoPE; `carried` are W_Q and W_K on the student's x̂."""
    C, (W_Q, W_K, b_Q) = moments.centred().student, (carried.W_Q, carried.W_K, carried.b_Q)
    assert b_Q is not None
    wanted = moments.teacher_mean @ teacher_W_Q + b_Q
    if spec.name == "key-shared":
        W, mix = (part.double() for part in joint_start(C, key_moments, W_Q, W_K, rope, generator))
        heads = (per_head(part, rope.n_kv_heads) for part in (W, W_K, wanted))
        parts = zip(*heads, key_moments, strict=True)  # one head's moments in float64 at a time
        bias = torch.stack([mean @ key_change(own, K, C_k.double()).T for own, K, mean, C_k in parts])
        keys = (moments.student_mean @ W).view(rope.n_kv_heads, 1, -1)
        return Start(W, {"mix": mix, "bias": (bias - (keys @ mix)[:, 0]).flatten()})
    L = roots(key_moments)
    if spec.name == "low-rank":
        assert spec.rank is not None
        W_Q, W_K, changes = turned_for_slices(C, W_Q, W_K, L)
        wanted = torch.einsum("hi,hij->hj", per_head(wanted, len(L)), changes).flatten()
        query = low_rank(C, W_Q, spec.rank)
        query["bias"] = low_rank_bias(wanted, moments.student_mean, query)
        return Start(W_K, query)
    if spec.name == "select":
        index = choose_free(C, W_Q, L)
        W_K, bias = affine_start(moments, index, W_Q, wanted, W_K, L)
        return Start(W_K, {"index": index.flatten().to(torch.int32), "bias": bias.flatten()})
    W_K, bias = affine_start(moments, slices(len(C), len(L), C.device), W_Q, wanted, W_K, L)
    return Start(W_K, {}, norm_shift=bias.flatten())


def roots(grams: torch.Tensor) -> torch.Tensor:
    """Return L (H, K, K) with L Lᵀ = W_Kᵀ C_k W_K, each head's `grams`; a head of zeros has a tiny one."""
    values, vectors = torch.linalg.eigh(grams.double())
    least = (1e-6 * values.amax(-1, keepdim=True)).clamp_min(1e-30)
    return vectors * values.clamp_min(least).sqrt()[:, None]


def per_head(W: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Return (H, D, K) of W (D, H*K), or (H, K) of a bias (H*K,)."""
    return W.unflatten(-1, (n_heads, -1)).movedim(-2, 0)


def slices(d_model: int, n_heads: int, device: torch.device) -> torch.Tensor:
    """Return the channels (H, K) that `identity` gives to each head."""
    return torch.arange(d_model, device=device).view(n_heads, -1)


def choose_free(C: torch.Tensor, W_Q: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """Return the channels (H, K) that together explain each head's logits best; C is centred."""
    queries = per_head(W_Q, len(roots))
    return torch.stack([JointChoice(C, [C @ (Q @ L)]).run()[0][0] for Q, L in zip(queries, roots, strict=True)])


def affine_start(
    moments: Moments,
    channels: torch.Tensor,
    W_Q: torch.Tensor,
    wanted: torch.Tensor,
    W_K: torch.Tensor,
    roots: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (W_K' (D, D), b' (H, K)) for queries x̂[channels] + b'.

    `wanted` (D,) is the mean of the queries, x̂ W_Q + b.
    """
    C, keys, biases = moments.centred().student, [], []
    heads = (per_head(part, len(roots)) for part in (W_Q, wanted, W_K))
    for own, Q, mean, K, L in zip(channels, *heads, roots, strict=True):
        M = ridge(C[own][:, own], C[own] @ Q, RIDGE)
        keys.append(K @ M.T)
        seen, rms = M @ L, channel_rms(C)[own]  # (mean x̂_S + b') M L = wanted L, where it can be had
        gram = rms[:, None] * (seen @ seen.T) * rms
        lack = mean @ L - moments.student_mean[own] @ seen
        biases.append(rms * ridge(gram, rms * (seen @ lack), DAMPING))
    return torch.cat(keys, 1), torch.stack(biases)


def turned_for_slices(
    C: torch.Tensor, W_Q: torch.Tensor, W_K: torch.Tensor, roots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (W_Q', W_K', N (H, K, K)) with the same logits, W_Q' = W_Q N as near to the heads' slices as may be.

    In the key's whitened coordinates W_Q L, the rotation R is the orthogonal Procrustes solution (Schönemann 1966).
    """
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


def key_change(W: torch.Tensor, K: torch.Tensor, C_k: torch.Tensor) -> torch.Tensor:
    """Return N (K', K) with x̂ W N nearest to x̂ W_K under C_k: a query q of the old keys is q Nᵀ of the new."""
    return ridge(W.T @ C_k @ W, W.T @ C_k @ K, RIDGE)
