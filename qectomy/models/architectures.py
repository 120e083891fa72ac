"""The one place that knows the model families. Everything else speaks of roles.

A family says which tensors its checkpoints hold, what each projection's orientation is, and which classes of
transformers (for the original) and of `modeling_qectomy_*` (for the reduced model) run a layer. To add one,
write an entry and put it in `FAMILIES`. Torch and transformers are imported only inside methods.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from qectomy.errors import CheckpointError, UnsupportedArchitecture, shown
from qectomy.models.config_fields import ROPE_BESIDE, ROPE_FIELDS, check_rope
from qectomy.models.family import Dimensions, Family, LayerRoles, LinearView, Orientation, Shapes, flag, size, variant

if TYPE_CHECKING:
    from qectomy.models.query_maps import QueryMapSpec

LLAMA_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_dropout"),
    *(*ROPE_FIELDS, *ROPE_BESIDE),
)
GPT2_FIELDS = (
    *("n_embd", "n_inner", "n_layer", "n_head", "n_positions", "n_ctx"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),  # the same, named anew
    *("activation_function", "layer_norm_epsilon", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
)


@dataclass(frozen=True, kw_only=True)
class LlamaFamily(Family):
    """A Llama-shaped family: separate projections, RMSNorm, RoPE, a gated MLP."""

    tokenizer_class: str = "LlamaTokenizer"
    vocabularies: tuple[str, ...] = ("tokenizer.model",)  # a tokenizer.json may be of any kind
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm"
    base_prefix: str = "model."
    layer_prefix: str = "model.layers.{}."
    rotary_module: str | None = "model.rotary_emb"
    ignored_suffixes: tuple[str, ...] = (".rotary_emb.inv_freq",)
    norm_name: str = "RMSNorm"
    mlx_modeling: str | None = "mlx_qectomy_llama"
    has_attention_bias: bool = True
    has_sliding_window: bool = False  # Llama's config keeps such a field, and its attention ignores it
    defaults: tuple[tuple[str, int], ...] = ()

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        fields = {**dict(self.defaults), **{k: v for k, v in config.items() if v is not None}}
        d_model = size(fields, "hidden_size")
        n_heads = size(fields, "num_attention_heads")
        n_kv_heads = size(fields, "num_key_value_heads", n_heads)
        d_head = size(fields, "head_dim", d_model // n_heads)
        if n_heads % n_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}"
            )
        if d_head % 2:
            raise CheckpointError(f"config.json: head_dim {d_head} is odd; RoPE turns channels in pairs")
        return Dimensions(
            n_layers=size(fields, "num_hidden_layers"),
            d_model=d_model,
            d_mlp=size(fields, "intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            vocab_size=size(fields, "vocab_size"),
            n_positions=_reach(fields.get("max_position_embeddings")),
            tied=flag(fields, "tie_word_embeddings"),
            attention_bias=self.has_attention_bias and flag(fields, "attention_bias"),
            mlp_bias=self.has_attention_bias and flag(fields, "mlp_bias"),
            **variant(fields),
        )

    def check_fields(self, config: dict[str, Any]) -> None:
        check_rope(config)

    def shortened(self, config: dict[str, Any], n_layers: int) -> dict[str, Any]:
        return config | {"num_hidden_layers": n_layers}

    def layer_shapes(self, dims: Dimensions, spec: "QueryMapSpec") -> Shapes:
        n_query, n_key = dims.n_heads * dims.d_head, dims.n_kv_heads * dims.d_head
        projections = {
            "self_attn.q_proj": (n_query, dims.d_model, dims.attention_bias),
            "self_attn.k_proj": (n_key, dims.d_model, dims.attention_bias),
            "self_attn.v_proj": (n_key, dims.d_model, dims.attention_bias),
            "self_attn.o_proj": (dims.d_model, n_query, dims.attention_bias),
            "mlp.gate_proj": (dims.d_mlp, dims.d_model, dims.mlp_bias),
            "mlp.up_proj": (dims.d_mlp, dims.d_model, dims.mlp_bias),
            "mlp.down_proj": (dims.d_model, dims.d_mlp, dims.mlp_bias),
        }
        if spec.name != "dense":
            del projections["self_attn.q_proj"]
        if spec.value == "gauge":  # its bias lies in W_O's
            projections["self_attn.v_proj"] = (n_key, dims.d_model - dims.d_head, False)
        if spec.output == "merged":
            del projections["self_attn.o_proj"]
        shapes: Shapes = {}
        if spec.value == "gauge":
            shapes["self_attn.v_proj.pivots"] = (dims.n_kv_heads, dims.d_head)
        for name, (n_out, n_in, bias) in projections.items():
            shapes[f"{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{name}.bias"] = (n_out,)
        for norm in (self.roles.attention_norm, self.roles.mlp_norm):
            shapes |= self.norm_shapes(norm, dims)
        return shapes

    def check_config(self, config: Any) -> None:
        import torch
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        check_activation("hidden_act", config.hidden_act)
        check_epsilon("rms_norm_eps", config.rms_norm_eps)
        if config.attention_dropout is not None:  # as Llama's may be
            check_share("attention_dropout", config.attention_dropout)
        if (window := self.sliding_window(config)) is not None and not 0 < window < 2**31:
            raise ValueError(f"sliding_window must be a positive whole number or null, got {shown(window)}")
        rope_type, known = config.rope_parameters["rope_type"], ("default", *ROPE_INIT_FUNCTIONS)
        if rope_type not in known:
            raise ValueError(f"rope_type {shown(rope_type)} is unknown; known: {', '.join(known)}")
        with torch.device("cpu"):  # whatever device the caller builds on
            frequencies = self.rotary(config).inv_freq
        if frequencies.shape != (config.head_dim // 2,) or not frequencies.isfinite().all():
            raise ValueError(f"rope_parameters do not give {config.head_dim // 2} finite frequencies")

    def older_fields(self, config: Any) -> dict[str, Any]:
        # transformers 5 writes rope_parameters alone, and 4.57 then falls back to theta 10000 without a word.
        parameters = config.rope_parameters
        if not isinstance(parameters, dict) or "rope_theta" not in parameters:
            return {}
        fields = {"rope_parameters": parameters, "rope_theta": parameters["rope_theta"]}
        if parameters.get("rope_type", "default") != "default":
            fields["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
        return fields

    def stock_layer(self, config: Any, layer: int) -> Any:
        return getattr(self._stock_module(), f"{self.class_stem}DecoderLayer")(config, layer)

    def reduced_layer(self, config: Any, layer: int) -> Any:
        return getattr(self._reduced_module(), f"Reduced{self.class_stem}DecoderLayer")(config, layer)

    def rotary(self, config: Any) -> Any:
        return getattr(self._stock_module(), f"{self.class_stem}RotaryEmbedding")(config=config)

    def apply_rotary(self, heads: Any, cos: Any, sin: Any) -> Any:
        return self._stock_module().apply_rotary_pos_emb(heads, heads[:, :1], cos, sin)[0]

    def norm(self, config: Any) -> Any:
        return getattr(self._stock_module(), f"{self.class_stem}RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)

    def in_own_type_(self, model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.forward = partial(_rms_norm, module)

    def sliding_window(self, config: Any) -> int | None:
        return getattr(config, "sliding_window", None) if self.has_sliding_window else None


@dataclass(frozen=True, kw_only=True)
class GPT2Family(Family):
    """GPT-2: one fused Conv1D for queries, keys and values, LayerNorm with a shift, learned positions, no RoPE."""

    causal_suffix: str = "LMHeadModel"
    fields: tuple[str, ...] = GPT2_FIELDS
    tokenizer_class: str = "GPT2Tokenizer"
    vocabularies: tuple[str, ...] = ("tokenizer.json", "vocab.json")
    embedding: str = "transformer.wte.weight"
    positions: str | None = "transformer.wpe.weight"
    final_norm: str = "transformer.ln_f"
    layer_prefix: str = "transformer.h.{}."
    base_prefix: str = "transformer."
    ignored_suffixes: tuple[str, ...] = (".attn.bias", ".attn.masked_bias")
    folds_kv_bias: bool = True
    norm_name: str = "LayerNorm"

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        fields = {k: v for k, v in config.items() if v is not None}
        if flag(fields, "add_cross_attention"):
            raise UnsupportedArchitecture("the checkpoint has cross-attention (add_cross_attention), not only its own")
        d_model, n_heads = size(fields, "n_embd", 768), size(fields, "n_head", 12)
        without = variant(fields)
        if d_model % n_heads:
            raise CheckpointError(f"config.json: n_embd {d_model} is not a multiple of n_head {n_heads}")
        return Dimensions(
            n_layers=size(fields, "n_layer", 12),
            d_model=d_model,
            d_mlp=size(fields, "n_inner", 4 * d_model),
            n_heads=n_heads,
            n_kv_heads=n_heads,
            d_head=d_model // n_heads,
            vocab_size=size(fields, "vocab_size", 50257),
            tied=flag(fields, "tie_word_embeddings", True),
            attention_bias=True,
            mlp_bias=True,
            n_positions=size(fields, "n_positions", 1024),
            rope=False,
            norm_shift=without["norms"],
            absorbs_query_bias=without["norms"] or not without["shared_layers"],
            **without,
        )

    def shortened(self, config: dict[str, Any], n_layers: int) -> dict[str, Any]:
        return {name: value for name, value in config.items() if name != "num_hidden_layers"} | {"n_layer": n_layers}

    def layer_shapes(self, dims: Dimensions, spec: "QueryMapSpec") -> Shapes:
        d_model, gauged = dims.d_model, len(spec.gauged)
        parts = 3 if spec.name == "dense" else 1 if "value" in spec.gauged else 2
        projections = {
            "attn.c_attn": (d_model, parts * d_model),
            "attn.c_proj": (d_model, d_model),
            "mlp.c_fc": (d_model, dims.d_mlp),
            "mlp.c_proj": (dims.d_mlp, d_model),
        }
        if spec.output == "merged":
            del projections["attn.c_proj"]
        shapes: Shapes = {}
        for name, (n_in, n_out) in projections.items():
            shapes[f"{name}.weight"] = (n_in, n_out)
            if name != "attn.c_attn" or spec.name == "dense":
                shapes[f"{name}.bias"] = (n_out,)
        if gauged:
            gauge = self.roles.gauge
            shapes[f"{gauge}.pivots"] = (gauged * dims.n_heads, dims.d_head)
            shapes[f"{gauge}.weight"] = (d_model - dims.d_head, gauged * d_model)
        if spec.name == "gauge":
            shapes[f"{self.roles.gauge}.bias"] = (d_model,)
        for norm in (self.roles.attention_norm, self.roles.mlp_norm):
            shapes |= self.norm_shapes(norm, dims)
        return shapes

    def check_config(self, config: Any) -> None:
        check_activation("activation_function", config.activation_function)
        check_epsilon("layer_norm_epsilon", config.layer_norm_epsilon)
        for field in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
            check_share(field, getattr(config, field))
        scale = getattr(config, "softmax_scale", None)
        if scale is not None and not (isinstance(scale, int | float) and 0 < scale < float("inf")):
            raise ValueError(f"softmax_scale must be a positive number, got {shown(scale)}")

    def query_factor(self, config: Any, layer: int) -> float:
        default = (config.n_embd // config.n_head) ** -0.5
        scale = default if config.scale_attn_weights else 1.0
        if config.softmax_scale is not None:
            scale = float(config.softmax_scale)
        return scale / default / (layer + 1 if config.scale_attn_by_inverse_layer_idx else 1)

    def stock_fields(self, dims: Dimensions) -> dict[str, Any]:
        # llama.cpp and CTranslate2 always scale by 1/√K; llama.cpp asks for n_ctx, which transformers 5 does not write.
        scale = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        return {"n_ctx": dims.n_positions, **scale}

    def stock_layer(self, config: Any, layer: int) -> Any:
        return self._stock_module().GPT2Block(config, layer)

    def reduced_layer(self, config: Any, layer: int) -> Any:
        return self._reduced_module().ReducedGPT2Block(config, layer)

    def norm(self, config: Any) -> Any:
        from torch import nn

        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)


def _rms_norm(module: Any, x: Any) -> Any:
    return x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight


def _reach(positions: Any) -> int:
    """Return how far RoPE was trained, 2048 where config.json does not say: no shape, only the default window."""
    told = isinstance(positions, int) and not isinstance(positions, bool) and positions > 0
    return positions if told else 2048


def check_activation(field: str, name: Any) -> None:
    """Raise ValueError if transformers does not know an activation."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"{field} {shown(name)} is not an activation that transformers knows")


def check_epsilon(field: str, value: Any) -> None:
    """Raise ValueError unless this can be added to a variance."""
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{field} must be a number of 0 or more, got {shown(value)}")


def check_share(field: str, value: Any) -> None:
    """Raise ValueError unless this can be the share of what a dropout drops."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{field} must be a number from 0 to 1, got {shown(value)}")


LLAMA_ROLES = LayerRoles(
    attention="self_attn",
    attention_norm="input_layernorm",
    query=LinearView("self_attn.q_proj"),
    key=LinearView("self_attn.k_proj"),
    value=LinearView("self_attn.v_proj"),
    output=LinearView("self_attn.o_proj"),
    mlp_norm="post_attention_layernorm",
    mlp="mlp",
    mlp_readers=(LinearView("mlp.gate_proj"), LinearView("mlp.up_proj")),
    mlp_out=LinearView("mlp.down_proj"),
    query_map="self_attn.query",
    reduced_key=LinearView("self_attn.k_proj"),
    reduced_value=LinearView("self_attn.v_proj"),
    gauge="self_attn.v_proj",
)

GPT2_ROLES = LayerRoles(
    attention="attn",
    attention_norm="ln_1",
    query=LinearView("attn.c_attn", Orientation.IN_OUT, (0, 3)),
    key=LinearView("attn.c_attn", Orientation.IN_OUT, (1, 3)),
    value=LinearView("attn.c_attn", Orientation.IN_OUT, (2, 3)),
    output=LinearView("attn.c_proj", Orientation.IN_OUT),
    mlp_norm="ln_2",
    mlp="mlp",
    mlp_readers=(LinearView("mlp.c_fc", Orientation.IN_OUT),),
    mlp_out=LinearView("mlp.c_proj", Orientation.IN_OUT),
    query_map="attn.c_attn.query",
    reduced_key=LinearView("attn.c_attn", Orientation.IN_OUT, (0, 2)),
    reduced_value=LinearView("attn.c_attn", Orientation.IN_OUT, (1, 2)),
    gauge="attn.c_attn.gauge",
)

FAMILIES: dict[str, Family] = {
    "gpt2": GPT2Family(model_type="gpt2", class_stem="GPT2", modeling="modeling_qectomy_gpt2", roles=GPT2_ROLES),
    "llama": LlamaFamily(
        model_type="llama",
        class_stem="Llama",
        modeling="modeling_qectomy_llama",
        roles=LLAMA_ROLES,
        fields=(*LLAMA_FIELDS, "attention_bias", "mlp_bias", "pretraining_tp"),
    ),
    "mistral": LlamaFamily(
        model_type="mistral",
        class_stem="Mistral",
        modeling="modeling_qectomy_llama",
        roles=LLAMA_ROLES,
        has_attention_bias=False,
        fields=(*LLAMA_FIELDS, "sliding_window"),
        has_sliding_window=True,
        defaults=(("num_key_value_heads", 8),),
    ),
}

QK_NORM_TYPES = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "olmo3", "cohere2", "chameleon")


def find_family(config: dict[str, Any]) -> Family:
    """Return the family of an original checkpoint's config. Raises UnsupportedArchitecture saying why not."""
    model_type = config.get("model_type")
    known = ", ".join(FAMILIES)
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type.startswith("qectomy_"):
        maps = [config.get(field) or ["dense"] for field in ("value_maps", "output_maps")] + [config.get("query_maps")]
        if all(isinstance(names, list) and names and all(name == "dense" for name in names) for names in maps):
            return find_reduced_family(config)  # whole, though its class is ours: without norms or skips, say
        raise UnsupportedArchitecture(
            f"model_type {shown(model_type)}: this checkpoint is already reduced. Give the original one, or use "
            "`qectomy materialize` to write W_Q back."
        )
    if model_type in QK_NORM_TYPES:
        raise UnsupportedArchitecture(
            f"model_type {shown(model_type)} normalises queries after W_Q (QK-norm): no linear query map can stand in "
            f"for it. Supported types: {known}."
        )
    raise UnsupportedArchitecture(f"model_type {shown(model_type)} is not supported; supported types: {known}")


def find_reduced_family(config: dict[str, Any]) -> Family:
    """Return the family of a reduced checkpoint's config. Raises UnsupportedArchitecture for anything else."""
    for family in FAMILIES.values():
        if config.get("model_type") == family.reduced_model_type:
            return family
    known = ", ".join(family.reduced_model_type for family in FAMILIES.values())
    raise UnsupportedArchitecture(
        f"model_type {shown(config.get('model_type'))} is not a checkpoint that qectomy reduced; those are: {known}"
    )
