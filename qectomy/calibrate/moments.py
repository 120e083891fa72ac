"""Second moments of what the student and the teacher read, the data that every closed-form start needs."""

from dataclasses import dataclass
from functools import cached_property

import torch

from qectomy.calibrate.at_once import COLUMNS
from qectomy.distributed.process_group import ProcessGroup


@dataclass(frozen=True)
class Moments:
    """E[x̂ᵀx̂] of the student, E[x̂ᵀx̂_teacher], and both means, in float64. D is d_model.

    With `centred`, the means are taken out of both matrices: a bias then carries what they hold.
    """

    student: torch.Tensor  # (D, D)
    cross: torch.Tensor  # (D, D), student rows, teacher columns
    student_mean: torch.Tensor  # (D,)
    teacher_mean: torch.Tensor  # (D,)

    def centred(self) -> "Moments":
        outer = torch.outer
        return Moments(
            self.student - outer(self.student_mean, self.student_mean),
            self.cross - outer(self.student_mean, self.teacher_mean),
            torch.zeros_like(self.student_mean),
            torch.zeros_like(self.teacher_mean),
        )

    @cached_property
    def eigen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (D,), ascending, and eigenvectors (D, D) of the student's matrix, float32."""
        values, vectors = torch.linalg.eigh(self.student.float())
        return values, vectors

    def eigen_in_float64(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the same in float64; what `eigen` gives from here on is this, rounded."""
        values, vectors = torch.linalg.eigh(self.student)
        self.__dict__["eigen"] = values.float(), vectors.float()
        return values, vectors


class MomentSums:
    """Accumulates Moments batch by batch."""

    def __init__(self, d_model: int, device: torch.device):
        zeros = lambda *shape: torch.zeros(*shape, dtype=torch.float64, device=device)  # noqa: E731
        self._student, self._cross = zeros(d_model, d_model), zeros(d_model, d_model)
        self._means = zeros(2, d_model)
        self._count = 0

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Take in x̂ of both, (..., D) float32."""
        s, t = student.flatten(0, -2), teacher.flatten(0, -2)
        self._student += (s.T @ s).double()
        self._cross += (s.T @ t).double()
        self._means += torch.stack([s.sum(0), t.sum(0)]).double()
        self._count += s.shape[0]

    def moments(self, processes: ProcessGroup | None = None) -> Moments:
        """Return the moments of all that was taken in, by every process if there are several."""
        count = torch.tensor(self._count, dtype=torch.float64)
        if processes:
            processes.all_reduce_(self._student, self._cross, self._means, count)
        n = float(count)
        return Moments(self._student / n, self._cross / n, self._means[0] / n, self._means[1] / n)


class Ridge:
    """The ridge regressions of one Gram matrix: X = (gram + strength * mean(diag gram) I)⁻¹ target for any target.

    The matrix (n, n), PSD, is factored once, in float64 where it lies: a wide layer's is as large as the layer.
    """

    def __init__(self, gram: torch.Tensor, strength: float):
        columns = gram.mT  # symmetric: laid out by columns, it is factored in place
        columns.diagonal().add_(strength * columns.diagonal().mean().clamp_min(1e-30))
        self.pivots = torch.empty(len(gram), dtype=torch.int32, device=gram.device)
        self.factors = columns
        torch.linalg.lu_factor(columns, out=(columns, self.pivots))

    def solve_(self, target: torch.Tensor) -> torch.Tensor:
        """Put X in the place of a contiguous target (n, ...), solved in float64 whatever its type."""
        for some in target.view(len(target), -1).split(COLUMNS, 1):
            some.copy_(torch.linalg.lu_solve(self.factors, self.pivots, some.double()))
        return target


def ridge(gram: torch.Tensor, target: torch.Tensor, strength: float) -> torch.Tensor:
    """Return argmin_X tr(Xᵀ gram X) - 2 tr(Xᵀ target) + strength * mean(diag gram) |X|², in the type of `target`."""
    return ridge_(gram.to(torch.float64, copy=True), target, strength)


def ridge_(gram: torch.Tensor, target: torch.Tensor, strength: float) -> torch.Tensor:
    """Do as `ridge` does with a float64 gram, which is used up."""
    return Ridge(gram, strength).solve_(target.clone(memory_format=torch.contiguous_format))
