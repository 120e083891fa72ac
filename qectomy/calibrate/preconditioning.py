"""Parameters in units of their own effect, and the Adam that moves them.

Each free tensor is p = origin + move(u) with u starting at 0; a step of one size in u means the same to every
direction of p. W_K moves along the eigenvectors of C = E[x̂ᵀx̂], a mix in the whitened basis of its keys.
Weights are (D, out) unless a name says otherwise. Dimensions: D d_model, H n_heads, G n_kv_heads, K d_head.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from qectomy.calibrate.few_steps import steps_of
from qectomy.calibrate.problem import LayerProblem, QueryKeyParams
from qectomy.calibrate.rope import Rope
from qectomy.distributed.process_group import ProcessGroup

DAMPING = 0.03  # of the mean eigenvalue: directions in which x̂ hardly moves are not stretched further


@dataclass
class Preconditioned:
    """A tensor p = origin + move(u), optimised over u, whose entries are of order 1."""

    origin: torch.Tensor
    move: Callable[[torch.Tensor], torch.Tensor]
    lr: float
    u: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.u = torch.zeros_like(self.origin).requires_grad_()

    def value(self) -> torch.Tensor:
        return self.origin + self.move(self.u)


def adam(
    parameters: Sequence[Preconditioned],
    loss: Callable[[list[torch.Tensor]], Iterable[torch.Tensor]],
    *,
    steps: int,
    warmup: int,
    betas: tuple[float, float],
    processes: ProcessGroup | None = None,
) -> None:
    """Run Adam (Kingma & Ba, arXiv 1412.6980) with linear warm-up and cosine decay to 0, in place.

    `loss` takes the parameters' values and yields the loss in parts; each is differentiated before the next is made.
    With `processes` every process yields parts of its own, of one loss; what counts are the first process's parameters.
    """
    # One tensor at a time: what a step takes besides is as large as the largest of them.
    groups = [{"params": [parameter.u], "lr": parameter.lr} for parameter in parameters]
    optimizer = torch.optim.Adam(groups, betas=betas, eps=1e-12, foreach=False)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)) * min(1.0, (step + 1) / warmup)
    )
    for _ in steps_of(steps):
        for parameter, gradient in zip(parameters, _gradients(parameters, loss, processes), strict=True):
            parameter.u.grad = gradient
        optimizer.step()
        schedule.step()


def _gradients(
    parameters: Sequence[Preconditioned],
    loss: Callable[[list[torch.Tensor]], Iterable[torch.Tensor]],
    processes: ProcessGroup | None,
) -> tuple[torch.Tensor, ...]:
    """Return the gradient of the sum of the loss's parts for each u."""
    values = [parameter.value() for parameter in parameters]
    leaves = [value.detach() for value in values]
    if processes:
        # All differentiate at the same point, whatever their rounding: the bases of two devices may differ.
        processes.broadcast_(*leaves)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    totals = [torch.zeros_like(leaf) for leaf in leaves]
    for part in loss(leaves):
        for total, gradient in zip(totals, torch.autograd.grad(part, leaves), strict=True):
            total += gradient
    if processes:
        processes.all_reduce_(*totals)
    return torch.autograd.grad(values, [parameter.u for parameter in parameters], totals)


def precondition_keys(params: QueryKeyParams, problem: LayerProblem, lr: float) -> dict[str, Preconditioned]:
    """W_K (D, G*K), moved in the eigenbasis of C in units of its group's key, and its bias if one stays."""
    values, vectors = problem.moments.eigen
    rms = output_rms(problem.moments.student, params.W_K.double()).float()
    scales, size = _scales(values, 0.125)[:, None], _group_size(rms, problem.rope)
    free = {"W_K": Preconditioned(params.W_K.float(), lambda u: vectors @ (scales * u) * size, lr)}
    return free if params.b_K is None else free | {"b_K": scaled(params.b_K, rms, lr)}


def key_in_eigenbasis(
    W_K: torch.Tensor, variances: torch.Tensor, rope: Rope, *, power: float, lr: float
) -> Preconditioned:
    """W_K (D, G*K) in the eigenbasis of C, where C is the diagonal of `variances` (D,), in units of its group's key."""
    rms = (W_K.square() * variances.clamp_min(0)[:, None]).sum(0).clamp_min(1e-30).sqrt()
    scales, size = _scales(variances, power)[:, None], _group_size(rms, rope)
    return Preconditioned(W_K, lambda u: scales * u * size, lr)


def precondition_mix(
    A: torch.Tensor, W_Q: torch.Tensor, W_K: torch.Tensor, C: torch.Tensor, rope: Rope, *, lr: float
) -> Preconditioned:
    """A (H, K, K), moved in the whitened basis of its keys in units of the query it makes."""
    whiteners = []
    for W in W_K.split(rope.d_head, dim=1):
        values, vectors = torch.linalg.eigh(W.T @ C @ W)
        whiteners.append(vectors * (values.clamp_min(0) + DAMPING * values.mean()).clamp_min(1e-30).rsqrt())
    whitener = torch.stack(whiteners).repeat_interleave(rope.per_group, 0).float()
    size = output_rms(C, W_Q).view(len(A), -1).square().mean(1).sqrt()[:, None, None].float()
    return Preconditioned(A.float(), lambda u: whitener @ u * size, lr)


def precondition_gain(gain: torch.Tensor, lr: float) -> Preconditioned:
    """Factors, each in units of itself, or of a tenth of what they are on average."""
    size = gain.abs()
    return scaled(gain, size.clamp_min(0.1 * float(size.mean())), lr)


def scaled(origin: torch.Tensor, size: torch.Tensor, lr: float) -> Preconditioned:
    """A tensor in units of `size`, entry by entry."""
    unit = size.float()
    return Preconditioned(origin.float(), lambda u: unit * u, lr)


def output_rms(C: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """Return the rms (out,) of each output of x̂ W."""
    return (W * (C @ W)).sum(0).clamp_min(1e-30).sqrt()


def _scales(values: torch.Tensor, power: float) -> torch.Tensor:
    """Return (D,): (eigenvalue + damping)^-power, for outputs of order 1."""
    mean = values.mean()
    return ((values.clamp_min(0) + DAMPING * mean) / mean) ** -power / mean.sqrt()


def _group_size(rms: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Return the rms (G*K,) of each key's group from that of its channels."""
    return rms.view(rope.n_kv_heads, -1).square().mean(1).sqrt().repeat_interleave(rope.d_head)
