"""Llama, and what all Llama-shaped families share: separate projections, RMSNorm, RoPE, a gated MLP."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from qectomy.errors import CheckpointError, shown
from qectomy.models.config_checks import check_activation, check_epsilon, check_share
from qectomy.models.config_fields import ROPE_BESIDE, ROPE_FIELDS, check_rope
from qectomy.models.family import Dimensions, Family, LayerRoles, LinearView, Shapes, flag, size, variant

if TYPE_CHECKING:
    from qectomy.models.query_maps import QueryMapSpec

LLAMA_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("head_dim", "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_dropout"),
    *(*ROPE_FIELDS, *ROPE_BESIDE),
)
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


@dataclass(frozen=True, kw_only=True)
class LlamaFamily(Family):
    """A Llama-shaped family: separate projections, RMSNorm, RoPE, a gated MLP."""

    modeling: str = "modeling_qectomy_llama"
    roles: LayerRoles = LLAMA_ROLES
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
    biases: Literal["as config.json says", "none", "of q, k and v"] = "as config.json says"
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
        says = self.biases == "as config.json says"
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
            attention_bias=self.biases == "of q, k and v" or (says and flag(fields, "attention_bias")),
            output_bias=says and flag(fields, "attention_bias"),
            mlp_bias=says and flag(fields, "mlp_bias"),
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
            "self_attn.o_proj": (dims.d_model, n_query, dims.output_bias),
            "mlp.gate_proj": (dims.d_mlp, dims.d_model, dims.mlp_bias),
            "mlp.up_proj": (dims.d_mlp, dims.d_model, dims.mlp_bias),
            "mlp.down_proj": (dims.d_model, dims.d_mlp, dims.mlp_bias),
        }
        if spec.name != "dense":
            del projections["self_attn.q_proj"]
        if spec.value == "gauge":  # its bias lies in W_O's, where that has one
            bias = dims.attention_bias and not dims.output_bias
            projections["self_attn.v_proj"] = (n_key, dims.d_model - dims.d_head, bias)
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
        rope_type, known = config.rope_parameters["rope_type"], ("default", *ROPE_INIT_FUNCTIONS)
        if rope_type not in known:
            raise ValueError(f"rope_type {shown(rope_type)} is unknown; known: {', '.join(known)}")
        with torch.device("cpu"):  # whatever device the caller builds on
            frequencies = self.rotary(config).inv_freq
        d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if frequencies.shape != (d_head // 2,) or not frequencies.isfinite().all():
            raise ValueError(f"rope_parameters do not give {d_head // 2} finite frequencies")

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


def _rms_norm(module: Any, x: Any) -> Any:
    return x * (x.square().mean(-1, keepdim=True) + module.variance_epsilon).rsqrt() * module.weight


def _reach(positions: Any) -> int:
    """Return how far RoPE was trained, 2048 where config.json does not say: no shape, only the default window."""
    told = isinstance(positions, int) and not isinstance(positions, bool) and positions > 0
    return positions if told else 2048


FAMILY = LlamaFamily(
    model_type="llama",
    class_stem="Llama",
    fields=(*LLAMA_FIELDS, "attention_bias", "mlp_bias", "pretraining_tp"),
)
