"""What a model family has to say of itself; each file of `families/` says it for one.

Torch and transformers are imported only inside methods. D d_model, H n_heads, G n_kv_heads, K d_head.
"""

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from qectomy.errors import CheckpointError, shown

if TYPE_CHECKING:
    from qectomy.models.query_maps import QueryMapSpec

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
    part: tuple[int, int] = (0, 1)  # which of how many equal parts of a fused projection's outputs


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
    reduced_key: LinearView  # where a layer without W_Q stores W_K ...
    reduced_value: LinearView  # ... and W_V
    gauge: str  # the module of the projections whose heads have an identity block

    def views(self, spec: "QueryMapSpec") -> "dict[str, LinearView]":
        """Return where a layer of these maps stores W_K and W_V, and W_Q if it is dense or in the gauge."""
        key, value = (self.key, self.value) if spec.name == "dense" else (self.reduced_key, self.reduced_value)
        views = {"key": key, "value": value} | ({"query": self.query} if spec.name == "dense" else {})
        gauged = spec.gauged
        if "value" in gauged and key.module == value.module:
            views["key"] = LinearView(key.module, key.orientation)
        for place, role in enumerate(gauged):
            views[role] = LinearView(self.gauge, key.orientation, (place, len(gauged)))
        return views


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """The sizes of a model, in the paper's words, and what it adds to them."""

    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    vocab_size: int
    tied: bool
    attention_bias: bool  # of queries, keys and values
    output_bias: bool  # of W_O
    mlp_bias: bool
    n_positions: int  # that the model was made for: the rows of a learned table, or as far as RoPE was trained
    rope: bool = True
    norm_shift: bool = False  # LayerNorm's
    norms: bool = True
    attention_skip: bool = True
    mlp_skip: bool = True
    shared_layers: bool = False  # every layer computes with the first one's weights
    absorbs_query_bias: bool = False  # in a norm's shift or a writer's bias, where queries are slices of x̂

    @property
    def stock(self) -> bool:
        """Whether transformers' own class of the family can be this model."""
        return self.norms and self.attention_skip and self.mlp_skip and not self.shared_layers

    @property
    def untying_pays(self) -> bool:
        """Whether a W_Q has more parameters than a head of its own beside the embedding."""
        return self.n_heads * self.d_head > self.vocab_size

    @property
    def all_gauge(self) -> bool:
        """Whether any W_Q is a gauge of the heads: there is one head, and no RoPE."""
        return self.n_heads == 1 and not self.rope

    @property
    def gauge_pays(self) -> bool:
        """Whether a head's identity block has more numbers than channels it stands at, and is not all of its W."""
        return 1 < self.d_head < self.d_model

    @property
    def n_stored(self) -> int:
        """How many layers have weights of their own; they are the first ones."""
        return 1 if self.shared_layers else self.n_layers

    def stored_layer(self, layer: int) -> int:
        """The layer under whose name a layer's weights are stored."""
        return 0 if self.shared_layers else layer


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family: names, shapes and classes."""

    model_type: str
    class_stem: str  # Llama in LlamaForCausalLM
    causal_suffix: str = "ForCausalLM"
    modeling: str  # the stand-alone model file, without .py
    mlx_modeling: str | None = None  # that of mlx-lm, where there is one
    roles: LayerRoles
    embedding: str
    positions: str | None = None  # the learned position table
    final_norm: str  # the module
    head: str = "lm_head.weight"
    layer_prefix: str
    rotary_module: str | None = None
    base_prefix: str  # of the base model's tensors; files saved from a base model lack it
    ignored_suffixes: tuple[str, ...] = ()  # buffers that old checkpoints stored
    fields: tuple[str, ...]  # of config.json, beside those that all families have
    tokenizer_class: str  # of transformers, where the tokenizer's own files name none ...
    vocabularies: tuple[str, ...]  # ... and are these
    keeps_tokenizer_class: bool = True  # transformers loads the one that the tokenizer's files name
    folds_kv_bias: bool = False  # a layer without W_Q stores no bias of W_K and W_V
    norm_name: str  # as in "RMSNorm"

    @property
    def reduced_model_type(self) -> str:
        return f"qectomy_{self.model_type}"

    def dimensions(self, config: dict[str, Any]) -> Dimensions:
        """Read the sizes from a parsed config.json. Raises CheckpointError naming the field at fault."""
        raise NotImplementedError

    def shortened(self, config: dict[str, Any], n_layers: int) -> dict[str, Any]:
        """Return the parsed config.json of a model that has only the first so many layers."""
        raise NotImplementedError

    def layer_shapes(self, dims: Dimensions, spec: "QueryMapSpec") -> Shapes:
        """Return {name inside the layer: shape} of one layer of these maps, without what its query map stores."""
        raise NotImplementedError

    def is_index(self, name: str) -> bool:
        """Whether a tensor holds channel numbers, not weights."""
        return name.endswith((f"{self.roles.query_map}.index", f"{self.roles.gauge}.pivots"))

    def norm_shapes(self, name: str, dims: Dimensions) -> Shapes:
        """Return {tensor name: shape} of a norm, if the model has norms."""
        if not dims.norms:
            return {}
        shapes: Shapes = {f"{name}.weight": (dims.d_model,)}
        return shapes | ({f"{name}.bias": (dims.d_model,)} if dims.norm_shift else {})

    def outer_shapes(self, dims: Dimensions) -> Shapes:
        """Return {tensor name: shape} of what lies outside the layers; a tied head is not listed."""
        shapes: Shapes = {self.embedding: (dims.vocab_size, dims.d_model)}
        if self.positions is not None:
            shapes[self.positions] = (dims.n_positions, dims.d_model)
        shapes |= self.norm_shapes(self.final_norm, dims)
        if not dims.tied:
            shapes[self.head] = (dims.vocab_size, dims.d_model)
        return shapes

    def prefix(self, layer: int) -> str:
        return self.layer_prefix.format(layer)

    def full_names(self, stored: Collection[str], expected: Collection[str]) -> dict[str, str]:
        """Return {name in the causal model: name in the file} of a checkpoint's tensors, as transformers finds them.

        It takes the base model's prefix off a name, or puts it before one, where the model has a tensor of that name:
        files saved from a base model lack it, and wrappers double it. Raises CheckpointError for two of one tensor.
        """
        found: dict[str, str] = {}
        for name in stored:
            full, bare = self.base_prefix + name, name.removeprefix(self.base_prefix)
            full = bare if bare != name and bare in expected else full if full in expected else name
            if full in found:
                raise CheckpointError(
                    f"tensors {shown(found[full])} and {shown(name)} are two of the model's {full}, and nothing says "
                    "which one is meant. Save the checkpoint anew with one of them"
                )
            found[full] = name
        return found

    def check_fields(self, config: dict[str, Any]) -> None:
        """Raise CheckpointError where a parsed config.json says one thing under two names, and not the same."""

    def older_fields(self, config: Any) -> dict[str, Any]:
        """Return what config.json must say once more for older transformers; `config` is transformers' object."""
        return {}

    def check_config(self, config: Any) -> None:
        """Raise ValueError for what transformers takes in silence and fails on later; `config` is its object."""
        raise NotImplementedError

    def query_factor(self, config: Any, layer: int) -> float:
        """The factor on a layer's W_Q with which the family's default softmax scale gives a reduced model's logits."""
        return 1.0

    def stock_fields(self, dims: Dimensions) -> dict[str, Any]:
        """Return what a stock config.json must say beside, or in place of, the reduced one's for other engines."""
        return {}

    # From here on torch and transformers are loaded.

    def config_class(self, reduced: bool = False) -> Any:
        return self._class("Config", reduced)

    def base_class(self, reduced: bool = False) -> Any:
        return self._class("Model", reduced)

    def causal_class(self, reduced: bool = False) -> Any:
        return self._class("ForCausalLM" if reduced else self.causal_suffix, reduced)

    def stock_layer(self, config: Any, layer: int) -> Any:
        """One decoder layer of the original model, as transformers runs it."""
        raise NotImplementedError

    def reduced_layer(self, config: Any, layer: int) -> Any:
        """One decoder layer of the reduced model: the very class that is shipped."""
        raise NotImplementedError

    def rotary(self, config: Any) -> Any | None:
        """The module (hidden, position_ids) -> (cos, sin) of the config's RoPE type; None: no RoPE."""
        return None

    def apply_rotary(self, heads: Any, cos: Any, sin: Any) -> Any:
        """Return heads (B, *, R, K) turned by cos and sin (1, R, K)."""
        raise NotImplementedError

    def norm(self, config: Any) -> Any:
        """The final norm, without its weights."""
        raise NotImplementedError

    def in_own_type_(self, model: Any) -> None:
        """Let a model's norms compute in the type of what they read, where transformers computes in float32."""

    def sliding_window(self, config: Any, layer: int) -> int | None:
        """How many positions back a layer's queries may look, themselves included; None: all."""
        return None

    def _stock_module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")

    def _reduced_module(self) -> Any:
        return importlib.import_module(f"qectomy.modeling.{self.modeling}")

    def _class(self, kind: str, reduced: bool) -> Any:
        if reduced:
            return getattr(self._reduced_module(), f"Qectomy{self.class_stem}{kind}")
        where = importlib.import_module(f"transformers.models.{self.model_type}")
        return getattr(where, f"{self.class_stem}{kind}")


def variant(fields: dict[str, Any]) -> dict[str, bool]:
    """Return what a config of ours leaves out of its family's stock model, or shares; a stock config says nothing."""
    ours = str(fields.get("model_type")).startswith("qectomy_")
    defaults = {"norms": True, "attention_skip": True, "mlp_skip": True, "shared_layers": False}
    return {name: flag(fields if ours else {}, name, default) for name, default in defaults.items()}


def size(fields: dict[str, Any], name: str, default: int | None = None, where: str = "config.json") -> int:
    """Return a positive whole number of a parsed config. Raises CheckpointError naming it otherwise."""
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise CheckpointError(f"{where}: {name} must be a positive whole number, got {shown(value)}")
    return value


def flag(fields: dict[str, Any], name: str, default: bool = False, where: str = "config.json") -> bool:
    """Return true or false of a parsed config. Raises CheckpointError naming it otherwise."""
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{where}: {name} must be true or false, got {shown(value)}")
    return value
