"""How far a layer's W_Q is from going exactly: its condition, its distance from a turn of the stream, its rank.

Everything is computed in float64. W_Q is (D, H*K), as in x̂ W_Q; gamma (D,) is the gain of the norm before it.
Dimensions: D d_model, H n_heads, G n_kv_heads, K d_head.
"""

import torch

from qectomy.models.family import Dimensions
from qectomy.models.heads import join_heads, split_heads

SPECTRUM = 33  # singular values that a report shows
ENERGY = 0.99  # the share of the queries' energy that `leading_rank` asks for


def condition_number(W_Q: torch.Tensor) -> float:
    """Return the largest over the smallest of W_Q's min(D, H*K) singular values; inf if it is singular."""
    sigma = torch.linalg.svdvals(W_Q.double())
    return float("inf") if _singular(sigma, max(W_Q.shape)) else float(sigma[0] / sigma[-1])


def spectrum(W_Q: torch.Tensor, most: int = SPECTRUM) -> list[float]:
    """Return W_Q's singular values, falling: all of them, or `most` at equal steps from the first to the last."""
    sigma = torch.linalg.svdvals(W_Q.float())  # to be looked at: float32 is enough, and half the time
    chosen = torch.linspace(0, len(sigma) - 1, min(most, len(sigma))).round().long()
    return [float(value) for value in sigma[chosen]]


def leading_rank(W_Q: torch.Tensor, C: torch.Tensor, energy: float = ENERGY) -> int:
    """Return the least r whose r leading singular values of C^½ W_Q hold `energy` of their sum of squares.

    C (D, D) is E[x̂ᵀx̂]; the squares are the eigenvalues of W_Qᵀ C W_Q. 0 if W_Q is.
    """
    W = W_Q.double()
    held = torch.linalg.eigvalsh(W.T @ C.double() @ W).clamp_min(0).flip(0).cumsum(0)
    return int((held < energy * held[-1]).sum()) + int(held[-1] > 0)


def distance_from_orthogonal(
    W_Q: torch.Tensor, gamma: torch.Tensor | None, dims: Dimensions, *, centred: bool
) -> tuple[float | None, str | None]:
    """Return (d, None), with d = |U - polar(U)| / |polar(U)| = sqrt(mean (sigma_i - 1)²), or (None, why there is none).

    U (D, H*K) is diag(gamma) W_Q in the best head gauge, sigma_i its singular values; 0: W_Q is a turn of the stream
    up to that gauge, which a norm lets through. `centred`: the norm subtracts the channels' mean (LayerNorm), so
    diag(gamma) W_Q counts only as (I - 11ᵀ/D) diag(gamma) W_Q, and at most D - 1 of its singular values can be 1: the
    mean is over those.
    """
    d_model, n_query = W_Q.shape
    if n_query > d_model:
        return None, f"n_heads * d_head is {n_query}, more than d_model {d_model}: its columns cannot be orthogonal"
    M = effective_query(W_Q, gamma, centred)
    rank = min(dims.d_head, d_model - centred)  # of a head's block, at most
    sigma = torch.linalg.svdvals(split_heads(M, dims.d_head))[:, :rank]
    for head, values in enumerate(sigma):
        if _singular(values, d_model):
            return None, f"the block of head {head} is singular: no gauge makes its columns orthogonal"
    U = pair_gauge(M, dims) if dims.rope else head_gauge(M, dims, rank)
    if centred and n_query == d_model and not dims.rope:
        U = share_mean_direction(U, dims.n_heads)
    sigma = torch.linalg.svdvals(U)[: d_model - centred]
    return float((sigma - 1).square().mean().sqrt()), None


def effective_query(W_Q: torch.Tensor, gamma: torch.Tensor | None, centred: bool) -> torch.Tensor:
    """Return diag(gamma) W_Q (D, H*K); with `centred`, the mean over the input channels taken from each column."""
    M = W_Q.double() if gamma is None else gamma.double()[:, None] * W_Q.double()
    return M - M.mean(0) if centred else M


def head_gauge(M: torch.Tensor, dims: Dimensions, rank: int) -> torch.Tensor:
    """Return M with each head's block W_h (D, K) times (W_hᵀ W_h)^-½, its `rank` leading directions alone.

    Without RoPE any invertible A_h goes: (W_Q^h A_h, W_K^h A_h⁻ᵀ) gives the same logits.
    """
    assert dims.n_kv_heads == dims.n_heads, "heads that share a key share its gauge"
    left, _, right = torch.linalg.svd(split_heads(M, dims.d_head), full_matrices=False)
    return join_heads(left[..., :rank] @ right[:, :rank])


def share_mean_direction(U: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Return U (D, D), orthonormal within each head, in the gauge of (I - 11ᵀ/D) Θ for a Θ that LayerNorm allows.

    Such a Θ is orthogonal and keeps the mean direction, so the Gram matrix is I - r rᵀ: r (D,) is the unit direction of
    the queries that reads nothing, and each head holds 1/H of |r|². Along its share of r a head's block is therefore
    shorter by sqrt(1 - 1/H) than one with orthonormal columns.
    """
    nothing = torch.linalg.svd(U).Vh[-1].view(n_heads, -1)
    share = torch.nn.functional.normalize(nothing, dim=1)
    along = torch.einsum("dhk,hk->dh", U.unflatten(1, (n_heads, -1)), share)
    return U - ((1 - (1 - 1 / n_heads) ** 0.5) * along[:, :, None] * share).flatten(1)


def pair_gauge(M: torch.Tensor, dims: Dimensions) -> torch.Tensor:
    """Return M with each pair of channels (i, i + K/2) of a KV group scaled to mean squared column norm 1.

    With RoPE a gauge must commute with its turns and be one for the query heads that share a key: what is left is a
    positive scale for each pair, and a turn of it, which moves no singular value.
    """
    pairs = M.view(len(M), dims.n_kv_heads, dims.n_heads // dims.n_kv_heads, 2, -1)  # (D, G, H/G, 2, K/2)
    power = pairs.square().sum(0).mean((1, 2), keepdim=True)
    return (pairs * power.rsqrt()).reshape(M.shape)


def _singular(sigma: torch.Tensor, size: int) -> bool:
    """Whether the last of descending singular values is 0 but for rounding, for a matrix of at most `size` rows."""
    return bool(sigma[-1] <= sigma[0] * size * torch.finfo(sigma.dtype).eps)
