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


def key_roots(W_K: torch.Tensor, C_k: torch.Tensor) -> torch.Tensor:
    """Return L (H, K, K) with L Lᵀ = W_Kᵀ C_k W_K for each head; C_k is (H, D, D)."""
    heads = W_K.view(len(W_K), len(C_k), -1).transpose(0, 1)  # (H, D, K)
    values, vectors = torch.linalg.eigh(heads.mT @ C_k.to(heads.dtype) @ heads)
    return vectors * values.clamp_min(1e-6 * values.amax(-1, keepdim=True)).sqrt()[:, None]


def slices(d_model: int, n_heads: int, device: torch.device) -> torch.Tensor:
    """Return the channels (H, K) that `identity` gives to each head."""
    return torch.arange(d_model, device=device).view(n_heads, -1)


def choose_free(C: torch.Tensor, W_Q: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """Return the channels (H, K) that together explain each head's logits best; C is centred."""
    queries = W_Q.view(len(C), len(roots), -1)
    return torch.stack([JointChoice(C, [C @ (queries[:, h] @ L)]).run()[0][0] for h, L in enumerate(roots)])


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
    heads = (part.unflatten(-1, (len(roots), -1)).movedim(-2, 0) for part in (W_Q, wanted, W_K))
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
    n_heads = len(roots)
    for own, Q, K, L in zip(
        slices(len(C), n_heads, C.device),
        *(W.view(len(C), n_heads, -1).transpose(0, 1) for W in (W_Q, W_K)),
        roots,
        strict=True,
    ):
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
