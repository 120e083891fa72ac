"""A projection as one block a head, (n, D, K), and a head that is the identity at its pivots. D d_model, K d_head."""

import torch


def split_heads(W: torch.Tensor, d_head: int) -> torch.Tensor:
    """Return W (D, n*K) as one block a head, (n, D, K)."""
    return W.unflatten(1, (-1, d_head)).transpose(0, 1)


def join_heads(blocks: torch.Tensor) -> torch.Tensor:
    """Return blocks (n, D, K) side by side, (D, n*K)."""
    return blocks.transpose(0, 1).flatten(1)


def other_channels(pivots: torch.Tensor, d_model: int) -> torch.Tensor:
    """Return each head's channels that are no pivots, ascending, (n, D - K)."""
    rest = torch.ones(len(pivots), d_model, dtype=torch.bool).scatter(1, pivots, False)
    return torch.arange(d_model).expand_as(rest)[rest].view(len(pivots), -1)


def unfold_pivots(rest: torch.Tensor, pivots: torch.Tensor) -> torch.Tensor:
    """Return W A (n, D, K): the identity at the pivots, `rest` (n, D - K, K) at the other channels."""
    n, others, K = rest.shape
    W = torch.empty(n, others + K, K, dtype=rest.dtype)
    W.scatter_(1, pivots[..., None].expand(-1, -1, K), torch.eye(K, dtype=rest.dtype).expand(n, -1, -1))
    return W.scatter_(1, other_channels(pivots, others + K)[..., None].expand(-1, -1, K), rest)
