"""What a conversion handles, in numbers alone: sizes of its layers, windows, batches and steps. Torch is not loaded.

Dimensions: D d_model, M d_mlp, Q n_heads * d_head, S n_kv_heads * d_head, T context.
"""

import math
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from qectomy.calibrate.at_once import ROWS_A_STEP, ROWS_STRIDE, TOKENS_A_PART
from qectomy.checkpoint.checkpoint import Checkpoint, expected_layer
from qectomy.checkpoint.headers import FLOAT_BYTES
from qectomy.conversion.at_once import TOKENS_A_BATCH, TOKENS_ON_DEVICE
from qectomy.models.family import Dimensions
from qectomy.models.query_maps import QueryMapSpec, turns_stream


@dataclass(frozen=True, kw_only=True)
class Work:
    """One conversion. Sizes are numbers of entries unless a name says bytes."""

    dims: Dimensions
    recipe: tuple[QueryMapSpec, ...]
    fitted: int  # windows
    held: int  # windows
    context: int
    layer: int  # entries of a stock layer
    largest: int  # of its tensors
    reduced: dict[QueryMapSpec, int]  # entries of a layer of each map that occurs
    outside: int  # bytes of what lies outside the layers, as read
    read_itemsize: int
    written_itemsize: int
    fast_itemsize: int  # of the type in which the fit may multiply
    mlp_readers: int
    on_device: bool = False
    refit: bool = True

    @property
    def n_query(self) -> int:
        return self.dims.n_heads * self.dims.d_head

    @property
    def n_key(self) -> int:
        return self.dims.n_kv_heads * self.dims.d_head

    @property
    def windows(self) -> int:
        return self.fitted + self.held

    @property
    def turned(self) -> bool:
        """Whether the stream takes a random basis: where a layer reads its queries straight from it."""
        return turns_stream(self.recipe, self.dims)

    @property
    def batch(self) -> int:
        """Windows that a layer runs on at a time."""
        return max(1, (TOKENS_ON_DEVICE if self.on_device else TOKENS_A_BATCH) // self.context)

    @property
    def batch_tokens(self) -> int:
        return min(self.batch, max(self.fitted, self.held)) * self.context

    @property
    def step_windows(self) -> int:
        return max(1, min(self.fitted, ROWS_A_STEP * ROWS_STRIDE // self.context))

    @property
    def part_windows(self) -> int:
        """Windows of a step that are handled at a time."""
        return self.step_windows if self.on_device else min(self.step_windows, max(1, TOKENS_A_PART // self.context))

    @property
    def drifting(self) -> list[bool]:
        """For each layer, whether it is refitted: the stream has left the teacher's there."""
        found, drifted = [], self.turned
        for spec in self.recipe:
            drifted = drifted or spec.name != "dense"
            found.append(drifted and self.refit)
        return found


def plan_work(
    source: Checkpoint,
    recipe: tuple[QueryMapSpec, ...],
    *,
    tokens: int,
    eval_tokens: int,
    context: int,
    dtype: str | None = None,
    on_device: bool = False,
    refit: bool = True,
) -> Work:
    """Return what a conversion will handle, if its texts are as long as asked for; `dtype` as safetensors names it."""
    sizes = [info.numel for _, info in source.layer_tensors(0)]
    layer_bytes = sum(info.nbytes for _, info in source.layer_tensors(0)) * source.dims.n_stored
    shapes = {spec: expected_layer(source.family, source.dims, spec).values() for spec in recipe}
    return Work(
        dims=source.dims,
        recipe=recipe,
        fitted=max(1, tokens // context),
        held=max(1, eval_tokens // context),
        context=context,
        layer=sum(sizes),
        largest=max(sizes),
        reduced={spec: sum(map(math.prod, found)) for spec, found in shapes.items()},
        outside=source.nbytes - layer_bytes,
        read_itemsize=FLOAT_BYTES[source.dtype],
        written_itemsize=FLOAT_BYTES[dtype or source.dtype],
        fast_itemsize=2 if on_device else fast_itemsize(),
        mlp_readers=len(source.family.roles.mlp_readers),
        on_device=on_device,
        refit=refit,
    )


@cache
def fast_itemsize() -> int:
    """Return the bytes of a number in the type in which this processor multiplies fastest, as `precision.py` finds it.

    It is looked up where the system lists what its processor can do; torch, which knows everywhere, is not loaded.
    """
    if "torch" in sys.modules:
        import torch

        from qectomy.calibrate.precision import fast_dtype

        return fast_dtype(torch.device("cpu")).itemsize
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 4
    return 2 if "avx512_bf16" in flags else 4
