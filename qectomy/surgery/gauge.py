"""The gauge of attention heads: changes of a head's own coordinates that no output sees, exact on every checkpoint.

    logits   (x̂ W_Q A)(x̂ W_K A⁻ᵀ)ᵀ = (x̂ W_Q)(x̂ W_K)ᵀ      any invertible A where no RoPE and no QK-norm stand between
    output   (p x̂ W_V A)(A⁻¹ W_O)     = p x̂ W_V W_O          any invertible A, RoPE or not; one A for each KV head

With A = W[P]⁻¹ for K pivot channels P, the block of W A at P is the identity and need not be stored: d_head² numbers a
head. One set of pivots serves all heads of a layer, so that all of them stay one matrix product.
RoPE turns channels i and i + K/2 as a pair, so only what commutes with that passes through it; here a positive scale
for each pair, common to the heads that share a key.
Dimensions: D d_model, K d_head, n heads; blocks are (n, D, K). All algebra in float64.
"""

import torch

MAX_PIVOT_CONDITION = 1e4  # of a head's block at the pivots, in the head's own orthonormal coordinates
SWAPS = 100


def split_heads(W: torch.Tensor, d_head: int) -> torch.Tensor:
    """Return W (D, n*K) as one block a head, (n, D, K)."""
    return W.unflatten(1, (-1, d_head)).transpose(0, 1)


def join_heads(blocks: torch.Tensor) -> torch.Tensor:
    """Return blocks (n, D, K) side by side, (D, n*K)."""
    return blocks.transpose(0, 1).flatten(1)


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
    """Return K pivot channels, common to all heads, and the largest condition number of a head's block there.

    They aim at the largest product over the heads of |det W[P]|: greedily by what a row adds, as in QR with column
    pivoting, then by swaps of one channel while that product grows. Conditions are those of orthonormal coordinates,
    which W[P]⁻¹ undoes. The condition is inf where a head has not full rank, there or at all.
    """
    try:
        Q = blocks @ orthonormal_gauge(blocks)
    except torch.linalg.LinAlgError:
        return torch.arange(blocks.shape[2]), float("inf")
    pivots, taken = torch.empty(0, dtype=torch.long), torch.zeros(len(Q), 0, Q.shape[2], dtype=Q.dtype)
    left = Q.square().sum(-1)  # (n, D), what is left of each row beside the pivots' rows
    for _ in range(Q.shape[2]):
        gain = left.clamp_min(1e-300).log().sum(0)
        gain[pivots] = -torch.inf
        pivots = torch.cat([pivots, gain.argmax()[None]])
        row = Q[:, pivots[-1], None]  # (n, 1, K)
        for _ in range(2):  # once more, against rounding
            row = row - row @ taken.mT @ taken
        row = row / row.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        taken = torch.cat([taken, row], 1)
        left = left - (Q @ row.mT)[..., 0].square()
    for _ in range(SWAPS):
        try:
            inverse = torch.linalg.inv(Q[:, pivots])
        except torch.linalg.LinAlgError:  # as where heads read channels apart, which no common pivots serve
            return pivots.sort().values, float("inf")
        growth = (Q @ inverse).abs().clamp_min(1e-300).log().sum(0)  # (D, K)
        growth[pivots] = -torch.inf
        best = growth.argmax()
        if growth.flatten()[best] < 1e-3:
            break
        pivots[best % growth.shape[1]] = best // growth.shape[1]
    pivots = pivots.sort().values
    return pivots, pivot_condition(blocks, pivots)


def pivot_condition(blocks: torch.Tensor, pivots: torch.Tensor) -> float:
    """Return the largest condition number of a head's block at the pivots, in orthonormal coordinates of the head."""
    try:
        Q = blocks @ orthonormal_gauge(blocks)
    except torch.linalg.LinAlgError:
        return float("inf")
    return float(torch.linalg.cond(Q[:, pivots]).max())


def pivot_order(pivots: torch.Tensor, d_model: int) -> torch.Tensor:
    """Return all channels, the pivots first, as a gauged projection stores them: (D,) int32."""
    rest = torch.ones(d_model, dtype=torch.bool)
    rest[pivots] = False
    return torch.cat([pivots, rest.nonzero()[:, 0]]).to(torch.int32)


def fold_pivots(blocks: torch.Tensor, pivots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (W A (n, D, K), A⁻¹ (n, K, K)) with A = W[P]⁻¹; the rows of W A at the pivots are the identity exactly."""
    inverse = blocks[:, pivots]
    folded = torch.linalg.solve(inverse, blocks, left=False)
    folded[:, pivots] = torch.eye(inverse.shape[1], dtype=folded.dtype)
    return folded, inverse
