"""GPT-2."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qectomy.errors import CheckpointError, UnsupportedArchitecture, shown
from qectomy.models.config_checks import check_activation, check_epsilon, check_share
from qectomy.models.family import Dimensions, Family, LayerRoles, LinearView, Orientation, Shapes, flag, size, variant

if TYPE_CHECKING:
    from qectomy.models.query_maps import QueryMapSpec

GPT2_FIELDS = (
    *("n_embd", "n_inner", "n_layer", "n_head", "n_positions", "n_ctx"),
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),  # the same, named anew
    *("activation_function", "layer_norm_epsilon", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
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
            output_bias=True,
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


FAMILY = GPT2Family(model_type="gpt2", class_stem="GPT2", modeling="modeling_qectomy_gpt2", roles=GPT2_ROLES)
