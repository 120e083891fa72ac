# mypy: ignore-errors
"""Llama and Mistral without W_Q for mlx-lm: the file that config.json's `model_file` names.

It stands alone: it imports only mlx, mlx_lm and the transformers that mlx_lm needs, so a folder that holds it loads
with `mlx_lm.load(folder, trust_remote_code=True)` where neither torch nor qectomy is installed. It computes what
modeling_qectomy_llama.py computes; what it cannot compute it refuses by name. Tensors keep the names of the file:

    identity       q = x̂                               nothing
    select         q = x̂[index] * gain                 query.index, query.gain
    key-shared     q_h = (x̂ W_K^g(h)) A_h              query.mix, the A_h (H, K, K)
    low-rank:R     q = x̂ * gain + (x̂ U) V              query.gain, query.down = Uᵀ (R, D), query.up = Vᵀ (H*K, R)
    dense          q = x̂ W_Q                           q_proj

mlx-lm quantises the embedding and the projections. What stands in W_Q's place is small and stays as it is.
Dimensions: B batch, T positions, D d_model, H n_heads, G n_kv_heads, K d_head, R rank.
"""

import hashlib
import re
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.models.llama import MLP
from mlx_lm.models.rope_utils import initialize_rope
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

logger = logging.get_logger("transformers.models.qectomy_llama")
MODEL_TYPES = ("qectomy_llama", "qectomy_mistral")

# What a config may say of each RoPE type that mlx-lm computes as transformers does. It takes longrope's long factors at
# every length, and passes over what is not listed here, such as yarn's attention_factor.
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
    "proportional": ("factor", "partial_rotary_factor"),
}

if find_spec("torch") is None:
    # mlx-lm hands its flag on to the tokenizer, for which transformers would run the folder's torch file only to read
    # config.json. A class that is known already is taken in that file's place; a tokenizer needs no more of it.
    for _model_type in MODEL_TYPES:
        _fields = {"model_type": _model_type, "__module__": "mlx_qectomy_llama"}
        AutoConfig.register(_model_type, type("ReducedConfig", (PreTrainedConfig,), _fields), exist_ok=True)


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of config.json that decide what is computed; defaults are those of transformers."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    head_dim: int | None = None
    num_key_value_heads: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    rope_theta: float = 10000.0
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = 4096
    query_maps: list[str] | None = None
    output_maps: list[str] | None = None
    index_sha256: list[str | None] | None = None
    norms: bool = True
    attention_skip: bool = True
    mlp_skip: bool = True
    shared_layers: bool = False

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        """Read a parsed config.json. Raises ValueError naming a field with which this file cannot run the model.

        `value_maps` leaves the dict, which mlx-lm saves beside converted weights, and so does what it says of gauged
        layers' channel numbers: `sanitize` has written gauges out.
        """
        values = params.pop("value_maps", None) or []
        if unknown := set(values) - {"dense", "gauge"}:
            raise ValueError(f"value_maps: unknown {sorted(unknown)[0]!r}; known: dense, gauge")
        args = super().from_dict(params)
        if values and len(values) != args.num_hidden_layers:
            raise ValueError(f"value_maps names {len(values)} layers, the model has {args.num_hidden_layers}")
        if args.index_sha256 and values:
            pairs = zip(args.index_sha256, values, strict=True)
            params["index_sha256"] = [None if name == "gauge" else digest for digest, name in pairs]
        return args

    def __post_init__(self) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        if self.model_type not in MODEL_TYPES:
            raise ValueError(f"model_type {self.model_type!r}; this file runs {' and '.join(MODEL_TYPES)}")
        if self.model_type == "qectomy_mistral":  # transformers' Mistral has no biases, whatever config.json says
            self.attention_bias = self.mlp_bias = False
        else:
            self.sliding_window = None  # and its Llama no window
        kept = dict(norms=True, attention_skip=True, mlp_skip=True, shared_layers=False, hidden_act="silu")
        for field, needed in kept.items():
            if getattr(self, field) != needed:
                raise ValueError(f"{field} is {getattr(self, field)!r}: mlx-lm cannot run this model, transformers can")
        if set(self.output_maps or ()) - {"dense"}:
            raise ValueError("output_maps: mlx-lm cannot run a model with merged W_O, transformers can")
        self.query_maps = self.query_maps or ["dense"] * self.num_hidden_layers
        if not isinstance(self.query_maps, list | tuple):
            raise ValueError(f"query_maps must be a list with a name for each layer, not {self.query_maps!r}")
        if len(self.query_maps) != self.num_hidden_layers:
            raise ValueError(f"query_maps names {len(self.query_maps)} layers, the model has {self.num_hidden_layers}")
        if len(self.index_sha256 or self.query_maps) != self.num_hidden_layers:
            told = len(self.index_sha256)
            raise ValueError(f"index_sha256 tells of {told} layers, the model has {self.num_hidden_layers}")


def build_rope(args: ModelArgs) -> nn.Module:
    """The rotation of heads (B, n, T, K). Raises ValueError where mlx-lm's angles are others than transformers'."""
    said = args.rope_scaling or args.rope_parameters or {}
    fields = {key: value for key, value in said.items() if value is not None}
    theta = fields.pop("rope_theta", args.rope_theta)
    older = fields.pop("type", "default")
    kind = fields.pop("rope_type", older)
    if kind not in ROPE_FIELDS:
        known = ", ".join(ROPE_FIELDS)
        raise ValueError(f"rope_type {kind!r}: mlx-lm does not compute it as transformers does; known: {known}")
    if unknown := set(fields) - set(ROPE_FIELDS[kind]):
        raise ValueError(
            f"rope_type {kind!r} with {sorted(unknown)[0]}: mlx-lm does not compute it as transformers does"
        )
    if kind == "proportional" and args.head_dim * fields.get("partial_rotary_factor", 1.0) % 2:
        raise ValueError("partial_rotary_factor times head_dim must be even: mlx-lm and transformers round differently")
    if "original_max_position_embeddings" in ROPE_FIELDS[kind]:
        fields.setdefault("original_max_position_embeddings", args.max_position_embeddings)
    return initialize_rope(args.head_dim, theta, False, {"rope_type": kind, **fields}, args.max_position_embeddings)


def split_heads(rows: mx.array, n_heads: int) -> mx.array:
    """(B, T, n*K) -> (B, n, T, K)."""
    return rows.reshape(*rows.shape[:2], n_heads, -1).transpose(0, 2, 1, 3)


class QueryMap(nn.Module):
    """What stands where W_Q stood: (x̂ (B, T, D), keys before RoPE (B, T, G*K)) -> queries (B, H, T, K)."""

    def __init__(self, args: ModelArgs, rank: int = 0):
        super().__init__()
        self.n_heads, self.n_kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.n_query = args.num_attention_heads * args.head_dim
        if args.attention_bias:
            self.bias = mx.zeros((self.n_query,))

    def __call__(self, hidden: mx.array, key: mx.array) -> mx.array:
        query = self.project(hidden, key)
        if "bias" in self:
            query = query + self.bias.reshape(self.n_heads, 1, -1)
        return query

    def project(self, hidden: mx.array, key: mx.array) -> mx.array:
        """The queries before the bias."""
        raise NotImplementedError

    def channels(self, hidden: mx.array) -> mx.array:
        """The first H*K channels of x̂, starting over where d_model is smaller."""
        times = -(-self.n_query // hidden.shape[-1])
        return (mx.concatenate([hidden] * times, axis=-1) if times > 1 else hidden)[..., : self.n_query]


class IdentityQuery(QueryMap):
    def project(self, hidden, key):
        return split_heads(self.channels(hidden), self.n_heads)


class SelectQuery(QueryMap):
    def __init__(self, args: ModelArgs, rank: int = 0):
        super().__init__(args)
        self.index = mx.zeros((self.n_query,), dtype=mx.int32)
        self.gain = mx.ones((self.n_query,))

    def project(self, hidden, key):
        return split_heads(mx.take(hidden, self.index, axis=-1) * self.gain, self.n_heads)


class KeySharedQuery(QueryMap):
    def __init__(self, args: ModelArgs, rank: int = 0):
        super().__init__(args)
        self.mix = mx.zeros((self.n_heads, args.head_dim, args.head_dim))

    def project(self, hidden, key):
        groups = self.mix.reshape(self.n_kv_heads, -1, *self.mix.shape[1:])  # (G, H/G, K, K)
        queries = split_heads(key, self.n_kv_heads)[:, :, None] @ groups  # (B, G, H/G, T, K)
        return queries.flatten(1, 2)


class LowRankQuery(QueryMap):
    def __init__(self, args: ModelArgs, rank: int = 0):
        super().__init__(args)
        self.gain = mx.ones((self.n_query,))
        self.down = mx.zeros((rank, args.hidden_size))
        self.up = mx.zeros((self.n_query, rank))

    def project(self, hidden, key):
        correction = (hidden @ self.down.T) @ self.up.T
        return split_heads(self.channels(hidden) * self.gain + correction, self.n_heads)


QUERY_MODULES = {
    "identity": IdentityQuery,
    "select": SelectQuery,
    "key-shared": KeySharedQuery,
    "low-rank": LowRankQuery,
}


class Attention(nn.Module):
    """Attention whose queries come from the layer's query map; keys and values go to mlx-lm's caches."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.n_heads, self.n_kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.scale = args.head_dim**-0.5
        n_query, n_key = self.n_heads * args.head_dim, self.n_kv_heads * args.head_dim
        name, _, rank = args.query_maps[layer].partition(":")
        if name == "dense":
            self.q_proj = nn.Linear(args.hidden_size, n_query, bias=args.attention_bias)
        elif name in QUERY_MODULES:
            self.query = QUERY_MODULES[name](args, int(rank or 0))
        else:
            known = ", ".join(QUERY_MODULES)
            raise ValueError(f"layer {layer}: unknown query map {name!r}; known: {known}, dense")
        self.k_proj = nn.Linear(args.hidden_size, n_key, bias=args.attention_bias)
        self.v_proj = nn.Linear(args.hidden_size, n_key, bias=args.attention_bias)
        self.o_proj = nn.Linear(n_query, args.hidden_size, bias=args.attention_bias)
        self.rope = build_rope(args)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        key = self.k_proj(x)
        queries = self.query(x, key) if "query" in self else split_heads(self.q_proj(x), self.n_heads)
        keys, values = split_heads(key, self.n_kv_heads), split_heads(self.v_proj(x), self.n_kv_heads)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        heads = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(heads.transpose(0, 2, 1, 3).flatten(2))


class Layer(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(args, layer), MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class BaseModel(nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.window = args.sliding_window
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [Layer(args, layer) for layer in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        caches = cache or [None] * len(self.layers)
        mask = create_attention_mask(x, caches[0], window_size=self.window)
        for layer, own in zip(self.layers, caches, strict=True):
            x = layer(x, mask, own)
        return self.norm(x)


class Model(nn.Module):
    """What mlx-lm loads. It has no `shard`, so that mlx-lm refuses to spread it over several machines."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args, self.model_type = args, args.model_type
        self.model = BaseModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> mx.array:
        states = self.model(inputs, cache, input_embeddings)
        return self.model.embed_tokens.as_linear(states) if self.args.tie_word_embeddings else self.lm_head(states)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    def make_cache(self) -> list[Any]:
        window = self.args.sliding_window
        return [KVCache() if window is None else RotatingKVCache(max_size=window) for _ in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Return the tensors by the names above: W_V's identity blocks written out, a tied head left out.

        Raises ValueError for channel numbers that name no channel, which mlx would read from anywhere, and for others
        than config.json's `index_sha256` tells of.
        """
        d_model = self.args.hidden_size
        weights = {name: tensor for name, tensor in weights.items() if not name.endswith("rotary_emb.inv_freq")}
        if self.args.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        for name in [name for name in weights if name.endswith("query.index")]:
            check_channels(name, weights[name], d_model)
        gauged = [name for name in weights if name.endswith("v_proj.pivots")]
        for name in gauged:
            check_channels(name, weights[name], d_model)
        check_digests(weights, self.args.index_sha256)
        for name in gauged:
            pivots, stored = weights.pop(name), name.replace("pivots", "weight")
            weights[stored] = written_out(name, weights[stored], pivots.tolist(), d_model)
            if self.args.attention_bias:  # W_O holds that of gauged values
                weights[name.replace("pivots", "bias")] = mx.zeros(weights[stored].shape[0], weights[stored].dtype)
        return weights


def check_channels(name: str, channels: mx.array, d_model: int) -> None:
    """Raise ValueError unless all are whole numbers from 0 to d_model - 1."""
    if not mx.issubdtype(channels.dtype, mx.integer) or channels.min().item() < 0 or channels.max().item() >= d_model:
        raise ValueError(f"{name} must hold channel numbers from 0 to {d_model - 1}")


def check_digests(weights: dict[str, mx.array], wanted: list[str | None] | None) -> None:
    """Raise ValueError where a layer's channel numbers are not those of which `wanted` has the sha256; tell of None."""
    numbers: dict[int, bytes] = {}
    for part in (r"query\.index", r"v_proj\.pivots"):  # in this order
        for name, tensor in weights.items():
            if found := re.fullmatch(rf"model\.layers\.(\d+)\.self_attn\.{part}", name):
                flat, layer = tensor.flatten().tolist(), int(found[1])
                numbers[layer] = numbers.get(layer, b"") + struct.pack(f"<{len(flat)}i", *flat)
    if wanted is None and numbers:
        logger.warning_once(
            f"config.json has no index_sha256, so it is not known whether the channel numbers of layers "
            f"{', '.join(map(str, sorted(numbers)))} (query.index or pivots) are those that were written; with others, "
            "the model would compute something else. `qectomy renew FOLDER` adds it where qectomy.json tells of the "
            "tensors"
        )
    for layer, digest in enumerate(wanted or ()):
        if digest is not None and layer in numbers and hashlib.sha256(numbers[layer]).hexdigest() != digest:
            raise ValueError(
                f"layer {layer}: the channel numbers in the files (query.index or pivots) are not those that "
                "config.json's index_sha256 tells of, so the model would compute something else: they were averaged "
                "with another model's, or the config is another checkpoint's. Load the folder as it was written"
            )


def written_out(name: str, weight: mx.array, pivots: list[list[int]], d_model: int) -> mx.array:
    """The dense W_V (G*K, D) of `weight` (G*K, D - K), whose heads are the identity at the channels `pivots` (G, K)."""
    heads = []
    for rows, own in zip(weight.reshape(len(pivots), -1, weight.shape[1]), pivots, strict=True):
        rest = [channel for channel in range(d_model) if channel not in own]
        if len(rest) != weight.shape[1]:
            raise ValueError(f"{name} must name {d_model - weight.shape[1]} different channels a head")
        place = {channel: column for column, channel in enumerate([*own, *rest])}
        columns = mx.concatenate([mx.eye(len(own), dtype=weight.dtype), rows], axis=1)
        heads.append(columns[:, mx.array([place[channel] for channel in range(d_model)])])
    return mx.concatenate(heads)
