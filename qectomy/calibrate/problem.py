"""A layer's problem, what its query map and W_K are fitted to, and the tensors that stand for an answer.

Weights are (D, out), as in x̂ W. Dimensions: D d_model, H n_heads, G n_kv_heads, K d_head.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from qectomy.calibrate.moments import Moments, Ridge
from qectomy.calibrate.rope import Rope
from qectomy.models.family import Dimensions

SHRINKAGE = 1e-3  # of the mean diagonal: how strongly weights carried over to the student's stream keep to the old


@dataclass(frozen=True)
class Projections:
    """The teacher's query and key: W (D, out) and bias (out,) or None, float64."""

    W_Q: torch.Tensor
    b_Q: torch.Tensor | None
    W_K: torch.Tensor
    b_K: torch.Tensor | None


@dataclass(frozen=True)
class QueryKeyParams:
    """The new W_K (D, G*K), the query map's tensors by the names its module stores, and the key's bias if one stays.

    `identity` has a gain (D,) or a shift (D,) of the norm's output, which go into the norm.
    """

    W_K: torch.Tensor
    query: dict[str, torch.Tensor]
    b_K: torch.Tensor | None = None
    norm_gain: torch.Tensor | None = None
    norm_shift: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LayerProblem:
    """Queries and keys on the student's x̂ that attend as the teacher's do on its own, from second moments.

    What is derived is computed once. `replace` makes a problem without it: it may weigh more than the layer.
    """

    dims: Dimensions
    rope: Rope
    teacher: Projections
    moments: Moments
    # The covariance under the teacher's attention, float32: of x̂, (G, D, D), for a map that is made of keys; of each
    # head's keys, (H, K, K), for the other maps of a model without RoPE; else None.
    key_moments: torch.Tensor | None = None

    @cached_property
    def spread(self) -> Moments:
        """The moments that W_Q and W_K answer for: about the means, where biases answer for those."""
        return self.moments.centred() if self.dims.attention_bias else self.moments

    def covariance(self) -> torch.Tensor:
        """Return that of x̂, (D, D)."""
        mean = self.spread.student_mean
        return self.spread.student - torch.outer(mean, mean)

    @cached_property
    def carried(self) -> tuple[torch.Tensor, torch.Tensor]:
        """W_Q and W_K that give on the student's x̂ what the teacher's give on its own, shrunk towards those."""
        difference, weights = self.spread.cross - self.spread.student, (self.teacher.W_Q, self.teacher.W_K)
        changes = [difference @ W for W in weights]
        del difference
        solver = Ridge(self.spread.student.clone(), SHRINKAGE)
        W_Q, W_K = (solver.solve_(change).add_(W) for change, W in zip(changes, weights, strict=True))
        return W_Q, W_K

    @cached_property
    def mean_query(self) -> torch.Tensor | None:
        """The mean (H*K,) of the teacher's queries, which a query's bias restores; None without biases."""
        if self.teacher.b_Q is None:
            return None
        return self.moments.teacher_mean @ self.teacher.W_Q + self.teacher.b_Q
