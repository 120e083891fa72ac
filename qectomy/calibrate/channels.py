"""Queries made of single channels of x̂: how large those are, how they match W_Q, and whose biases go with them.

Weights are (D, out), as in x̂ W. Dimensions: D d_model, H n_heads, G n_kv_heads, K d_head.
"""

import torch

from qectomy.calibrate.problem import LayerProblem


def channel_rms(C: torch.Tensor) -> torch.Tensor:
    """Return the rms (D,) of each channel of x̂; one that is always 0 counts as tiny, not as 0."""
    power = C.diagonal()
    return power.clamp_min(1e-12 * power.mean()).sqrt()


def correlations(C: torch.Tensor, W_Q: torch.Tensor) -> torch.Tensor:
    """Return (D, H*K): covariance of each channel, taken to unit rms, with each query channel."""
    return (C @ W_Q) / channel_rms(C)[:, None]


def own_channels(W_Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the channel of x̂ (H*K,) that has each query channel's number, modulo D, and those numbers."""
    columns = torch.arange(W_Q.shape[1], device=W_Q.device)
    return columns % len(W_Q), columns


def slices(d_model: int, n_heads: int, device: torch.device) -> torch.Tensor:
    """Return the channels (H, K) that `identity` gives to each head."""
    return torch.arange(d_model, device=device).view(n_heads, -1)


def biases_in_basis(problem: LayerProblem, W_K: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the mean query (H*K,) and the key's bias (G*K,) in the coordinates in which the keys became x̂ W_K.

    With W_K' = W_K T head by head keys become k T and queries q T⁻ᵀ.
    """
    query, key, rope = problem.mean_query, problem.teacher.b_K, problem.rope
    if query is None or key is None:
        return None, None
    heads = (rope.n_kv_heads, rope.d_head)
    before, after = (W.view(-1, *heads).transpose(0, 1) for W in (problem.carried[1], W_K))  # (G, D, K)
    T = torch.linalg.pinv(before) @ after
    queries = query.view(rope.n_kv_heads, rope.per_group, rope.d_head) @ torch.linalg.pinv(T).mT
    return queries.flatten(), (key.view(rope.n_kv_heads, 1, rope.d_head) @ T).flatten()
