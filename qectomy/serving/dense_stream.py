"""Give an engine a reduced checkpoint's tensors as they stream in, with nothing stored once that it wants twice.

An engine that exchanges a model's modules for its own, one by one, knows neither identity blocks (`value_maps: gauge`)
nor layers that share one layer's weights. Both are undone here, a layer at a time: identity blocks are written out, so
that the engine builds, shards and quantizes the projections as the original's; what is shared comes for each layer.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from qectomy.modeling import modeling_qectomy_gpt2, modeling_qectomy_llama
from qectomy.models.architectures import FAMILIES
from qectomy.models.family import Family

Tensors = Iterable[tuple[str, torch.Tensor]]
IN_LAYER = re.compile(r"(?P<stack>(?:.*\.)?(?:layers|h))\.(?P<layer>\d+)\.(?P<rest>.+)")


def dense_config(stored: Any) -> Any:
    """Return the config of the same model with nothing gauged and nothing shared; `stored` is left as it is."""
    config = copy.deepcopy(stored)
    if config.index_sha256 is not None:  # of a gauged layer it is that of channel numbers which the dense one has not
        pairs = zip(config.index_sha256, config.value_maps, strict=True)
        config.index_sha256 = [None if name == "gauge" else digest for digest, name in pairs]
    config.value_maps = ["dense"] * len(config.value_maps)
    config.query_maps = ["dense" if name == "gauge" else name for name in config.query_maps]
    return config


def stock_config(stored: Any) -> Any | None:
    """Return the stock model's config where `dense_config` leaves one that engines are known to compute; else None.

    Engines' own classes take fields that few models set for their defaults, without a word: such a model is not theirs.
    """
    dense, family = dense_config(stored), family_of(stored)
    if {*dense.query_maps, *dense.value_maps, *dense.output_maps} != {"dense"} or stored.shared_layers:
        return None
    fields = dense.to_dict()
    own = (*vars(family.config_class(reduced=True)), "auto_map", "model_file")
    ours = {name: fields.pop(name, None) for name in own}
    config = family.config_class().from_dict(fields | {"architectures": [family.causal_class().__name__]})
    return config if _as_engines_compute(config, ours) else None


def _as_engines_compute(config: Any, ours: dict[str, Any]) -> bool:
    """Whether a model has what every engine's class of its family has: the usual norms, skips, scales and angles."""
    usual = {"norms": True, "attention_skip": True, "mlp_skip": True, "softmax_scale": None}
    if any(ours.get(name, value) != value for name, value in usual.items()):
        return False
    if config.model_type == "gpt2":
        upcast = config.reorder_and_upcast_attn or config.scale_attn_by_inverse_layer_idx
        return config.scale_attn_weights and not upcast and config.activation_function in ("gelu_new", "gelu")
    if config.model_type == "qwen2" and (
        config.use_sliding_window or ours["head_dim"] * config.num_attention_heads != config.hidden_size
    ):
        return False
    rope = config.rope_parameters
    plain = rope["rope_type"] in ("default", "llama3") and rope.get("partial_rotary_factor", 1.0) == 1.0
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    return plain and config.hidden_act == "silu" and not biased


def family_of(config: Any) -> Family:
    """Return the family whose reduced checkpoints have such a config."""
    (family,) = (family for family in FAMILIES.values() if family.reduced_model_type == config.model_type)
    return family


def dense_tensors(weights: Tensors, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors that a model of `dense_config(config)` reads. Raises ValueError as `written_out` does."""
    return for_every_layer(written_out(weights, config), config)


def for_every_layer(weights: Tensors, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors; where all layers share the first one's weights, those again under each layer's name."""
    for name, tensor in weights:
        yield name, tensor
        if config.shared_layers and (found := IN_LAYER.fullmatch(name)):
            for layer in range(1, config.num_hidden_layers):
                yield f"{found['stack']}.{layer}.{found['rest']}", tensor


def written_out(weights: Tensors, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors, those of a projection with identity blocks as the dense one's of the same outputs.

    Raises ValueError where they are not all there, as after a tool that wrote dense weights beside another config.json,
    and for pivots other than config.json's `index_sha256` tells of.
    """
    within, attentions, check_indices_ = gauged_attentions(config)
    gauged = {layer: attention.get_submodule(within.split(".")[1]) for layer, attention in attentions.items()}
    held: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in gauged}
    for name, tensor in weights:
        found = IN_LAYER.fullmatch(name)
        layer = int(found["layer"]) if found and found["rest"].startswith(within) else None
        if found is None or layer not in gauged:
            yield name, tensor
            continue
        held[layer][found["rest"].removeprefix(within)] = tensor
        if held[layer].keys() == gauged[layer].state_dict().keys():
            module = gauged.pop(layer)
            module.load_state_dict(held.pop(layer), assign=True)
            check_indices_(attentions[layer])  # but where Llama's query map has channel numbers that are not here yet
            dense_module: nn.Module = module.written_out()  # type: ignore[operator]
            for part, dense in dense_module.state_dict().items():
                yield f"{found['stack']}.{layer}.{within}{part}", dense
    for layer, module in gauged.items():
        raise ValueError(
            f"layer {layer}: by config.json {within[:-1]} has identity blocks and is stored as "
            f"{', '.join(module.state_dict())}; the checkpoint holds {', '.join(held[layer]) or 'none of these'}. "
            "The config and the weights are of two models: take both from one conversion."
        )


def gauged_attentions(config: Any) -> tuple[str, dict[int, nn.Module], Callable[[nn.Module], None]]:
    """Return the name of the projection that can have identity blocks, and the attention of each stored layer that has.

    Beside them the family's check of channel numbers. The modules lie on the meta device.
    """
    stored = config.value_maps[:1] if config.shared_layers else config.value_maps
    layers = [layer for layer, name in enumerate(stored) if name == "gauge"]
    made: dict[int, nn.Module]
    with torch.device("meta"):
        if config.model_type == "qectomy_gpt2":
            made = {layer: modeling_qectomy_gpt2.ReducedGPT2Attention(config, layer) for layer in layers}
            return "attn.c_attn.", made, modeling_qectomy_gpt2.check_indices_
        made = {layer: modeling_qectomy_llama.ReducedAttention(config, layer) for layer in layers}
        return "self_attn.v_proj.", made, modeling_qectomy_llama.check_indices_


def own_tensors(model: nn.Module) -> Iterator[str]:
    """Yield the names of what the reduced families' own modules store, buffers too, for which engines may not ask."""
    ours = (modeling_qectomy_gpt2.__name__, modeling_qectomy_llama.__name__)
    for prefix, module in model.named_modules():
        if type(module).__module__ in ours:
            names = [name for name, _ in (*module.named_parameters("", False), *module.named_buffers("", False))]
            yield from (f"{prefix}.{name}" for name in names if name not in module._non_persistent_buffers_set)
