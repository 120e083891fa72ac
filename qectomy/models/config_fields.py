"""Which fields of a config.json are read: those that the family knows, and no others.

A field that nobody here knows can mean anything to whoever reads an output later, and fields have been used to have
code run (an attention implementation may be a hub repository). So what a family does not list is left out of all that
is read and written, and told. What would make transformers, or the code that the weights were made for, compute another
model than the one read here is refused. No torch, no transformers.
"""

from collections.abc import Iterable
from typing import Any

from qectomy.errors import CheckpointError, shown

COMMON = (
    "model_type",
    "vocab_size",
    "tie_word_embeddings",
    "initializer_range",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tokenizer_class",  # by name, of transformers' own
    "dtype",
    "torch_dtype",
)
ROPE = (
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "short_factor",
    "long_factor",
    "low_freq_factor",
    "high_freq_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
)
ROPE_FIELDS = ("rope_parameters", "rope_scaling")  # of transformers 5, and of those before
LENGTH = "original_max_position_embeddings"
LENGTH_READERS = ("llama3", "yarn", "longrope")
ROPE_BESIDE = ("rope_theta", "partial_rotary_factor", LENGTH)  # that may stand beside them
IDLE = (  # that transformers has written into any config.json, and which say nothing of what a model computes
    "architectures",
    "auto_map",  # told by itself
    "transformers_version",
    "_name_or_path",
    "_commit_hash",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "experts_implementation",
    "_experts_implementation",
    "_experts_implementation_internal",
    "return_dict",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "is_decoder",
    "torchscript",
    "use_bfloat16",
    "id2label",
    "label2id",
    "problem_type",
    "gradient_checkpointing",
)
# What makes another model of the same weights wherever it is read, and the values that say that it does not.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    # transformers acts on these, whatever the family
    "per_layer_config": ({},),
    "transformers_weights": (),
    "pruned_heads": ({},),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False,),
    "attention_chunk_size": (),
    "chunk_size_feed_forward": (0,),
    # it does not where they stand in a config of these families; the code that the weights were made for does
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "no_rope_layers": ([],),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "parallel_attn": (False,),
    "qk_layernorm": (False,),
    "qk_norm": (False,),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "scale_emb": (1,),
    "use_parallel_residual": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
}


def known_fields(config: dict[str, Any], known: Iterable[str], kind: str) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a parsed config.json that are `known`, and the names of those left out that are to be told.

    Raises CheckpointError for one that makes another model of a `kind`'s.
    """
    listed = {*COMMON, *known}
    if "layer_types" not in listed:
        _check_layer_types(config, kind)
    for name, neutral in NEUTRAL.items():
        value = config.get(name)
        if name not in listed and value is not None and not _is_one_of(value, neutral):
            raise CheckpointError(_another_model(name, value, kind))
    kept = {name: value for name, value in config.items() if name in listed}
    told = [name for name in config if name not in {*kept, *IDLE, *NEUTRAL, "layer_types"} and config[name] is not None]
    for name in ROPE_FIELDS:
        if isinstance(inner := kept.get(name), dict):
            kept[name] = {key: value for key, value in inner.items() if key in ROPE}
            told += [f"{name}.{key}" for key in inner if key not in ROPE]
    return kept, told


def _check_layer_types(config: dict[str, Any], kind: str) -> None:
    """Raise CheckpointError where layers are said to attend in several ways: the layers of this family do alike."""
    types = config.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or any(name != types[0] for name in types):
        raise CheckpointError(_another_model("layer_types", types, kind))
    if types and types[0] not in ("full_attention", "sliding_attention"):
        raise CheckpointError(_another_model("layer_types", types, kind))


def check_rope(config: dict[str, Any]) -> None:
    """Raise CheckpointError where a config.json says one thing of RoPE under two names, and not the same.

    Transformers lets one of them win without a word: `rope_scaling` stands in for all of `rope_parameters`, whose own
    `rope_theta` goes before the one beside it.
    """
    stated = [(name, config[name]) for name in ROPE_FIELDS if config.get(name) is not None]
    for name, values in stated:
        if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
            raise CheckpointError(
                f"config.json: {name} must be one object of plain values, for all layers, got {shown(values)}"
            )
    if not stated:
        return
    outer = {key: config[key] for key in ROPE_BESIDE if config.get(key) is not None}
    place, chosen = next(((name, values) for name, values in reversed(stated) if values), stated[0])
    read: dict[str, Any] = {"rope_theta": 10_000.0, "rope_type": "default"}
    read |= {key: value for key, value in outer.items() if key != LENGTH}
    read |= {key: value for key, value in chosen.items() if key != "type"}
    if chosen.get("rope_type") is None and chosen.get("type") is not None:
        read["rope_type"] = chosen["type"]
    if read["rope_type"] not in LENGTH_READERS:
        outer.pop(LENGTH, None)
    for name, values in [*stated, ("", outer)]:
        for key, value in values.items():
            own = "rope_type" if key == "type" else key
            if value is not None and read.get(own) != value:
                instead = f"is {shown(read[own])}" if own in read else "is not there"
                raise CheckpointError(
                    f"config.json: {f'{name}.{key}'.lstrip('.')} is {shown(value)}, and {place}.{own}, which "
                    f"transformers reads in its place, {instead}: they are two names of one field, and each makes "
                    "another model. Keep the one that the weights were trained with"
                )


def _is_one_of(value: Any, neutral: tuple[Any, ...]) -> bool:
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral)


def _another_model(name: str, value: Any, kind: str) -> str:
    return (
        f"config.json: {name} is {shown(value)}, which changes what a model computes, and it is no part of a {kind} "
        "model here: what would be read is not the model that these weights are of. Give one without that field; "
        "remove it if it says nothing true of the weights"
    )
