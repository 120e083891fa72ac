"""GPT-2 without W_Q: the model code that travels beside a reduced checkpoint's weights.

This file stands alone: it imports only torch and transformers, so a folder that holds it loads with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` where qectomy is not installed.

The attention is transformers' own, but for its fused projection `c_attn`, which gives keys and values alone; the
queries are the layer's query map's. A query map is one of

    identity       q = x̂                         the paper's W_Q = I; a query bias lies in the LayerNorm's shift
    select         q = x̂[index] + b              chosen channels; their gains lie in W_K
    key-shared     q_h = (x̂ W_K^h) A_h + b       the head's own key, mixed
    low-rank:R     q = x̂ * gain + (x̂ U) V + b    U: D x R, V: R x D
    gauge          q = x̂ W_Q + b                  each head's block of W_Q at K pivot channels is the identity
    dense          the stock c_attn

Keys need no bias, since softmax does not see it, and values none, since it lies in the output's bias. W_V may have
such identity blocks too (`value_maps`), and W_O may be merged into the MLP (`output_maps`). A config can also leave
out norms or skips, or let all layers share one layer's weights: there W_Q goes exactly.
Theory: Karbevski & Mijoski, "Key and Value Weights Are Probably All You Need", arXiv 2510.23912.
Dimensions: B batch, T positions, D d_model, H n_heads, K d_head, R rank; H*K = D.
"""

import hashlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch._guards import detect_fake_mode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2Attention,
    GPT2Block,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
    eager_attention_forward,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4):
    raise ImportError(f"this model's code needs transformers 5.4 or newer; {transformers.__version__} is installed")

logger = logging.get_logger("transformers.models.qectomy_gpt2")  # as loud as the caller has transformers
CACHE_NAMES = ("past_key_values", "cache")  # of transformers before 5.24, and from it on


def cache_name(attention: type) -> str:
    """The keyword by which this transformers hands a layer its key/value cache."""
    found = [name for name in CACHE_NAMES if name in inspect.signature(attention.forward).parameters]
    if len(found) != 1:
        raise ImportError(
            f"transformers {transformers.__version__} hands {attention.__name__} its key/value cache under a name that "
            f"this model's code does not know (known: {', '.join(CACHE_NAMES)}): text would be wrong from the second "
            "token on. Use transformers 5.4 to 5.24, or newer model code (`qectomy renew FOLDER`)"
        )
    return found[0]


CACHE = cache_name(GPT2Attention)


def take_cache(named: dict[str, Any], given: Any = None) -> tuple[Any, dict[str, Any]]:
    """Take the key/value cache out of a layer's keyword arguments: (cache, what its `update` wants beside)."""
    if CACHE == "cache":
        older = named.pop("past_key_values", given)
        return named.pop("cache", older), {"kwargs": named}
    return named.pop("past_key_values", given), {}  # `cache` is another one here, which attention functions update


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether transformers has read this tensor from a file; of torch's own initialisers it takes care itself."""
    return getattr(tensor, "_is_hf_initialized", False)


def split_heads(rows: torch.Tensor, n_heads: int) -> torch.Tensor:
    """(B, T, H*K) -> (B, H, T, K), a view."""
    return rows.view(*rows.shape[:-1], n_heads, -1).transpose(1, 2)


class QueryMap(nn.Module):
    """What stands where W_Q stood: (x̂ (B, T, D), keys (B, T, D)) -> queries (B, T, D).

    With `heads`, the queries come as attention reads them, (B, H, T, K).
    """

    def __init__(self, config, rank: int = 0):
        super().__init__()
        self.n_heads = config.num_attention_heads
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor, key: torch.Tensor, heads: bool = False) -> torch.Tensor:
        query = self.project(hidden, key)
        return split_heads(query, self.n_heads) if heads else query

    def project(self, hidden: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The queries, (B, T, D)."""
        raise NotImplementedError


class IdentityQuery(QueryMap):
    """q = x̂. Stores a bias only where no norm's shift and no writer's bias can hold it."""

    def __init__(self, config, rank: int = 0):
        nn.Module.__init__(self)
        self.n_heads = config.num_attention_heads
        kept = config.shared_layers and not config.norms
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if kept else None

    def reset_parameters(self) -> None:
        if self.bias is not None:
            super().reset_parameters()

    def project(self, hidden, key):
        return hidden if self.bias is None else hidden + self.bias


class SelectQuery(QueryMap):
    """q = x̂[index] + b: one channel of x̂ for each query channel."""

    def __init__(self, config, rank: int = 0):
        super().__init__(config)
        self.index = nn.Buffer(torch.arange(config.hidden_size, dtype=torch.int32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if is_loaded(self.index):
            return
        with torch.no_grad():
            self.index.copy_(torch.arange(len(self.index)))

    def project(self, hidden, key):
        return hidden.index_select(-1, self.index) + self.bias


class KeySharedQuery(QueryMap):
    """q_h = k_h A_h + b: queries and keys share one projection; `mix` holds the A_h, (H, K, K)."""

    def __init__(self, config, rank: int = 0):
        super().__init__(config)
        heads, d_head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.mix = nn.Parameter(torch.eye(d_head).repeat(heads, 1, 1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if is_loaded(self.mix):
            return
        with torch.no_grad():
            self.mix.copy_(torch.eye(self.mix.shape[1]).expand_as(self.mix))

    def forward(self, hidden, key, heads=False):
        n_heads, d_head, _ = self.mix.shape
        shared = key.reshape(-1, n_heads, d_head).transpose(0, 1)  # (H, B*T, K)
        query = torch.baddbmm(self.bias.view(n_heads, 1, d_head), shared, self.mix)
        if heads:
            return query.view(n_heads, *key.shape[:-1], d_head).transpose(0, 1)
        return query.transpose(0, 1).reshape(key.shape)


class LowRankQuery(QueryMap):
    """q = x̂ * gain + (x̂ U) V + b: a diagonal and a rank-R correction; `down` is Uᵀ (R, D), `up` is Vᵀ (D, R)."""

    def __init__(self, config, rank: int = 1):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(config.hidden_size))
        self.down = nn.Parameter(torch.zeros(rank, config.hidden_size))
        self.up = nn.Parameter(torch.zeros(config.hidden_size, rank))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.gain)
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)

    def project(self, hidden, key):
        correction = nn.functional.linear(nn.functional.linear(hidden, self.down), self.up, self.bias)
        return hidden * self.gain + correction


def index_digest(indices: list[torch.Tensor]) -> str | None:
    """The sha256 of channel numbers, as 32-bit integers; None where there are none."""
    if not indices:
        return None
    numbers = torch.cat([tensor.detach().flatten().to("cpu", torch.int32) for tensor in indices])
    return hashlib.sha256(numbers.numpy().astype("<i4").tobytes()).hexdigest()


def check_indices_(attention: nn.Module) -> None:
    """Hold a layer's channel numbers against the config's `index_sha256`, once. Raises ValueError for other ones.

    Engines that load parameters alone leave them as they were drawn, and tools that average checkpoints average them.
    Where the config of a folder tells of none, that is told once. What has no values, on the meta device or in a
    FakeTensorMode, is not checked.
    """
    wanted, indices = attention.config.index_sha256, attention.indices()
    if detect_fake_mode(indices) is not None or any(tensor.is_meta for tensor in indices):
        return
    if any(tensor.is_cuda for tensor in indices) and torch.cuda.is_current_stream_capturing():
        return
    if wanted is None and indices and attention.config.name_or_path:
        logger.warning_once(
            f"{attention.config.name_or_path}: config.json has no index_sha256, so it is not known whether the channel "
            "numbers that were loaded (query.index or pivots) are those that were written; with others, the model "
            "would compute something else. `qectomy renew FOLDER` adds it where qectomy.json tells of the tensors"
        )
    if wanted is not None and indices and wanted[attention.layer_idx] not in (None, index_digest(indices)):
        raise ValueError(
            f"layer {attention.layer_idx}: the channel numbers in memory (query.index or pivots) are not those that "
            "config.json's index_sha256 tells of, so the model would compute something else: they were not loaded, or "
            "were averaged with another model's, or the config is another checkpoint's. Load the folder as it was "
            "written; to train from a config alone, set index_sha256 to null"
        )
    attention.indices_checked = True


QUERY_MODULES = {
    "identity": IdentityQuery,
    "select": SelectQuery,
    "key-shared": KeySharedQuery,
    "low-rank": LowRankQuery,
}


def build_query(config, layer_idx: int) -> nn.Module | None:
    """The query module of a layer as `config.query_maps[layer_idx]` names it; None for `dense` and `gauge`."""
    name, _, rank = config.query_maps[layer_idx].partition(":")
    if name in ("dense", "gauge"):
        return None
    if name not in QUERY_MODULES:
        known = ", ".join(QUERY_MODULES)
        raise ValueError(f"layer {layer_idx}: unknown query map {name!r}; known: {known}, gauge, dense")
    return QUERY_MODULES[name](config, int(rank or 0))


class QectomyGPT2Config(GPT2Config):
    """GPT2Config plus `query_maps`, one query-map name a layer, and what else can differ from GPT-2.

    `softmax_scale` is the factor on the logits before the softmax in place of 1/√K; None keeps GPT-2's own. The
    paper's models take half of it. `value_maps` names `dense` or `gauge` a layer, `output_maps` `dense` or `merged`
    (no W_O: the MLP reads the heads); None: all dense. `index_sha256` is the sha256 of the channel numbers that a layer
    stores, null where it stores none; with it no layer computes with other ones. `norms`, `attention_skip` and
    `mlp_skip` leave out what they name when false; with `shared_layers` all layers compute with the first one's
    weights, stored once.
    """

    model_type = "qectomy_gpt2"
    query_maps: list[str] | None = None
    value_maps: list[str] | None = None
    output_maps: list[str] | None = None
    index_sha256: list[str | None] | None = None
    softmax_scale: float | None = None
    norms: bool = True
    attention_skip: bool = True
    mlp_skip: bool = True
    shared_layers: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for field, known in (("query_maps", None), ("value_maps", "gauge"), ("output_maps", "merged")):
            names = getattr(self, field) or ["dense"] * self.n_layer
            setattr(self, field, names)
            if not isinstance(names, list | tuple):
                raise ValueError(f"{field} must be a list with a name for each layer, not {names!r}")
            if len(names) != self.n_layer:
                raise ValueError(f"{field} names {len(names)} layers, the model has {self.n_layer}")
            if known is not None and set(names) - {"dense", known}:
                raise ValueError(f"{field} must name dense or {known} for each layer, got {names}")
            if self.shared_layers and len(set(names)) > 1:
                raise ValueError(f"{field} must name the same for all layers, which share their weights")
        if self.index_sha256 is not None and len(self.index_sha256) != self.n_layer:
            raise ValueError(f"index_sha256 tells of {len(self.index_sha256)} layers, the model has {self.n_layer}")
        if self.shared_layers and self.scale_attn_by_inverse_layer_idx:
            raise ValueError("layers that share their weights cannot scale their logits by their place")
        for layer, pair in enumerate(zip(self.query_maps, self.value_maps, strict=True)):
            if pair in (("dense", "gauge"), ("gauge", "dense")):
                raise ValueError(f"layer {layer}: queries of map {pair[0]!r} cannot go with values of map {pair[1]!r}")
        if "merged" in self.output_maps and (self.attention_skip or self.norms):
            raise ValueError("W_O can be merged into the MLP only where no norm and no skip stand between them")


class GaugedProjections(nn.Module):
    """x̂ (B, T, D) -> n projections side by side, (B, T, n*D), whose heads have an identity block each.

    `pivots` (n*H, K): the channels at which a head's block of K x K is the identity. `weight` (D - K, n*D): its rows at
    the other channels, ascending, in GPT-2's layout. `bias` (D,): of the first projection, the queries.
    """

    def __init__(self, d_model: int, n_heads: int, n_projections: int, bias: bool):
        super().__init__()
        self.d_model, d_head = d_model, d_model // n_heads
        self.pivots = nn.Buffer(torch.arange(d_head, dtype=torch.int32).repeat(n_projections * n_heads, 1))
        self.weight = nn.Parameter(torch.empty(d_model - d_head, n_projections * d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if not is_loaded(self.pivots):
            with torch.no_grad():
                self.pivots.copy_(torch.arange(self.pivots.shape[1]).expand_as(self.pivots))

    def dense_weight(self) -> torch.Tensor:
        """All rows, (D, n*D)."""
        heads, d_head = self.pivots.shape
        pivots = self.pivots.long()
        is_rest = torch.ones(heads, self.d_model, dtype=torch.bool, device=pivots.device).scatter(1, pivots, False)
        rest = torch.arange(self.d_model, device=pivots.device).expand_as(is_rest)[is_rest].view(heads, -1)
        order = torch.cat([pivots, rest], 1).T[..., None].expand(-1, -1, d_head)  # (D, n*H, K)
        blocks = torch.eye(d_head, dtype=self.weight.dtype, device=pivots.device)[:, None].expand(-1, heads, -1)
        rows = torch.cat([blocks, self.weight.view(-1, heads, d_head)])
        return torch.zeros_like(rows).scatter(0, order, rows).flatten(1)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out = torch.matmul(hidden, self.dense_weight())
        if self.bias is None:
            return out
        return torch.cat([out[..., : self.d_model] + self.bias, out[..., self.d_model :]], dim=-1)


class ReducedProjection(Conv1D):
    """Stands where `c_attn` stood: x̂ (B, T, D) -> keys and values side by side, (B, T, 2D).

    `weight` is W_K and W_V in GPT-2's layout (in, out); W_K alone where `gauge` holds W_V, and W_Q too if there is no
    query map. `query` and `gauge` lie here for the sake of their names in the file. The attention calls them: what this
    gives is linear, so that adapters and quantisers treat it as they do the stock one.
    """

    def __init__(self, d_model: int, query: nn.Module | None, gauge: nn.Module | None = None):
        nn.Module.__init__(self)
        self.nx, self.nf = d_model, (2 if gauge is None else 1) * d_model
        self.weight = nn.Parameter(torch.empty(self.nx, self.nf))
        self.register_parameter("bias", None)
        self.query = query
        self.gauge = gauge

    __repr__ = nn.Module.__repr__  # Conv1D's own leaves out what lies inside

    @torch.no_grad()
    def written_out(self) -> nn.Module:
        """The module of the same outputs whose weights are dense, on the same device."""
        d_model, gauged = len(self.weight), self.gauge.dense_weight()
        with torch.device(self.weight.device):
            dense = Conv1D(3 * d_model, d_model) if self.query is None else ReducedProjection(d_model, self.query)
        dense = dense.to(self.weight.dtype).train(self.training)
        dense.weight.copy_(torch.cat([gauged[:, :-d_model], self.weight, gauged[:, -d_model:]], 1))
        if self.query is None:
            dense.bias[:d_model], dense.bias[d_model:] = self.gauge.bias, 0
        return dense

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.matmul(hidden, self.weight)


INDICES = (("query", "index"), ("gauge", "pivots"))  # where `c_attn` keeps channel numbers


def held_beside(c_attn: nn.Module, name: str) -> nn.Module | None:
    """What `c_attn` holds beside its weights, `query` or `gauge`, also inside an adapter's layers; None for nothing."""
    while not hasattr(c_attn, name) and hasattr(c_attn, "base_layer"):
        c_attn = c_attn.base_layer
    return getattr(c_attn, name, None)


class ReducedGPT2Attention(GPT2Attention):
    """Stock attention whose queries come from the layer's query map. Nothing is kept between calls."""

    def __init__(self, config: QectomyGPT2Config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        if config.query_maps[layer_idx] != "dense":
            query, gauge = build_query(config, layer_idx), None
            if config.value_maps[layer_idx] == "gauge":
                n_projections = 1 if query else 2
                gauge = GaugedProjections(self.embed_dim, self.num_heads, n_projections, bias=query is None)
            self.c_attn = ReducedProjection(self.embed_dim, query, gauge)
        if config.output_maps[layer_idx] == "merged":
            self.c_proj = nn.Identity()
        self.indices_checked = False
        if config.softmax_scale is not None:
            own = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
            self.scaling *= config.softmax_scale / own

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.indices_checked = False
        super()._load_from_state_dict(*args, **kwargs)

    def indices(self) -> list[torch.Tensor]:
        """The channel numbers that the layer stores."""
        found = (getattr(held_beside(self.c_attn, owner), name, None) for owner, name in INDICES)
        return [tensor for tensor in found if tensor is not None]

    def project_heads(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x̂ (B, T, D) -> queries, keys and values as attention reads them, (B, H, T, K) each."""
        query_map, gauge = held_beside(self.c_attn, "query"), held_beside(self.c_attn, "gauge")
        parts = self.c_attn(hidden).split(self.embed_dim, dim=-1)
        if gauge is not None:
            *first, last = gauge(hidden).split(self.embed_dim, dim=-1)
            parts = (*first, *parts, last)
        *first, key, value = parts
        key_heads, value_heads = split_heads(key, self.num_heads), split_heads(value, self.num_heads)
        if query_map is None:
            return split_heads(first[0], self.num_heads), key_heads, value_heads
        return query_map(hidden, key, heads=True), key_heads, value_heads

    def forward(
        self,
        hidden_states: torch.Tensor,
        past=None,
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.indices_checked and not torch.compiler.is_compiling():
            check_indices_(self)
        cache, how = take_cache(kwargs, past)
        query, key, value = self.project_heads(hidden_states)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, **how)
        if self.config._attn_implementation == "eager" and self.reorder_and_upcast_attn:
            output, weights = self._upcast_and_reordered_attn(query, key, value, attention_mask)
        else:
            attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            output, weights = attend(
                self,
                query,
                key,
                value,
                attention_mask,
                dropout=self.attn_dropout.p if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        output = self.c_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous())
        return self.resid_dropout(output), weights


class ReducedGPT2Block(GPT2Block):
    def __init__(self, config: QectomyGPT2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attn = ReducedGPT2Attention(config, layer_idx)
        self.attention_skip, self.mlp_skip = config.attention_skip, config.mlp_skip
        self.attn.c_proj.writes_stream = self.mlp.c_proj.writes_stream = True
        if getattr(self.attn.c_attn, "query", None) is not None and config.activation_function == "gelu_new":
            self.mlp.act = nn.GELU(approximate="tanh")  # the same function in one kernel; the stock one takes eight
        if not config.norms:
            self.ln_1, self.ln_2 = nn.Identity(), nn.Identity()

    def forward(self, hidden_states: torch.Tensor, past=None, attention_mask=None, *_, **kwargs):
        attended, _ = self.attn(self.ln_1(hidden_states), past, attention_mask, **kwargs)
        middle = hidden_states + attended if self.attention_skip else attended
        thought = self.mlp(self.ln_2(middle))
        return middle + thought if self.mlp_skip else thought


@contextmanager
def no_layers(config) -> Iterator[None]:
    """Let stock classes build no decoder layers while the block runs: they would be thrown away, twice a load."""
    n_layers, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = n_layers


def share_first(layers: nn.ModuleList, attention: str) -> None:
    """Let every layer compute with the first one's modules; only the place of its keys in the cache is its own."""
    for layer in layers[1:]:
        for name, _ in list(layers[0].named_children()):
            if name != attention:
                setattr(layer, name, getattr(layers[0], name))
        # One dictionary of them: what is exchanged in the first layer, as by adapters, is exchanged in all.
        getattr(layer, attention)._modules = getattr(layers[0], attention)._modules


# Tensors of a layer, by the names that these classes give them: not what quantizers store beside a weight.
OWN = re.compile(r"(.*\.)?(layers|h)\.\d+\..*\.(weight|bias|index|gain|mix|down|up|pivots)")
FIELDS = (  # by what a tensor's name holds: the field of config.json that decides whether and how it is stored
    ("lm_head", "tie_word_embeddings and vocab_size"),
    (".query.", "query_maps"),
    (".gauge.", "value_maps"),
    (".c_attn.", "query_maps and value_maps"),
    (".attn.c_proj.", "output_maps"),
    ("", "n_layer, norms, shared_layers and sizes"),
)


def refuse_other(model, info: dict[str, Any], resized: bool) -> None:
    """Raise ValueError where the files hold other tensors than config.json calls for.

    Random numbers would stand in for what is missing or has another shape, and what has no place would be left out.
    With `resized`, the caller lets tensors outside the layers have another shape.
    """
    shapes = {str(name): sizes for name, *sizes in info["mismatched_keys"]}
    missing = sorted(map(str, info["missing_keys"]))
    extra = sorted(name for name in map(str, info["unexpected_keys"]) if OWN.fullmatch(name))
    shaped = sorted(name for name in shapes if not resized or OWN.fullmatch(name))
    if not (missing or extra or shaped):
        return
    first = [name for name in missing if "lm_head" not in name] or extra or shaped or missing
    field = next(field for part, field in FIELDS if part in first[0])
    if first[0] in missing:
        what = f"{len(missing)} tensor(s) that config.json calls for are in none of the files, first {first[0]}"
    elif first is extra:
        field = f"shared_layers and {field}" if model.config.shared_layers else field
        what = f"config.json leaves no place for {len(extra)} tensor(s) of the files, first {first[0]}"
    else:
        stored, built = (tuple(size) for size in shapes[first[0]])
        what = f"{first[0]} is {stored} in the files and {built} by config.json"
    raise ValueError(
        f"{model.config._name_or_path}: {what}. Look at config.json's {field}: the weights are incomplete, or are not "
        "this config.json's, and the model would compute something else. Take both from one folder, as it was written"
    )


class QectomyGPT2PreTrainedModel(GPT2PreTrainedModel):
    config: QectomyGPT2Config
    _no_split_modules = ["ReducedGPT2Block"]
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.(masked_)?bias$"]  # stock's pattern also fits c_attn.bias
    _can_record_outputs = {"hidden_states": ReducedGPT2Block, "attentions": ReducedGPT2Attention}

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs):
        model, info = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )  # transformers would name no tensor in its error
        refuse_other(model, info, ignore_mismatched_sizes)
        model.write_out_gauges_()
        return (model, info) if output_loading_info else model

    def mark_tied_weights_as_initialized(self, loading_info):
        if self.config.shared_layers:  # a later layer's tensors would be read over the first one's: they have no place
            later = {name for name in self.state_dict() if re.search(r"(^|\.)h\.[1-9]", name)}
            loading_info.unexpected_keys |= later - loading_info.missing_keys
        super().mark_tied_weights_as_initialized(loading_info)

    def reduced_attentions(self) -> list[ReducedGPT2Attention]:
        return [module for module in self.modules() if isinstance(module, ReducedGPT2Attention)]

    def check_indices(self) -> None:
        """Raise ValueError unless all channel numbers are those of config.json's `index_sha256`.

        `from_pretrained` and a first pass do so themselves. Call it where neither runs: after other ways of loading,
        before the model is compiled or exported.
        """
        for attention in self.reduced_attentions():
            check_indices_(attention)

    def set_submodule(self, target: str, module: nn.Module, *args, **kwargs) -> None:
        """Exchange a module, as bitsandbytes' loading does; what `c_attn` holds beside its weights stays there."""
        if isinstance(old := self.get_submodule(target), ReducedProjection):
            module.query, module.gauge = old.query, old.gauge
        super().set_submodule(target, module, *args, **kwargs)

    def write_out_gauges_(self) -> None:
        """Write the identity blocks out in memory, so that every layer runs one dense product, as in the stock model.

        The config then says `dense`, and what is saved from here on is. Nothing happens to weights that are quantized,
        partitioned, or on the meta device.
        """
        self.check_indices()
        if getattr(self, "hf_quantizer", None) is not None:
            return
        for field in ("value_maps", "query_maps", "index_sha256"):  # the caller's config keeps its own
            setattr(self.config, field, getattr(self.config, field) and [*getattr(self.config, field)])
        dense: dict[nn.Module, nn.Module] = {}  # layers that share a module go on sharing it
        for attention, gauged in [(each, each.c_attn) for each in self.reduced_attentions()]:
            if (
                getattr(gauged, "gauge", None) is not None
                and gauged.weight.device.type != "meta"
                and len(gauged.weight)
            ):
                dense[gauged] = dense.get(gauged) or gauged.written_out()
                attention.c_attn = dense[gauged]
                layer = attention.layer_idx
                self.config.value_maps[layer] = "dense"
                if gauged.query is None:
                    self.config.query_maps[layer] = "dense"
                if self.config.index_sha256 is not None:
                    self.config.index_sha256[layer] = index_digest(attention.indices())

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, QueryMap):
            module.reset_parameters()
        elif isinstance(module, GaugedProjections):
            module.reset_parameters(self.config.initializer_range)
        elif getattr(module, "writes_stream", False) and hasattr(module, "weight"):
            # GPT-2 draws these smaller; transformers does it from modules that it leaves out in other people's classes.
            nn.init.normal_(module.weight, std=self.config.initializer_range / (2 * self.config.n_layer) ** 0.5)


class QectomyGPT2Model(QectomyGPT2PreTrainedModel, GPT2Model):
    def __init__(self, config: QectomyGPT2Config):
        with no_layers(config):
            super().__init__(config)
        self.h = nn.ModuleList(ReducedGPT2Block(config, i) for i in range(config.n_layer))
        if not config.norms:
            self.ln_f = nn.Identity()
        if config.shared_layers:
            share_first(self.h, "attn")
            self._tied_weights_keys = {f"h.{i}.": "h.0." for i in range(1, config.n_layer)}
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict:
        return {}  # the shared modules are one object; transformers' own way to tie them would cut their biases


class QectomyGPT2ForCausalLM(QectomyGPT2PreTrainedModel, GPT2LMHeadModel):
    def __init__(self, config: QectomyGPT2Config):
        with no_layers(config):
            super().__init__(config)
        self.__dict__.pop("_keys_to_ignore_on_load_unexpected", None)  # stock's, which hides a c_attn.bias, too
        self.transformer = QectomyGPT2Model(config)
        self.post_init()


QectomyGPT2Config.register_for_auto_class("AutoConfig")
QectomyGPT2Model.register_for_auto_class("AutoModel")
QectomyGPT2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
