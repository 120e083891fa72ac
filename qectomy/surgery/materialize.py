"""Write W_Q back: a reduced checkpoint as the stock model of its family, with the same logits.

Every query map is affine in x̂, so W_Qᵀ = q(I) - q(0) and the bias is q(0), in float64, cast once. The result
saves nothing; it is for engines that know nothing of Qectomy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qectomy.errors import NonFiniteError
from qectomy.surgery.checkpoint import Checkpoint, expected_tensors
from qectomy.surgery.config_files import copy_companions, load_config, stock_config, write_config
from qectomy.surgery.finite import all_finite
from qectomy.surgery.output import check_room, new_folder
from qectomy.surgery.query_maps import QueryMapSpec
from qectomy.surgery.writer import DTYPES, MAX_SHARD_BYTES, ShardWriter, TensorSpec

Progress = Callable[[int, int], None]


def dense_query(
    checkpoint: Checkpoint, config: Any, layer: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the W_Q tensors, by name inside the layer, that a layer's query map amounts to; float64."""
    family, dims = checkpoint.family, checkpoint.dims
    roles = family.roles
    with torch.device("meta"):
        query = family.reduced_layer(config, layer).get_submodule(roles.query_map)
    prefix = f"{roles.query_map}."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    query.load_state_dict(state, strict=True, assign=True)
    query = query.double()
    inputs = torch.cat([torch.eye(dims.d_model), torch.zeros(1, dims.d_model)]).double()  # the last row is x̂ = 0
    key = torch.nn.functional.linear(
        inputs,
        tensors[f"{roles.key.module}.weight"].double(),
        tensors[f"{roles.key.module}.bias"].double() if dims.attention_bias else None,
    )
    with torch.no_grad():
        rows = query(inputs[None], key[None])[0]
    bias = rows[-1]
    dense = {f"{roles.query.module}.weight": (rows[:-1] - bias).T.contiguous()}
    if dims.attention_bias:
        dense[f"{roles.query.module}.bias"] = bias
    return dense


def _check_fits(tensors: dict[str, torch.Tensor], names: list[str], dtype: str, layer: int) -> None:
    for name in names:
        if not all_finite(tensors[name].to(DTYPES[dtype])):
            raise NonFiniteError(f"layer {layer}: {name} does not fit in {dtype} once it is written out")


def materialize(
    checkpoint: Checkpoint,
    out: Path,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Write the stock checkpoint that a reduced one amounts to; return what was written.

    One layer is held at a time. Raises OutputError if `out` exists or the disk is full.
    """
    family, dims, dtype = checkpoint.family, checkpoint.dims, checkpoint.dtype
    dense = (QueryMapSpec("dense"),) * dims.n_layers
    shapes = expected_tensors(family, dims, dense)
    specs = {
        name: TensorSpec(shape, checkpoint.tensors[name].dtype if name in checkpoint.tensors else dtype)
        for name, shape in shapes.items()
    }
    check_room(out, sum(spec.nbytes for spec in specs.values()))
    config = load_config(family, checkpoint.config, reduced=True)
    with new_folder(out) as work:
        with ShardWriter(work, specs, max_shard_bytes) as writer:
            for name in family.outer_shapes(dims):
                writer.write(name, checkpoint.read(name))
            for layer in range(dims.n_layers):
                tensors = checkpoint.read_layer(layer)
                if checkpoint.recipe[layer].name != "dense":
                    tensors |= dense_query(checkpoint, config, layer, tensors)
                    _check_fits(tensors, family.query_tensors(dims), dtype, layer)
                for name in family.layer_shapes(dims):
                    writer.write(family.prefix(layer) + name, tensors[name])
                if progress:
                    progress(layer + 1, dims.n_layers)
            writer.finish()
        write_config(work, stock_config(checkpoint, dtype))
        copy_companions(checkpoint.folder, work)
    parameters = sum(torch.Size(spec.shape).numel() for spec in specs.values())
    return {
        "out": str(out),
        "model_type": family.model_type,
        "parameters": {"before": checkpoint.parameters, "after": parameters},
        "bytes": {"before": checkpoint.nbytes, "after": sum(spec.nbytes for spec in specs.values())},
        "note": "materialising saves nothing: W_Q is back, for engines that know nothing of Qectomy",
    }
