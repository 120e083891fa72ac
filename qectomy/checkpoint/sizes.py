"""What a conversion writes, and what it keeps beside it: from headers alone, torch not loaded."""

from typing import Any

from qectomy.checkpoint.checkpoint import Checkpoint, expected_tensors
from qectomy.checkpoint.headers import TensorInfo
from qectomy.models.query_maps import QueryMapSpec


def planned_tensors(
    checkpoint: Checkpoint, recipe: tuple[QueryMapSpec, ...], dtype: str | None = None
) -> dict[str, TensorInfo]:
    """Return what a conversion writes, by tensor name; `dtype` None keeps each tensor's own type."""
    family = checkpoint.family

    def kind(name: str) -> str:
        if family.is_index(name):
            return "I32"
        return dtype or (checkpoint.tensors[name].dtype if name in checkpoint.tensors else checkpoint.dtype)

    shapes = expected_tensors(family, checkpoint.dims, recipe)
    return {name: TensorInfo("", shape, kind(name)) for name, shape in shapes.items()}


def totals(checkpoint: Checkpoint, recipe: tuple[QueryMapSpec, ...], dtype: str | None = None) -> dict[str, Any]:
    """Return parameters and bytes before and after, net: everything added is counted."""
    dims, dense = checkpoint.dims, QueryMapSpec("dense")
    planned = planned_tensors(checkpoint, recipe, dtype).values()
    reduced = [spec for spec in recipe if spec.name != "dense"]
    return {
        "parameters": {"before": checkpoint.parameters, "after": sum(info.numel for info in planned)},
        "bytes": {"before": checkpoint.nbytes, "after": sum(info.nbytes for info in planned)},
        "query_parameters": {
            "before": len(reduced) * dense.parameters(dims),
            "after": sum(spec.parameters(dims) for spec in reduced),
        },
    }


def scratch_bytes(checkpoint: Checkpoint, tokens: int, eval_tokens: int) -> int:
    """Bytes on disk, at most, while a conversion runs: hidden-state streams, and what one layer's fit looks at."""
    dims = checkpoint.dims
    streams = 6 * (tokens + eval_tokens) + tokens  # the teacher's after its attention for the fitted tokens alone
    fit = dims.d_model + (dims.n_heads + dims.n_kv_heads) * dims.d_head
    rows = 2 * min(tokens + eval_tokens, dims.vocab_size)  # of the embedding, before the first layer
    return 4 * (streams * dims.d_model + max(rows * dims.d_model, tokens * fit))
