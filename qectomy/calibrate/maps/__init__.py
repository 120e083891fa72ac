"""How each query map is fitted, a file a map: `key_shared.py` fits the one that recipes call `key-shared`.

A file gives the functions of `FittedMap`. What a map stores is told in `models/query_maps.py`, and how queries are
computed from that in `modeling/`.
"""

from importlib import import_module
from typing import Protocol, cast, runtime_checkable

import torch

from qectomy.calibrate.preconditioning import Preconditioned
from qectomy.calibrate.problem import LayerProblem, QueryKeyParams
from qectomy.calibrate.refine import RefineSettings
from qectomy.models.query_maps import QueryMapSpec


@runtime_checkable
class FittedMap(Protocol):
    """The functions of a map's file."""

    def init(self, problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator) -> QueryKeyParams:
        """Return the closed-form start in a model with RoPE."""

    def init_without_rope(
        self, problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator
    ) -> QueryKeyParams:
        """Return the closed-form start in a model without RoPE."""

    def preconditioned(
        self, params: QueryKeyParams, problem: LayerProblem, settings: RefineSettings
    ) -> dict[str, Preconditioned]:
        """Return each tensor that moves, by its field, or `query.NAME`, in units of its own effect."""


def fitted_map(spec: QueryMapSpec) -> FittedMap:
    """Return how a map is fitted."""
    return cast(FittedMap, import_module(f"{__name__}.{spec.name.replace('-', '_')}"))
