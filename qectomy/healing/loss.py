"""The loss of healing, with its gradient, from last hidden states: no second set of logits is ever held.

With t the teacher's logits of a token, s the student's and y the token that came next,

    kl      KL(softmax t ‖ softmax s)                       gradient in s: softmax s - softmax t
    ce      -log softmax(s)_y                               gradient in s: softmax s - e_y
    mixed   (1 - w) kl + w ce                               gradient in s: softmax s - (1 - w) softmax t - w e_y

Tokens are taken a few rows at a time: both heads are multiplied, the loss and its gradient taken at once, and the rows
thrown away. Taking slices of the vocabulary instead needs as little memory but each product twice, since the gradient
needs a log-sum-exp that is known only at the end.
Dimensions: N tokens, D and E width of student and teacher, V vocabulary, L layers, B windows, T positions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, log_softmax

ROW_NUMBERS = {"cpu": 2**23, "cuda": 2**27}  # logits held at a time


class _HeadLoss(torch.autograd.Function):
    """(states, head, teacher's states and head, targets, w) -> (loss a token, KL, negative log-likelihood), each (N,).

    The loss is a mean over the tokens; forward makes its gradient too, which backward only scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        head: Tensor,
        teacher_states: Tensor,
        teacher_head: Tensor,
        targets: Tensor,
        ce_weight: float,
        with_gradient: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device, n = states.device.type, len(states)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        wants_states, wants_head = (with_gradient and wanted for wanted in ctx.needs_input_grad[:2])
        kl, nll = (torch.empty(n, dtype=torch.float32, device=states.device) for _ in range(2))
        d_states = torch.empty(states.shape, dtype=dtype, device=states.device) if wants_states else None
        d_head = torch.zeros(head.shape, dtype=torch.float32, device=states.device) if wants_head else None
        rows = max(1, ROW_NUMBERS.get(device, 2**26) // len(head))
        with torch.autocast(device, enabled=False):
            W = head.to(dtype)
            for part in (slice(start, start + rows) for start in range(0, n, rows)):
                h = states[part].to(dtype)
                s = log_softmax(linear(h, W), -1, dtype=torch.float32)
                t = log_softmax(linear(teacher_states[part], teacher_head), -1, dtype=torch.float32)
                y = targets[part, None]
                nll[part] = -s.gather(-1, y)[:, 0]
                p = t.exp()
                kl[part] = torch.linalg.vecdot(p, t.sub_(s))
                if not (wants_states or wants_head):
                    continue
                # softmax s - target, over N, in place
                gradient = s.exp_().sub_(p.mul_(1 - ce_weight))
                gradient.scatter_add_(-1, y, torch.full_like(y, -ce_weight, dtype=gradient.dtype))
                g = gradient.mul_(1 / n).to(dtype)
                if d_states is not None:
                    d_states[part] = g @ W
                if d_head is not None:
                    d_head += g.T @ h
        loss = (kl.mean() * (1 - ce_weight) + nll.mean() * ce_weight) if ce_weight else kl.mean()
        ctx.gradients = (d_states, d_head)
        ctx.types = (states.dtype, head.dtype)
        ctx.mark_non_differentiable(kl, nll)
        return loss, kl, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [
            None if gradient is None else gradient.mul_(grads[0].to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.types, strict=True)
        ]
        ctx.gradients = (None, None)
        return (*scaled, None, None, None, None, None)


def head_loss(
    states: Float[Tensor, "N D"],
    head: Float[Tensor, "V D"],
    teacher_states: Float[Tensor, "N E"],
    teacher_head: Float[Tensor, "V E"],
    targets: Int[Tensor, " N"],
    ce_weight: float = 0.0,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return the mean of (1 - w) KL(teacher ‖ student) + w CE, and each token's KL and -log p, in nats.

    Only the mean has a gradient, in `states` and `head`. Under autocast the products are taken in its type, all else in
    float32. The gradient can be asked for once.
    """
    # Inside the function gradients are always off, so it is told whether they are wanted.
    return _HeadLoss.apply(states, head, teacher_states, teacher_head, targets, ce_weight, torch.is_grad_enabled())


def hidden_loss(
    states: Sequence[Float[Tensor, "B T D"]],
    teacher_states: Sequence[Float[Tensor, "B T D"]],
    basis: Float[Tensor, "D D"] | None = None,
) -> Float[Tensor, ""]:
    """Return the mean over layers of ‖h_student - h_teacher Θ‖² / ‖h_teacher Θ‖², over all tokens of the batch.

    `basis`: the Θ between the two models' streams; None: they are the same.
    """
    total = torch.zeros((), device=states[0].device)
    with torch.autocast(total.device.type, enabled=False):
        for ours, theirs in zip(states, teacher_states, strict=True):
            wanted = theirs.float() if basis is None else theirs.float() @ basis
            total = total + (ours.float() - wanted).square().sum() / wanted.square().sum()
    return total / len(states)
