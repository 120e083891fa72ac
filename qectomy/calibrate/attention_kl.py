"""The loss of the fit: KL between the teacher's and the student's attention, and its gradient.

Dimensions: B windows, H n_heads, G n_kv_heads, R query rows, T key positions, K d_head. Queries come scaled and
rotated by RoPE, keys rotated; head h reads the keys of group h // (H / G).
"""

from collections.abc import Iterator
from typing import Any

import torch

from qectomy.calibrate.at_once import BLOCK_LOGITS

KEYS_ROUNDED = 64
BLOCKS = 4  # of rows, at least, on a processor: three eighths of a causal mask's products are then left out


def attention_logits(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return masked logits (B, H, R, T) of queries (B, H, R, K) and keys (B, G, T, K); allowed is (R, T) bool."""
    b, h, r, k = query.shape
    groups = key.shape[1]
    logits = torch.bmm(query.reshape(b * groups, -1, k), key.reshape(b * groups, -1, k).mT).view(b, h, r, -1)
    return logits.masked_fill_(~allowed, -1e30 if logits.dtype != torch.float16 else -6e4)


def attention_kl(
    teacher: tuple[torch.Tensor, torch.Tensor],
    student: tuple[torch.Tensor, torch.Tensor],
    allowed: torch.Tensor,
) -> torch.Tensor:
    """Return KL(softmax t || softmax s) of each row, (B, H, R), in nats; each argument is (query, key)."""
    parts = []
    # All logits of a layer may be many times larger than the layer.
    for rows, keys in row_blocks(allowed, teacher[0].shape[:2].numel()):
        sides = [(query[:, :, rows], key[:, :, keys]) for query, key in (teacher, student)]
        t, s = (attention_logits(*side, allowed[rows, keys]).float().log_softmax(-1) for side in sides)
        parts.append((t.exp() * (t - s)).sum(-1))
    return torch.cat(parts, -1)


class MeanAttentionKL(torch.autograd.Function):
    """Mean over windows, heads and rows of weight * KL(softmax(teacher) || softmax(q kᵀ)), as a gradient only.

    `teacher` is (query, key); `weight` is (B, 1, 1, 1). d KL / d logits = softmax(s) - softmax(t), so the gradient of
    queries and keys takes four products and two softmaxes, made here a block of rows at a time over the keys that the
    block may look at. The value itself is not computed and 0 is returned in its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        teacher: tuple[torch.Tensor, torch.Tensor],
        allowed: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        (b, h, r, k), groups = query.shape, key.shape[1]
        to_query, to_key = torch.zeros_like(query), torch.zeros_like(key, dtype=accumulator(key.dtype))
        for rows, keys in row_blocks(allowed, b * h):
            here, seen, look = query[:, :, rows], key[:, :, keys], allowed[rows, keys]
            p = attention_logits(teacher[0][:, :, rows], teacher[1][:, :, keys], look).softmax(-1)
            difference = attention_logits(here, seen, look).softmax(-1).sub_(p).mul_(weight)  # (B, H, rows, keys)
            difference = difference.view(b * groups, -1, seen.shape[2])
            to_query[:, :, rows] = torch.bmm(difference, seen.reshape(b * groups, -1, k)).view_as(here)
            to_key[:, :, keys] += torch.bmm(difference.mT, here.reshape(b * groups, -1, k)).view_as(seen)
        ctx.save_for_backward(to_query.div_(b * h * r), to_key.div_(b * h * r).to(key.dtype))
        return query.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        to_query, to_key = ctx.saved_tensors
        return to_query * grads[0], to_key * grads[0], None, None, None


def row_blocks(allowed: torch.Tensor, copies: int) -> Iterator[tuple[slice, slice]]:
    """Yield (rows, keys) slices that together hold every True of allowed (R, T); early rows see few keys.

    `copies` is how many such maps there are, over windows and heads; it bounds a block's rows. The number of keys is
    rounded up, so that few shapes occur: each costs a compiled kernel that stays in memory. An accelerator takes all
    at once: looking at the mask would make it wait.
    """
    if allowed.device.type != "cpu":
        yield slice(None), slice(None)
        return
    blocks = max(BLOCKS, -(-copies * allowed.numel() // BLOCK_LOGITS))
    for rows in torch.arange(len(allowed)).tensor_split(min(blocks, len(allowed))):
        block = slice(int(rows[0]), int(rows[-1]) + 1)
        seen = allowed[block].any(0).nonzero()[:, 0]
        first = int(seen[0]) // KEYS_ROUNDED * KEYS_ROUNDED
        yield block, slice(first, min(allowed.shape[1], -(-(int(seen[-1]) + 1) // KEYS_ROUNDED) * KEYS_ROUNDED))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums of products of `dtype` are kept."""
    return torch.promote_types(dtype, torch.float32)
