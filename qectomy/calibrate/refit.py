"""Refit W_O and W_down in closed form, so that the student's stream returns to the teacher's.

After a layer's attention (and again after its MLP) the student's stream is off by what the query map could not
express and by what earlier layers left. A ridge regression from what the matrix reads onto that difference, shrunk
towards the original matrix, takes back the part that is predictable:

    ΔW = (Aᵀ A + λ mean(diag Aᵀ A) I)⁻¹ Aᵀ (x_teacher - x_student)

A is (tokens, in), ΔW is (in, D). Where the matrix has a bias, the means are taken out of A and of the difference,
and the bias takes up what they leave. Strong shrinkage (λ of 1 and more) is what carries over to other text.
"""

from dataclasses import dataclass

import torch
from torch import nn

from qectomy.calibrate.at_once import COLUMNS
from qectomy.calibrate.hidden_states import Streams, batches
from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.calibrate.moments import MomentSums, ridge, ridge_
from qectomy.calibrate.precision import fast_dtype, fast_math
from qectomy.checkpoint.memory import release_freed
from qectomy.distributed.window_shard import WindowShard
from qectomy.models.family import LinearView
from qectomy.models.linear_views import oriented


@dataclass(frozen=True, kw_only=True)
class RefitSettings:
    """Ridge strengths, relative to the mean diagonal of the Gram matrix; measured choices, see docs/LOG.md."""

    output: float = 1.0
    mlp_readers: float | None = None  # None: the MLP's readers stay; they must follow a stream that starts elsewhere
    mlp_out: float = 3.0


TURNED = RefitSettings(mlp_readers=0.01)  # in a turned stream, whose embedding is scaled under a tied head


class Regression:
    """Gram matrix of what a projection reads, and its product with the residual: teacher's stream less student's.

    With a bias both are taken about the first batch's means: products of low precision would lose a small spread about
    a large mean. Every process takes in its own windows, about the means of the first one.
    """

    def __init__(self, inputs: torch.Tensor, residual: torch.Tensor, with_bias: bool, share: WindowShard):
        n_in, n_out, device = inputs.shape[-1], residual.shape[-1], inputs.device
        self.gram = torch.zeros(n_in, n_in, device=device)
        self.right = torch.zeros(n_in, n_out, device=device)
        self.with_bias = with_bias
        self.origin = [part.flatten(0, 1).mean(0) for part in (inputs, residual)]
        self.sums = [torch.zeros(part.shape[-1], dtype=torch.float64, device=device) for part in (inputs, residual)]
        self.count, self.share = 0, share
        share.processes.broadcast_(*self.origin)

    def add(self, inputs: torch.Tensor, residual: torch.Tensor) -> None:
        """Take in a batch, (B, T, in) and (B, T, D)."""
        parts = [inputs.flatten(0, 1), residual.flatten(0, 1)]
        if self.with_bias:
            parts = [part - origin for part, origin in zip(parts, self.origin, strict=True)]
            for part, total in zip(parts, self.sums, strict=True):
                total += part.sum(0, dtype=torch.float64)
            self.count += len(parts[0])
        a, b = (part.to(fast_dtype(inputs.device)) for part in parts)
        for start, stop in batches(0, a.shape[1], COLUMNS):  # a product takes another array before it is added
            self.gram[start:stop] += (a[:, start:stop].T @ a).float()
            self.right[start:stop] += (a[:, start:stop].T @ b).float()

    def change(self, strength: float) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return ΔW (in, D) and Δb (D,), float32. Uses up the Gram matrix, which may weigh as much as the layer."""
        processes = self.share.processes
        processes.all_reduce_(self.gram, self.right, *self.sums)
        gram = self.gram.double()
        del self.gram
        release_freed()
        if not self.with_bias:
            return ridge_(gram, self.right, strength), None
        (count,) = self.share.sum_numbers(self.count)
        inputs, residual = (total / count for total in self.sums)
        gram.addr_(self.sums[0], inputs, alpha=-1)
        self.right.addr_(self.sums[0].float(), residual.float(), alpha=-1)
        change = ridge_(gram, self.right, strength)
        inputs, residual = (mean + origin for mean, origin in zip((inputs, residual), self.origin, strict=True))
        return change, (residual - inputs @ change.double()).float()


def refit_layer(runner: LayerRunner, student: nn.Module, streams: Streams, settings: RefitSettings) -> None:
    """Refit the student layer's W_O, then its MLP, in place, on the fitted windows; the streams stay as they are.

    The teacher is known by what it left in `streams`, after its attention and after the layer.
    """
    roles = runner.family.roles
    _refit_writer(runner, student, streams, roles.output, settings.output)
    release_freed()
    if settings.mlp_readers is not None:
        _refit_readers(runner, student, streams, settings.mlp_readers)
        release_freed()
    _refit_writer(runner, student, streams, roles.mlp_out, settings.mlp_out)


def _refit_writer(runner: LayerRunner, student: nn.Module, streams: Streams, view: LinearView, strength: float) -> None:
    """Refit W_O, or W_down once W_O stands, on the residual after it."""
    after_mlp = view is runner.family.roles.mlp_out
    wanted = streams.teacher_after if after_mlp else streams.teacher_mid
    linear = student.get_submodule(view.module)
    sums: Regression | None = None
    for start, stop in batches(0, streams.fitted, streams.batch):
        states = streams.student[start:stop].to(runner.device)
        with fast_math(runner.device):
            states, inputs = runner.attend(student, states)
            if after_mlp:
                states, inputs = runner.think(student, states)
        residual = wanted[start:stop].to(runner.device) - states
        sums = sums or Regression(
            inputs, residual, with_bias=getattr(linear, "bias", None) is not None, share=streams.share
        )
        sums.add(inputs, residual)
    assert sums is not None
    change, bias = sums.change(strength)
    streams.share.processes.broadcast_(change, *(() if bias is None else (bias,)))
    _add(linear, view, change, bias)


def _refit_readers(runner: LayerRunner, student: nn.Module, streams: Streams, strength: float) -> None:
    """Let the MLP's readers give on the student's stream what the teacher's give on its own."""
    roles = runner.family.roles
    norm = student.get_submodule(roles.mlp_norm)  # the teacher's own
    sums = MomentSums(runner.dims.d_model, runner.device)
    for start, stop in batches(0, streams.fitted, streams.batch):
        with fast_math(runner.device):
            states, _ = runner.attend(student, streams.student[start:stop].to(runner.device))
        sums.add(norm(states), norm(streams.teacher_mid[start:stop].to(runner.device)))
    moments = sums.moments(streams.share.processes)
    change = ridge(moments.student, moments.cross - moments.student, strength)  # (D, D): x̂ + x̂ change ≈ x̂_teacher
    streams.share.processes.broadcast_(change)
    for view in roles.mlp_readers:
        linear = student.get_submodule(view.module)
        W = oriented(linear.get_parameter("weight"), view).double()
        _add(linear, view, (change @ W).float())


def _add(linear: nn.Module, view: LinearView, change: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Add ΔW (in, out) to a projection's matrix, and Δb to its bias. The old ones may be the teacher's too."""
    linear.weight = nn.Parameter(linear.get_parameter("weight") + oriented(change, view), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(linear.get_parameter("bias") + bias, requires_grad=False)
