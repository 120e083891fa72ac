"""The loss of the fit: KL between the teacher's and the student's attention, and its gradient.

Dimensions: B windows, H n_heads, G n_kv_heads, R query rows, T key positions, K d_head. Queries come scaled and
turned by RoPE, keys turned; head h reads the keys of group h // (H / G).
"""

from typing import Any

import torch


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
    t = attention_logits(*teacher, allowed).float().log_softmax(-1)
    s = attention_logits(*student, allowed).float().log_softmax(-1)
    return (t.exp() * (t - s)).sum(-1)


class MeanAttentionKL(torch.autograd.Function):
    """Mean over windows, heads and rows of weight * KL(p || softmax(q kᵀ)), as a gradient only.

    `weight` is (B, 1, 1, 1). d KL / d logits = softmax(s) - p, so one softmax and two products give the gradient
    of queries and keys; the value itself is not computed and 0 is returned in its place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        p: torch.Tensor,
        allowed: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        difference = attention_logits(query, key, allowed).softmax(-1).sub_(p).mul_(weight)  # (B, H, R, T)
        ctx.save_for_backward(query, key, difference)
        return query.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[torch.Tensor | None, ...]:
        query, key, difference = ctx.saved_tensors
        b, h, r, k = query.shape
        groups = key.shape[1]
        rows = b * h * r
        difference = difference.view(b * groups, -1, key.shape[2])
        keys, queries = key.reshape(b * groups, -1, k), query.reshape(b * groups, -1, k)
        to_query = torch.bmm(difference, keys).view_as(query) * (grads[0] / rows)
        to_key = torch.bmm(difference.mT, queries).view_as(key) * (grads[0] / rows)
        return to_query, to_key, None, None, None
