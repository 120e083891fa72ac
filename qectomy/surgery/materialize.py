"""Write W_Q back: a reduced checkpoint as the stock model of its family, with the same logits.

Every query map is affine in x̂, so W_Qᵀ = q(I) - q(0) and the bias is q(0), in float64, cast once. The result
saves nothing; it is for engines that know nothing of Qectomy. Of a stock config they read less than transformers does,
so what W_Q can hold lies there: GPT-2's softmax scale is the default one. Layers without W_Q or with identity blocks
quantise badly as they are stored; `balance.py` says what becomes of them.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import Checkpoint, expected_tensors
from qectomy.checkpoint.config_files import copy_companions, load_config, stock_config, write_config
from qectomy.checkpoint.finite import all_finite
from qectomy.checkpoint.shards import DTYPES, MAX_SHARD_BYTES, ShardWriter, TensorSpec
from qectomy.errors import NonFiniteError, UnsupportedArchitecture
from qectomy.models.family import Dimensions, Family, LayerRoles, LinearView
from qectomy.models.heads import join_heads, split_heads
from qectomy.models.linear_views import Projection, read_maps, read_view, store_views, without_views
from qectomy.models.query_maps import QueryMapSpec
from qectomy.progress import Progress
from qectomy.runs.input_hashes import SourceWatch
from qectomy.runs.produce import produce
from qectomy.runs.run_dir import GoOn, finished
from qectomy.surgery.balance import balance_channels, balance_heads
from qectomy.surgery.engines import dropped_fields

LAYERS = "balanced, of the default softmax scale"  # so that no run goes on with layers of another form


def dense_layer(
    checkpoint: Checkpoint, config: Any, layer: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return the stock layer's tensors, by name inside the layer, that a reduced layer's amount to.

    What is not copied is float64.
    """
    family, dims, roles, spec = checkpoint.family, checkpoint.dims, checkpoint.family.roles, checkpoint.recipe[layer]
    factor = family.query_factor(config, layer)
    if spec == QueryMapSpec("dense") and factor == 1.0:
        return tensors
    maps = read_maps(tensors, roles, spec, dims.d_head)
    if "query" not in maps:
        maps["query"] = _query_rows(family, dims, config, layer, tensors, maps["key"])
    W_Q, b_Q = maps["query"]
    maps["query"] = (W_Q.double() * factor, None if b_Q is None else b_Q.double() * factor)
    changed: dict[str, torch.Tensor] = {}
    if spec.gauged:
        changed |= _balance_heads_(maps, spec, dims, roles, tensors)
    if spec.query_map.plain:
        names = [name for name in (f"{roles.attention_norm}.weight", f"{roles.attention_norm}.bias") if name in tensors]
        norm, maps = balance_channels({name: tensors[name] for name in names}, maps, of=("key", "value"))
        changed |= norm
    if dims.attention_bias:  # those that lie elsewhere
        maps |= {role: (W, torch.zeros(W.shape[1]) if b is None else b) for role, (W, b) in maps.items()}
    stored = tuple(LinearView(module) for module in (roles.query_map, roles.gauge, roles.key.module))
    views = [(getattr(roles, role), projection) for role, projection in maps.items()]
    return without_views(tensors, (*stored, roles.value)) | store_views(views) | changed


def _balance_heads_(
    maps: dict[str, Projection],
    spec: QueryMapSpec,
    dims: Dimensions,
    roles: LayerRoles,
    tensors: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Balance W_Q with W_K and W_V with W_O where a head has an identity block; return W_O's tensors."""
    if "query" in spec.gauged:  # there is no RoPE then, one key for each query head, and softmax sees no key bias
        (W_Q, b_Q), (W_K, b_K) = maps["query"], maps["key"]
        rows = W_Q if b_Q is None else torch.cat([W_Q, b_Q[None]])  # the bias turns with them
        query, key = balance_heads(split_heads(rows, dims.d_head), split_heads(W_K, dims.d_head).mT)
        query_rows = join_heads(query)
        maps["query"] = (query_rows[: dims.d_model], None if b_Q is None else query_rows[-1])
        maps["key"] = (join_heads(key.mT), b_K)
    if "value" not in spec.gauged:
        return {}
    (W_V, b_V), (W_O, b_O) = maps["value"], read_view(tensors, roles.output)
    shared = dims.n_heads // dims.n_kv_heads  # heads that read one value stand side by side
    rows = W_O.unflatten(0, (dims.n_kv_heads, shared, dims.d_head)).transpose(1, 2).flatten(2)  # (G, K, shared * D)
    V = W_V if b_V is None else torch.cat([W_V, b_V[None]])
    value, output = balance_heads(split_heads(V, dims.d_head), rows)
    W_O = output.unflatten(2, (shared, -1)).transpose(1, 2).flatten(0, 2)
    V = join_heads(value)
    maps["value"] = (V[: dims.d_model], None if b_V is None else V[-1])
    return store_views([(roles.output, (W_O, b_O))])


def _query_rows(
    family: Family, dims: Dimensions, config: Any, layer: int, tensors: dict[str, torch.Tensor], key: Projection
) -> Projection:
    """Return W_Q (D, H*K) and its bias of a layer's query map, in float64, by running it on the basis and on 0."""
    with torch.device("meta"):
        query = family.reduced_layer(config, layer).get_submodule(family.roles.query_map)
    prefix = f"{family.roles.query_map}."
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    query.load_state_dict(state, strict=True, assign=True)
    W_K, b_K = key
    inputs = torch.cat([torch.eye(dims.d_model), torch.zeros(1, dims.d_model)]).double()  # the last row is x̂ = 0
    with torch.no_grad():
        keys = inputs @ W_K.double() + (0 if b_K is None else b_K.double())
        rows = query.double()(inputs[None], keys[None])[0]
    return rows[:-1] - rows[-1], rows[-1] if dims.attention_bias else None


def _check_fits(tensors: dict[str, torch.Tensor], dtypes: dict[str, str], layer: int) -> None:
    for name, tensor in tensors.items():
        if not all_finite(tensor.to(DTYPES[dtypes[name]])):
            raise NonFiniteError(f"layer {layer}: {name} does not fit in {dtypes[name]} once it is written out")


def materialize(
    checkpoint: Checkpoint,
    out: Path,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    resume: GoOn = False,
    clean: bool = False,
) -> dict[str, Any]:
    """Write the stock checkpoint that a reduced one amounts to; return what was written.

    One layer is held at a time. Until it is whole it lies in OUT.converting, whence `resume` goes on and which `clean`
    removes first. Raises OutputError if `out` exists or the disk is full.
    """
    family, dims, dtype = checkpoint.family, checkpoint.dims, checkpoint.dtype
    if not dims.stock:
        raise UnsupportedArchitecture(
            f"{checkpoint.folder} is no stock {family.model_type} model with W_Q written back: it lacks norms or "
            "skips, or its layers share their weights. It runs in the class that lies beside its weights."
        )
    dense = (QueryMapSpec("dense"),) * dims.n_layers
    shapes = expected_tensors(family, dims, dense)
    specs = {
        name: TensorSpec(shape, checkpoint.tensors[name].dtype if name in checkpoint.tensors else dtype)
        for name, shape in shapes.items()
    }
    config = load_config(family, checkpoint.config, reduced=True)
    report = {
        "out": str(out),
        "model_type": family.model_type,
        "parameters": {
            "before": checkpoint.parameters,
            "after": sum(torch.Size(spec.shape).numel() for spec in specs.values()),
        },
        "bytes": {"before": checkpoint.nbytes, "after": sum(spec.nbytes for spec in specs.values())},
        "warnings": dropped_fields(family.model_type, config),
        "note": "materialising saves nothing: W_Q is back, for engines that know nothing of Qectomy",
    }

    unchanged = SourceWatch(checkpoint)
    told = {"command": "materialize", "layers": LAYERS, "largest shard": max_shard_bytes} | unchanged.fingerprint
    if resume and finished(out, told):
        return report

    def finish(folder: Path, _: dict[str, str]) -> dict[str, Any]:
        write_config(folder, stock_config(checkpoint, dtype))
        copy_companions(checkpoint.folder, folder)
        return report

    layers = [partial(_write_layer, checkpoint, config, layer, specs) for layer in range(dims.n_layers)]
    steps = [partial(_write_outer, checkpoint), *layers]
    return produce(
        out,
        told,
        specs,
        steps,
        finish,
        unchanged,
        resume=resume,
        clean=clean,
        progress=progress,
        doing="writing",
        max_shard_bytes=max_shard_bytes,
    )


def _write_outer(checkpoint: Checkpoint, writer: ShardWriter) -> None:
    """Write what lies outside the layers, as it is."""
    for name in checkpoint.family.outer_shapes(checkpoint.dims):
        writer.write(name, checkpoint.read(name))


def _write_layer(
    checkpoint: Checkpoint, config: Any, layer: int, specs: dict[str, TensorSpec], writer: ShardWriter
) -> None:
    """Write the stock layer that a reduced one amounts to."""
    family, prefix = checkpoint.family, checkpoint.family.prefix(layer)
    tensors = dense_layer(checkpoint, config, layer, checkpoint.read_layer(layer))
    _check_fits(tensors, {name: specs[prefix + name].dtype for name in tensors}, layer)
    for name in family.layer_shapes(checkpoint.dims, QueryMapSpec("dense")):
        writer.write(prefix + name, tensors[name])
