"""The one place that knows the model families. Everything else speaks of roles.

A family says which tensors its checkpoints hold, what each projection's orientation is, and which classes of
transformers (for the original) and of `modeling_qectomy_*` (for the reduced model) run a layer. To add one,
write an entry and put it in `FAMILIES`. Torch and transformers are imported only inside methods.
"""

import importlib
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qectomy.errors import CheckpointError, UnsupportedArchitecture

Shapes = dict[str, tuple[int, ...]]


class Orientation(Enum):
    """How a stored projection matrix is laid out."""

    OUT_IN = "nn.Linear: (out, in)"
    IN_OUT = "Conv1D: (in, out)"


@dataclass(frozen=True)
class LinearView:
    """One logical projection. Its orientation is declared here, never guessed from shape."""

    module: str  # path inside the layer, as in "self_attn.q_proj"
    orientation: Orientation = Orientation.OUT_IN
    rows: tuple[int, int] | None = None  # outputs [start, stop) of a fused tensor


@dataclass(frozen=True, kw_only=True)
class LayerRoles:
    """Where a layer keeps what the surgery touches."""

    attention: str  # the attention module
    attention_norm: str  # the norm whose output x̂ the projections read
    query: LinearView
    key: LinearView
    value: LinearView
    output: LinearView
    mlp_norm: str
    mlp: str
    mlp_readers: tuple[LinearView, ...]
    mlp_out: LinearView
    query_map: str  # the module that stands in W_Q's place


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The sizes of a model, in the paper's words."""

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab_size: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool


@dataclass(frozen=True, kw_only=True)
class Family:
    """A Llama-shaped family: separate projections, RMSNorm, RoPE, a gated MLP."""

    model_type: str
    class_stem: str  # Llama in LlamaForCausalLM
    modeling: str  # the stand-alone model file, without .py
    roles: LayerRoles
    embedding: str = "model.embed_tokens.weight"
    final_norm: str = "model.norm.weight"
    head: str = "lm_head.weight"
    layer_prefix: str = "model.layers.{}."
    rotary_module: str = "model.rotary_emb"
    ignored_suffixes: tuple[str, ...] = (".rotary_emb.inv_freq",)  # buffers that old checkpoints stored
    has_attention_bias: bool = True
    has_sliding_window: bool = False  # Llama's config keeps such a field, and its attention ignores it
    defaults: tuple[tuple[str, int], ...] = ()

    @property
    def reduced_model_type(self) -> str:
        return f"qectomy_{self.model_type}"

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        """Read the sizes from a parsed config.json. Raises CheckpointError naming the field at fault."""
        fields = {**dict(self.defaults), **{k: v for k, v in config.items() if v is not None}}
        d_model = _size(fields, "hidden_size")
        n_heads = _size(fields, "num_attention_heads")
        n_kv_heads = _size(fields, "num_key_value_heads", n_heads)
        d_head = _size(fields, "head_dim", d_model // n_heads)
        if n_heads % n_kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {n_heads} is not a multiple of num_key_value_heads {n_kv_heads}"
            )
        if d_head % 2:
            raise CheckpointError(f"config.json: head_dim {d_head} is odd; RoPE turns channels in pairs")
        return Dimensions(
            n_layers=_size(fields, "num_hidden_layers"),
            d_model=d_model,
            d_mlp=_size(fields, "intermediate_size"),
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            vocab_size=_size(fields, "vocab_size"),
            tied=_flag(fields, "tie_word_embeddings"),
            attention_bias=self.has_attention_bias and _flag(fields, "attention_bias"),
            mlp_bias=self.has_attention_bias and _flag(fields, "mlp_bias"),
        )

    def layer_shapes(self, dims: Dimensions) -> Shapes:
        """Return {name inside the layer: shape} of one original layer."""
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
        shapes: Shapes = {}
        for name, (n_out, n_in, bias) in projections.items():
            shapes[f"{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{name}.bias"] = (n_out,)
        shapes["input_layernorm.weight"] = (dims.d_model,)
        shapes["post_attention_layernorm.weight"] = (dims.d_model,)
        return shapes

    def outer_shapes(self, dims: Dimensions) -> Shapes:
        """Return {tensor name: shape} of what lies outside the layers; a tied head is not listed."""
        shapes: Shapes = {self.embedding: (dims.vocab_size, dims.d_model), self.final_norm: (dims.d_model,)}
        if not dims.tied:
            shapes[self.head] = (dims.vocab_size, dims.d_model)
        return shapes

    def prefix(self, layer: int) -> str:
        return self.layer_prefix.format(layer)

    def query_tensors(self, dims: Dimensions) -> list[str]:
        """Names inside a layer of the tensors that go when W_Q goes."""
        return [name for name in self.layer_shapes(dims) if name.startswith(f"{self.roles.query.module}.")]

    # From here on torch and transformers are loaded.

    def config_class(self, reduced: bool = False) -> Any:
        return self._class("Config", reduced)

    def base_class(self, reduced: bool = False) -> Any:
        return self._class("Model", reduced)

    def causal_class(self, reduced: bool = False) -> Any:
        return self._class("ForCausalLM", reduced)

    def stock_layer(self, config: Any, layer: int) -> Any:
        """One decoder layer of the original model, as transformers runs it."""
        return getattr(self._stock_module(), f"{self.class_stem}DecoderLayer")(config, layer)

    def reduced_layer(self, config: Any, layer: int) -> Any:
        """One decoder layer of the reduced model: the very class that is shipped."""
        return getattr(self._reduced_module(), f"Reduced{self.class_stem}DecoderLayer")(config, layer)

    def rotary(self, config: Any) -> Any:
        """The module (hidden, position_ids) -> (cos, sin) of the config's RoPE type."""
        return getattr(self._stock_module(), f"{self.class_stem}RotaryEmbedding")(config=config)

    def apply_rotary(self, heads: Any, cos: Any, sin: Any) -> Any:
        """Return heads (B, *, R, K) turned by cos and sin (1, R, K)."""
        return self._stock_module().apply_rotary_pos_emb(heads, heads[:, :1], cos, sin)[0]

    def norm(self, config: Any) -> Any:
        """The final norm, without its weight."""
        return getattr(self._stock_module(), f"{self.class_stem}RMSNorm")(config.hidden_size, eps=config.rms_norm_eps)

    def sliding_window(self, config: Any) -> int | None:
        """How many positions back a query may look, itself included; None: all."""
        return getattr(config, "sliding_window", None) if self.has_sliding_window else None

    def _stock_module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")

    def _reduced_module(self) -> Any:
        return importlib.import_module(f"qectomy.surgery.{self.modeling}")

    def _class(self, kind: str, reduced: bool) -> Any:
        if reduced:
            return getattr(self._reduced_module(), f"Qectomy{self.class_stem}{kind}")
        where = importlib.import_module(f"transformers.models.{self.model_type}")
        return getattr(where, f"{self.class_stem}{kind}")


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
)

FAMILIES: dict[str, Family] = {
    "llama": Family(model_type="llama", class_stem="Llama", modeling="modeling_qectomy_llama", roles=LLAMA_ROLES),
    "mistral": Family(
        model_type="mistral",
        class_stem="Mistral",
        modeling="modeling_qectomy_llama",
        roles=LLAMA_ROLES,
        has_attention_bias=False,
        has_sliding_window=True,
        defaults=(("num_key_value_heads", 8),),
    ),
}

QK_NORM_TYPES = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "olmo3", "cohere2", "chameleon")


def find_family(config: dict[str, Any]) -> Family:
    """Return the family of an original checkpoint's config. Raises UnsupportedArchitecture saying why not."""
    model_type = config.get("model_type")
    known = ", ".join(FAMILIES)
    if config.get("quantization_config") is not None:
        raise UnsupportedArchitecture(
            "the checkpoint is quantized (config.json has a quantization_config); its weights cannot be refitted. "
            "Use the original float32, bfloat16 or float16 checkpoint."
        )
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type.startswith("qectomy_"):
        raise UnsupportedArchitecture(
            f"model_type {model_type!r}: this checkpoint is already reduced. Give the original one, or use "
            "`qectomy materialize` to write W_Q back."
        )
    if model_type in QK_NORM_TYPES:
        raise UnsupportedArchitecture(
            f"model_type {model_type!r} normalises queries after W_Q (QK-norm): no linear query map can stand in "
            f"for it. Supported types: {known}."
        )
    raise UnsupportedArchitecture(f"model_type {model_type!r} is not supported; supported types: {known}")


def find_reduced_family(config: dict[str, Any]) -> Family:
    """Return the family of a reduced checkpoint's config. Raises UnsupportedArchitecture for anything else."""
    for family in FAMILIES.values():
        if config.get("model_type") == family.reduced_model_type:
            return family
    known = ", ".join(family.reduced_model_type for family in FAMILIES.values())
    raise UnsupportedArchitecture(
        f"model_type {config.get('model_type')!r} is not a checkpoint that qectomy reduced; those are: {known}"
    )


def _size(fields: dict[str, Any], name: str, default: int | None = None) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {name} must be a positive whole number, got {value!r}")
    return value


def _flag(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, got {value!r}")
    return value
