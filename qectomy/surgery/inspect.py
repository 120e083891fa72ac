"""What can go from a checkpoint, by map and by layer: from headers alone, torch not loaded."""

from dataclasses import replace
from typing import Any

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.sizes import planned_tensors, totals
from qectomy.models.query_maps import WRITTEN, QueryMapSpec, parse_query_map, refusal
from qectomy.surgery.streams import derive_streams, structural_recipe, structural_verdict

SHOWN_RANKS = (16, 64)
FITS_STOCK = "query maps are fitted to stock models; what goes from this one goes exactly"


def inspect(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `qectomy inspect` shows: sizes, what each map would remove, and each layer's verdict."""
    dims = checkpoint.dims
    dense = QueryMapSpec("dense").parameters(dims)
    maps = []
    for name in dict.fromkeys(name.replace(":R", f":{rank}") for name in WRITTEN for rank in SHOWN_RANKS):
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
