"""The gauge of attention heads: changes of a head's own coordinates that no output sees, exact on every checkpoint.

    logits   (x̂ W_Q A)(x̂ W_K A⁻ᵀ)ᵀ = (x̂ W_Q)(x̂ W_K)ᵀ      any invertible A where no RoPE and no QK-norm stand between
    output   (p x̂ W_V A)(A⁻¹ W_O)     = p x̂ W_V W_O          any invertible A, RoPE or not; one A for each KV head

With A = W[P]⁻¹ for K pivot channels P, the block of W A at P is the identity and need not be stored: d_head² numbers a
head, for K channel numbers. Each head has pivots of its own: one set for all heads of a layer conditions W[P] up to 40
times worse (docs/LOG.md), and the block is written out in memory anyway before the one product of all heads.
RoPE turns channels i and i + K/2 as a pair, so only what commutes with that passes through it; here a positive scale
for each pair, common to the heads that share a key.
Dimensions: D d_model, K d_head, n heads; blocks are (n, D, K). All algebra in float64.
"""

import torch

from qectomy.models.heads import other_channels

MAX_PIVOT_CONDITION = 1e4  # of a head's block at the pivots, in the head's own orthonormal coordinates
SWAPS = 100
ENOUGH = 1.1  # a swap that grows a determinant by less is not worth it


def orthonormal_gauge(blocks: torch.Tensor) -> torch.Tensor:
    """Return A (n, K, K), symmetric, with which each head's W A has orthonormal columns: A = (Wᵀ W)^(-1/2).

    Raises torch.linalg.LinAlgError if a head's W has not full rank.
    """
    _, S, Vh = torch.linalg.svd(blocks, full_matrices=False)
    if not bool((S[:, -1] > S[:, 0] * 1e-13).all()):
        raise torch.linalg.LinAlgError("a head's W has not full rank")
    return (Vh.mT / S[:, None]) @ Vh


def pair_scales(blocks: torch.Tensor, group: int) -> torch.Tensor:
    """Return A (n, K, K), diagonal, that passes RoPE: the columns of a pair have mean square norm 1 over `group` heads.

    Raises torch.linalg.LinAlgError if a pair's columns are all 0.
    """
    square = blocks.square().sum(1).unflatten(1, (2, -1)).unflatten(0, (-1, group))  # (n / group, group, 2, K / 2)
    mean = square.mean((1, 2))  # (n / group, K / 2)
    if not bool((mean > 0).all()):
        raise torch.linalg.LinAlgError("a pair of query channels is 0")
    scales = mean.rsqrt().repeat(1, 2).repeat_interleave(group, 0)  # (n, K)
    return torch.diag_embed(scales)


def choose_pivots(blocks: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return each head's K pivot channels, (n, K) in ascending order, and the largest condition of a block there.

    They aim at the largest |det W[P]| of each head: greedily by what a row adds, as in QR with column pivoting, then by
    swaps of one channel while that grows. Conditions are those of orthonormal coordinates, which W[P]⁻¹ undoes. The
    condition is inf where a head has not full rank.
    """
    n, _, K = blocks.shape
    try:
        Q = blocks @ orthonormal_gauge(blocks)
    except torch.linalg.LinAlgError:
        return torch.arange(K).repeat(n, 1), float("inf")
    heads = torch.arange(n)
    pivots, taken = torch.empty(n, 0, dtype=torch.long), torch.empty(n, 0, K, dtype=Q.dtype)
    left = Q.square().sum(-1)  # (n, D), what is left of each row beside the pivots' rows
    for _ in range(K):
        best = left.scatter(1, pivots, -1.0).argmax(1)
        pivots = torch.cat([pivots, best[:, None]], 1)
        row = Q[heads, best][:, None]  # (n, 1, K)
        for _ in range(2):  # once more, against rounding
            row = row - row @ taken.mT @ taken
        row = row / row.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        taken = torch.cat([taken, row], 1)
        left = left - (Q @ row.mT)[..., 0].square()
    for _ in range(SWAPS):
        growth = (Q @ torch.linalg.inv(pivot_rows(Q, pivots))).abs()  # (n, D, K); 1 and 0 at the pivots
        size, best = growth.flatten(1).max(1)
        swap = size > ENOUGH
        if not bool(swap.any()):
            break
        pivots[heads[swap], (best % K)[swap]] = (best // K)[swap]
    pivots = pivots.sort().values
    return pivots, pivot_condition(blocks, pivots)


def pivot_condition(blocks: torch.Tensor, pivots: torch.Tensor) -> float:
    """Return the largest condition number of a head's block at its pivots (n, K), in orthonormal coordinates of it."""
    try:
        Q = blocks @ orthonormal_gauge(blocks)
    except torch.linalg.LinAlgError:
        return float("inf")
    return float(torch.linalg.cond(pivot_rows(Q, pivots)).max())


def pivot_rows(blocks: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """Return each head's rows at its own channels (n, C): (n, C, K)."""
    return blocks.gather(1, channels[..., None].expand(-1, -1, blocks.shape[2]))


def fold_pivots(blocks: torch.Tensor, pivots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the rows of W A beside the pivots (n, D - K, K), A⁻¹ (n, K, K)) with A = W[P]⁻¹.

    At the pivots W A is the identity, which need not be stored.
    """
    inverse = pivot_rows(blocks, pivots)
    return torch.linalg.solve(inverse, pivot_rows(blocks, other_channels(pivots, blocks.shape[1])), left=False), inverse
