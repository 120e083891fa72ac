"""Starts for models without RoPE, whose keys can take in any invertible change of a head's queries.

A head's logits are (x̂ W_Q + b) W_Kᵀ x̂_kᵀ. With queries made of chosen channels, x̂_S + b', and a new key K' = W_K Mᵀ,
they are (x̂_S + b') M W_Kᵀ x̂_kᵀ: M and b' M are an ordinary affine regression from the channels to the teacher's query,
so no gain is stored, and no channel need match a query channel alone. Errors are weighed by L, where
L Lᵀ = W_Kᵀ C_k W_K and C_k is the covariance of x̂ under the teacher's attention.
Weights are (D, out). Dimensions: D d_model, H n_heads, K d_head.
"""

import torch

from qectomy.calibrate.moments import Moments, ridge
from qectomy.calibrate.select_start import JointChoice, channel_rms

RIDGE = 1e-4
DAMPING = 1e-2  # of the bias: a channel that the keys hardly see is not moved far


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
