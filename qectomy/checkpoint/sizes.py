"""What a conversion would remove, layer by layer: from headers alone, torch not loaded."""

from dataclasses import replace
from typing import Any

from qectomy.checkpoint.checkpoint import Checkpoint, expected_tensors
from qectomy.checkpoint.headers import TensorInfo
from qectomy.models.query_maps import QueryMapSpec, parse_query_map, refusal
from qectomy.surgery.streams import derive_streams, structural_recipe, structural_verdict

SHOWN_MAPS = ("identity", "select", "key-shared", "low-rank:16", "low-rank:64")
FITS_STOCK = "query maps are fitted to stock models; what goes from this one goes exactly"


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


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `qectomy inspect` shows: sizes, what each map would remove, and each layer's verdict."""
    dims = checkpoint.dims
    dense = QueryMapSpec("dense").parameters(dims)
    maps = []
    for name in SHOWN_MAPS:
        spec = parse_query_map(name)
        why = FITS_STOCK if checkpoint.reduced else refusal(spec, dims)
        row: dict[str, Any] = {"map": name, "possible": why is None, "why_not": why}
        if why is None:
            sizes = totals(checkpoint, (spec,) * dims.n_layers)
            removed = sizes["parameters"]["before"] - sizes["parameters"]["after"]
            row |= {
                "removed_parameters": removed,
                "removed_bytes": sizes["bytes"]["before"] - sizes["bytes"]["after"],
                "share_of_model": removed / sizes["parameters"]["before"],
                "share_of_W_Q": 1 - spec.parameters(dims) / dense,
            }
        maps.append(row)
    streams = derive_streams(dims)
    verdicts = [structural_verdict(streams, layer) for layer in range(dims.n_layers)]
    layers = [
        {"index": layer, "W_Q_parameters": dense, "how": how, "reason": reason}
        for layer, (how, reason) in enumerate(verdicts)
    ]
    maps.append(_exact_row(checkpoint))
    return {
        "checkpoint": str(checkpoint.folder),
        "family": checkpoint.family.model_type,
        "dtype": checkpoint.dtype,
        "files": checkpoint.files,
        "dimensions": {name: getattr(dims, name) for name in dims.__dataclass_fields__},
        "parameters": checkpoint.parameters,
        "bytes": checkpoint.nbytes,
        "query_maps": maps,
        "layers": layers,
    }


def _exact_row(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what exact folding would remove if no layer is too ill-conditioned for it."""
    dims, dense = checkpoint.dims, QueryMapSpec("dense")
    recipe, folded = structural_recipe(derive_streams(dims))
    stored = recipe[: dims.n_stored]
    planned = planned_tensors(replace(checkpoint, dims=folded), recipe).values()
    removed = checkpoint.parameters - sum(info.numel for info in planned)
    before = len(stored) * dense.parameters(dims)
    return {
        "map": "exact",
        "possible": removed > 0,
        "why_not": None if removed > 0 else "nothing of this checkpoint goes exactly",
        "removed_parameters": removed,
        "removed_bytes": checkpoint.nbytes - sum(info.nbytes for info in planned),
        "share_of_model": removed / checkpoint.parameters,
        "share_of_W_Q": 1 - sum(spec.parameters(dims) for spec in stored) / before,
    }
