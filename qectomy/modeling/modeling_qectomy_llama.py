"""Llama, Mistral and Qwen 2 without W_Q: the model code that travels beside a reduced checkpoint's weights.

This file stands alone: it imports only torch and transformers, so a folder that holds it loads with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` where qectomy is not installed.

A layer's query map is one of (x̂ is the hidden state after the input norm, n_heads * d_head query channels)

    identity       q = x̂                               channel i of x̂ is query channel i (i modulo d_model)
    select         q = x̂[index] * gain                 chosen channels
    key-shared     q_h = (x̂ W_K^g(h)) A_h              the head's own key, before RoPE, mixed
    low-rank:R     q = x̂ * gain + (x̂ U) V              U: d_model x R, V: R x n_heads*d_head
    dense          q = x̂ W_Q                           the stock projection

W_V may have a K x K identity block in each head (`value_maps`), and W_O may be merged into the MLP (`output_maps`). A
config can also leave out norms or skips, or let all layers share one layer's weights: there W_Q goes exactly.
Theory: Karbevski & Mijoski, "Key and Value Weights Are Probably All You Need", arXiv 2510.23912.
Dimensions: B batch, T positions, D d_model, H n_heads, G n_kv_heads, K d_head, R rank.
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
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralModel,
    MistralPreTrainedModel,
)
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2PreTrainedModel,
)
from transformers.utils import logging

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 4):
    raise ImportError(f"this model's code needs transformers 5.4 or newer; {transformers.__version__} is installed")

logger = logging.get_logger("transformers.models.qectomy_llama")  # as loud as the caller has transformers
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


CACHE = cache_name(LlamaAttention)


def take_cache(named: dict[str, Any], given: Any = None) -> tuple[Any, dict[str, Any]]:
    """Take the key/value cache out of a layer's keyword arguments: (cache, what its `update` wants beside)."""
    if CACHE == "cache":
        older = named.pop("past_key_values", given)
        return named.pop("cache", older), {"kwargs": named}
    return named.pop("past_key_values", given), {}  # `cache` is another one here, which attention functions update


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether transformers has read this tensor from a file; of torch's own initialisers it takes care itself."""
    return getattr(tensor, "_is_hf_initialized", False)


def split_heads(rows: torch.Tensor, d_head: int) -> torch.Tensor:
    """(B, T, n*K) -> (B, n, T, K), a view."""
    return rows.view(*rows.shape[:-1], -1, d_head).transpose(1, 2)


def count_heads(key: torch.Tensor, d_head: int) -> int:
    """How many KV heads lie in keys (B, T, n*K). Raises RuntimeError where they are no whole number of heads."""
    if key.shape[-1] % d_head:
        raise RuntimeError(
            f"keys of {key.shape[-1]} channels are no whole number of heads of {d_head} each: a model without W_Q can "
            "be split only into groups of whole KV heads, so that the tensor-parallel size divides num_key_value_heads"
        )
    return key.shape[-1] // d_head


def local_heads(n_heads: int, n_kv_heads: int, n_kv_here: int, projection: nn.Module) -> slice:
    """The heads of n_heads whose KV heads this process holds under tensor parallelism; all where it holds all.

    `projection` is what gave the keys, which knows this process's place among those that share the heads.
    """
    if n_kv_here == n_kv_heads:
        return slice(None)
    if n_kv_here == 0 or n_kv_heads % n_kv_here:
        raise RuntimeError(
            f"{n_kv_here} of {n_kv_heads} KV heads arrived at a query map: a model without W_Q can be split only into "
            "equal groups of whole KV heads, one a process, so that the tensor-parallel size divides n_kv_heads"
        )
    n_ranks = n_kv_heads // n_kv_here
    size, rank = place(projection)
    if size != n_ranks:
        raise RuntimeError(
            f"{n_kv_here} of {n_kv_heads} KV heads arrived at a query map, a share for {n_ranks} processes, and {size} "
            "are told of: which heads these are is not known, so queries would be other heads'. Split the model by "
            "transformers' tp_plan or by vLLM, or let the tensor-parallel processes be all there are"
        )
    return slice(rank * n_heads // n_ranks, (rank + 1) * n_heads // n_ranks)


def place(projection: Any) -> tuple[int, int]:
    """(how many processes share a projection's outputs, which of them this is), as whoever split it says.

    Where nobody does, all processes share them.
    """
    mesh = getattr(projection, "_hf_device_mesh", None)  # transformers, as long as it splits modules
    if mesh is None:
        mesh = getattr(getattr(projection, "weight", None), "device_mesh", None)  # as it splits tensors
    if mesh is not None:
        mesh = mesh["tp"] if mesh.ndim > 1 else mesh
        return mesh.size(), mesh.get_local_rank()
    if hasattr(projection, "tp_rank"):  # vLLM
        return projection.tp_size, projection.tp_rank
    if not torch.distributed.is_initialized():
        return 1, 0
    return torch.distributed.get_world_size(), torch.distributed.get_rank()


def turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE on heads (B, n, T, K) by angles (B, T, K): x cos + rotate_half(x) sin, in three kernels, stock in five."""
    cos, sin, half = cos.unsqueeze(1), sin.unsqueeze(1), heads.shape[-1] // 2
    turned = heads * cos
    turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return turned


class QueryMap(nn.Module):
    """What stands where W_Q stood: (x̂ (B, T, D), keys before RoPE (B, T, G*K)) -> queries (B, T, H*K).

    With `heads`, the queries come as attention reads them, (B, H, T, K), and of these heads alone: under tensor
    parallelism, those of the keys that are given.
    """

    def __init__(self, config, rank: int = 0):
        super().__init__()
        self.d_head = config.head_dim
        self.n_query = config.num_attention_heads * config.head_dim
        self.bias = nn.Parameter(torch.zeros(self.n_query)) if config.attention_bias else None

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor, key: torch.Tensor, heads: slice | None = None) -> torch.Tensor:
        query = self.project(hidden, key)
        if self.bias is not None:
            query = query + self.bias
        return query if heads is None else split_heads(query, self.d_head)[:, heads]

    def project(self, hidden: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """The queries before the bias."""
        raise NotImplementedError

    def channels(self, hidden: torch.Tensor) -> torch.Tensor:
        """The first n_query channels of x̂, starting over where d_model is smaller."""
        d_model = hidden.shape[-1]
        if self.n_query > d_model:
            hidden = torch.cat([hidden] * -(-self.n_query // d_model), dim=-1)
        return hidden[..., : self.n_query]


class IdentityQuery(QueryMap):
    """q = x̂, channel i modulo d_model: the paper's W_Q = I. Stores nothing but the family's query bias."""

    def project(self, hidden, key):
        return self.channels(hidden)


class SelectQuery(QueryMap):
    """q = x̂[index] * gain: one channel of x̂ for each query channel."""

    def __init__(self, config, rank: int = 0):
        super().__init__(config)
        self.index = nn.Buffer(torch.arange(self.n_query, dtype=torch.int32) % config.hidden_size)
        self.gain = nn.Parameter(torch.ones(self.n_query))
        self.d_model = config.hidden_size

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.gain)
        if is_loaded(self.index):
            return
        with torch.no_grad():
            self.index.copy_(torch.arange(self.n_query) % self.d_model)

    def project(self, hidden, key):
        return hidden.index_select(-1, self.index) * self.gain


class KeySharedQuery(QueryMap):
    """q_h = k_g(h) A_h: queries and keys share one projection; `mix` holds the A_h, (H, K, K)."""

    def __init__(self, config, rank: int = 0):
        super().__init__(config)
        self.mix = nn.Parameter(torch.eye(self.d_head).repeat(config.num_attention_heads, 1, 1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if is_loaded(self.mix):
            return
        with torch.no_grad():
            self.mix.copy_(torch.eye(self.d_head).expand_as(self.mix))

    def forward(self, hidden, key, heads=None):
        here = slice(None) if heads is None else heads
        mix = self.mix[here]
        n_heads, n_kv_here = len(mix), key.shape[-1] // self.d_head
        shared = key.reshape(-1, n_kv_here, self.d_head).transpose(0, 1)  # (G, B*T, K)
        if n_heads > n_kv_here:  # copying the keys is less than bringing the mixes into another order
            shared = shared[:, None].expand(-1, n_heads // n_kv_here, -1, -1).reshape(n_heads, -1, self.d_head)
        query = torch.bmm(shared, mix)  # (H, B*T, K)
        if self.bias is not None:
            query = query + self.bias.view(-1, 1, self.d_head)[here]
        if heads is not None:
            return query.view(n_heads, *key.shape[:-1], self.d_head).transpose(0, 1)
        return query.transpose(0, 1).reshape(*key.shape[:-1], -1)


class LowRankQuery(QueryMap):
    """q = x̂ * gain + (x̂ U) V: a diagonal and a rank-R correction; `down` is Uᵀ (R, D), `up` is Vᵀ (H*K, R)."""

    def __init__(self, config, rank: int = 1):
        super().__init__(config)
        self.gain = nn.Parameter(torch.ones(self.n_query))
        self.down = nn.Parameter(torch.zeros(rank, config.hidden_size))
        self.up = nn.Parameter(torch.zeros(self.n_query, rank))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.gain)
        nn.init.normal_(self.down, std=self.down.shape[1] ** -0.5)
        nn.init.zeros_(self.up)

    def project(self, hidden, key):
        correction = nn.functional.linear(nn.functional.linear(hidden, self.down), self.up)
        return self.channels(hidden) * self.gain + correction


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
    """The query module of a layer as `config.query_maps[layer_idx]` names it; None for `dense`."""
    name, _, rank = config.query_maps[layer_idx].partition(":")
    if name == "dense":
        return None
    if name not in QUERY_MODULES:
        raise ValueError(f"layer {layer_idx}: unknown query map {name!r}; known: {', '.join(QUERY_MODULES)}, dense")
    return QUERY_MODULES[name](config, int(rank or 0))


def check_layers(config) -> None:
    """Fill in and check what the config says of each layer. Raises ValueError naming the field."""
    n_layers = config.num_hidden_layers
    for field, known in (("query_maps", None), ("value_maps", "gauge"), ("output_maps", "merged")):
        names = getattr(config, field) or ["dense"] * n_layers
        setattr(config, field, names)
        if not isinstance(names, list | tuple):
            raise ValueError(f"{field} must be a list with a name for each layer, not {names!r}")
        if len(names) != n_layers:
            raise ValueError(f"{field} names {len(names)} layers, the model has {n_layers}")
        if known is not None and set(names) - {"dense", known}:
            raise ValueError(f"{field} must name dense or {known} for each layer, got {names}")
        if config.shared_layers and len(set(names)) > 1:
            raise ValueError(f"{field} must name the same for all layers, which share their weights")
    if config.index_sha256 is not None and len(config.index_sha256) != n_layers:
        raise ValueError(f"index_sha256 tells of {len(config.index_sha256)} layers, the model has {n_layers}")
    if "merged" in config.output_maps:
        if config.attention_skip or config.norms:
            raise ValueError("W_O can be merged into the MLP only where no norm and no skip stand between them")
        if config.num_attention_heads * config.head_dim != config.hidden_size:
            raise ValueError("W_O can be merged into the MLP only where n_heads * d_head is d_model")


class GaugedValue(nn.Module):
    """x̂ (B, T, D) -> values (B, T, G*K), whose heads have an identity block each.

    `pivots` (G, K): the channels at which a head's block of K x K is the identity. `weight` (G*K, D - K): its columns
    at the other channels, ascending. W_O holds its bias, if that has one (written out, it is zeros then); else `bias`.
    """

    def __init__(self, config):
        super().__init__()
        self.d_model, d_head, heads = config.hidden_size, config.head_dim, config.num_key_value_heads
        self.pivots = nn.Buffer(torch.arange(d_head, dtype=torch.int32).repeat(heads, 1))
        self.weight = nn.Parameter(torch.empty(heads * d_head, self.d_model - d_head))
        self.bias = None
        if config.attention_bias and isinstance(config, Qwen2Config):
            self.bias = nn.Parameter(torch.zeros(len(self.weight)))
        self.attention_bias = config.attention_bias

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if not is_loaded(self.pivots):
            with torch.no_grad():
                self.pivots.copy_(torch.arange(self.pivots.shape[1]).expand_as(self.pivots))

    def dense_weight(self) -> torch.Tensor:
        """All columns, (G*K, D)."""
        heads, d_head = self.pivots.shape
        pivots = self.pivots.long()
        is_rest = torch.ones(heads, self.d_model, dtype=torch.bool, device=pivots.device).scatter(1, pivots, False)
        rest = torch.arange(self.d_model, device=pivots.device).expand_as(is_rest)[is_rest].view(heads, -1)
        order = torch.cat([pivots, rest], 1)[:, None].expand(-1, d_head, -1)  # (G, K, D)
        blocks = torch.eye(d_head, dtype=self.weight.dtype, device=pivots.device).expand(heads, -1, -1)
        columns = torch.cat([blocks, self.weight.view(heads, d_head, -1)], 2)
        return torch.zeros_like(columns).scatter(2, order, columns).flatten(0, 1)

    @torch.no_grad()
    def written_out(self) -> nn.Module:
        """The dense module of the same outputs, on the same device."""
        with torch.device(self.weight.device):
            dense = nn.Linear(self.d_model, len(self.weight), bias=self.attention_bias)
        dense = dense.to(self.weight.dtype).train(self.training)
        dense.weight.copy_(self.dense_weight())
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        elif dense.bias is not None:
            nn.init.zeros_(dense.bias)
        return dense

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.dense_weight(), self.bias)


class ReducedAttention(LlamaAttention):
    """Stock attention whose queries come from the layer's query map. Nothing is kept between calls."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.window = {}  # what attention functions are told of it
        if isinstance(config, MistralConfig):
            self.window = {"sliding_window": config.sliding_window}
        elif isinstance(config, Qwen2Config):
            slides = config.layer_types[layer_idx] == "sliding_attention"
            self.window = {"sliding_window": config.sliding_window if slides else None}
            self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.query = build_query(config, layer_idx)
        if self.query is not None:
            del self.q_proj
        if config.value_maps[layer_idx] == "gauge":
            self.v_proj = GaugedValue(config)
        if config.output_maps[layer_idx] == "merged":
            self.o_proj = nn.Identity()
        self.indices_checked = False

    def project_query(self, hidden_states: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Queries before RoPE, (B, T, H*K), from x̂ (B, T, D) and the keys before RoPE (B, T, G*K)."""
        return self.q_proj(hidden_states) if self.query is None else self.query(hidden_states, key)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.indices_checked = False
        super()._load_from_state_dict(*args, **kwargs)

    def indices(self) -> list[torch.Tensor]:
        """The channel numbers that the layer stores."""
        found = (getattr(self.query, "index", None), getattr(self.v_proj, "pivots", None))
        return [tensor for tensor in found if tensor is not None]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.indices_checked and not torch.compiler.is_compiling():
            check_indices_(self)
        cache, how = take_cache(kwargs)
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        key_states = self.k_proj(hidden_states)
        n_kv_heads, n_kv_here = self.config.num_key_value_heads, count_heads(key_states, self.head_dim)
        value_states = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if value_states.shape[1] > n_kv_here:  # each process has all values where the plan splits none
            value_states = value_states[:, local_heads(n_kv_heads, n_kv_heads, n_kv_here, self.k_proj)]
        cos, sin = position_embeddings
        if self.query is None:
            query_states = self.q_proj(hidden_states).view(shape).transpose(1, 2)
            key_states = key_states.view(shape).transpose(1, 2)
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)
        else:
            here = local_heads(self.config.num_attention_heads, n_kv_heads, n_kv_here, self.k_proj)
            query_states = turn(self.query(hidden_states, key_states, heads=here), cos, sin)
            key_states = turn(key_states.view(shape).transpose(1, 2), cos, sin)

        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, **how)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attend(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **self.window,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()), attn_weights


class ReducedLayer:
    """What a reduced decoder layer is beside the stock one of its family."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = ReducedAttention(config, layer_idx)
        self.attention_skip, self.mlp_skip = config.attention_skip, config.mlp_skip
        if not config.norms:
            self.input_layernorm, self.post_attention_layernorm = nn.Identity(), nn.Identity()

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        middle = hidden_states + attended if self.attention_skip else attended
        thought = self.mlp(self.post_attention_layernorm(middle))
        return middle + thought if self.mlp_skip else thought


# Tensors of a layer, by the names that these classes give them: not what quantizers store beside a weight.
OWN = re.compile(r"(.*\.)?(layers|h)\.\d+\..*\.(weight|bias|index|gain|mix|down|up|pivots)")
FIELDS = (  # by what a tensor's name holds: the field of config.json that decides whether and how it is stored
    ("lm_head", "tie_word_embeddings and vocab_size"),
    (".query.bias", "query_maps and attention_bias"),
    (".query.", "query_maps"),
    ("q_proj.", "query_maps"),
    ("pivots", "value_maps"),
    ("v_proj.weight", "value_maps"),
    ("o_proj.weight", "output_maps"),
    (".mlp.", "mlp_bias and sizes"),
    (".bias", "attention_bias"),
    ("", "num_hidden_layers, norms, shared_layers and sizes"),
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


class ReducedPreTrained:
    """How models of reduced layers start and load."""

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
            later = {name for name in self.state_dict() if re.search(r"(^|\.)layers\.[1-9]", name)}
            loading_info.unexpected_keys |= later - loading_info.missing_keys
        super().mark_tied_weights_as_initialized(loading_info)

    def reduced_attentions(self) -> list[ReducedAttention]:
        return [module for module in self.modules() if isinstance(module, ReducedAttention)]

    def check_indices(self) -> None:
        """Raise ValueError unless all channel numbers are those of config.json's `index_sha256`.

        `from_pretrained` and a first pass do so themselves. Call it where neither runs: after other ways of loading,
        before the model is compiled or exported.
        """
        for attention in self.reduced_attentions():
            check_indices_(attention)

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
        for attention, gauged in [(each, each.v_proj) for each in self.reduced_attentions()]:
            if isinstance(gauged, GaugedValue) and gauged.weight.device.type != "meta" and len(gauged.weight):
                dense[gauged] = dense.get(gauged) or gauged.written_out()
                attention.v_proj = dense[gauged]
                layer = attention.layer_idx
                self.config.value_maps[layer] = "dense"
                if self.config.index_sha256 is not None:
                    self.config.index_sha256[layer] = index_digest(attention.indices())

    def _init_weights(self, module):
        if isinstance(module, QueryMap):
            module.reset_parameters()
        elif isinstance(module, GaugedValue):
            module.reset_parameters(self.config.initializer_range)
        else:
            super()._init_weights(module)


@contextmanager
def no_layers(config) -> Iterator[None]:
    """Let stock classes build no decoder layers while the block runs: they would be thrown away, twice a load."""
    n_layers, config.num_hidden_layers = config.num_hidden_layers, 0
    try:
        yield
    finally:
        config.num_hidden_layers = n_layers


class ReducedModel:
    """A base model of reduced layers."""

    layer_class: type

    def __init__(self, config):
        with no_layers(config):
            super().__init__(config)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(config.num_hidden_layers))
        if not config.norms:
            self.norm = nn.Identity()
        if config.shared_layers:
            share_first(self.layers, "self_attn")
            self._tied_weights_keys = {f"layers.{i}.": "layers.0." for i in range(1, len(self.layers))}
        self.post_init()
        if "gauge" in config.value_maps:  # tensor parallelism knows no such module: each process has all values
            self._tp_plan = {name: how for name, how in self._tp_plan.items() if not name.endswith("v_proj")}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict:
        return {}  # the shared modules are one object; transformers' own way to tie them would cut their biases


def share_first(layers: nn.ModuleList, attention: str) -> None:
    """Let every layer compute with the first one's modules; only the place of its keys in the cache is its own."""
    for layer in layers[1:]:
        for name, _ in list(layers[0].named_children()):
            if name != attention:
                setattr(layer, name, getattr(layers[0], name))
        # One dictionary of them: what is exchanged in the first layer, as by adapters, is exchanged in all.
        getattr(layer, attention)._modules = getattr(layers[0], attention)._modules


class QectomyLlamaConfig(LlamaConfig):
    """LlamaConfig plus `query_maps`, one query-map name a layer, and what else can differ from Llama.

    `value_maps` names `dense` or `gauge` a layer, `output_maps` `dense` or `merged` (no W_O: the MLP reads the heads);
    None: all dense. `index_sha256` is the sha256 of the channel numbers that a layer stores, null where it stores none;
    with it no layer computes with other ones. `norms`, `attention_skip` and `mlp_skip` leave out what they name when
    false; with `shared_layers` all layers compute with the first one's weights, stored once.
    """

    model_type = "qectomy_llama"
    query_maps: list[str] | None = None
    value_maps: list[str] | None = None
    output_maps: list[str] | None = None
    index_sha256: list[str | None] | None = None
    norms: bool = True
    attention_skip: bool = True
    mlp_skip: bool = True
    shared_layers: bool = False

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_layers(self)


class ReducedLlamaDecoderLayer(ReducedLayer, LlamaDecoderLayer):
    pass


class QectomyLlamaPreTrainedModel(ReducedPreTrained, LlamaPreTrainedModel):
    config: QectomyLlamaConfig
    _no_split_modules = ["ReducedLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": ReducedLlamaDecoderLayer, "attentions": ReducedAttention}


class QectomyLlamaModel(ReducedModel, QectomyLlamaPreTrainedModel, LlamaModel):
    layer_class = ReducedLlamaDecoderLayer


class QectomyLlamaForCausalLM(QectomyLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: QectomyLlamaConfig):
        with no_layers(config):
            super().__init__(config)
        self.model = QectomyLlamaModel(config)
        self.post_init()


class QectomyMistralConfig(MistralConfig):
    """MistralConfig plus the fields of QectomyLlamaConfig."""

    model_type = "qectomy_mistral"
    query_maps: list[str] | None = None
    value_maps: list[str] | None = None
    output_maps: list[str] | None = None
    index_sha256: list[str | None] | None = None
    norms: bool = True
    attention_skip: bool = True
    mlp_skip: bool = True
    shared_layers: bool = False
    attention_bias: bool = False  # ReducedAttention builds on Llama's, which asks

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.attention_bias = False  # stock Mistral has none, whatever config.json says
        check_layers(self)


class ReducedMistralDecoderLayer(ReducedLayer, MistralDecoderLayer):
    pass


class QectomyMistralPreTrainedModel(ReducedPreTrained, MistralPreTrainedModel):
    config: QectomyMistralConfig
    _no_split_modules = ["ReducedMistralDecoderLayer"]
    _can_record_outputs = {"hidden_states": ReducedMistralDecoderLayer, "attentions": ReducedAttention}


class QectomyMistralModel(ReducedModel, QectomyMistralPreTrainedModel, MistralModel):
    layer_class = ReducedMistralDecoderLayer


class QectomyMistralForCausalLM(QectomyMistralPreTrainedModel, MistralForCausalLM):
    def __init__(self, config: QectomyMistralConfig):
        with no_layers(config):
            super().__init__(config)
        self.model = QectomyMistralModel(config)
        self.post_init()


class QectomyQwen2Config(Qwen2Config):
    """Qwen2Config plus the fields of QectomyLlamaConfig."""

    model_type = "qectomy_qwen2"
    query_maps: list[str] | None = None
    value_maps: list[str] | None = None
    output_maps: list[str] | None = None
    index_sha256: list[str | None] | None = None
    norms: bool = True
    attention_skip: bool = True
    mlp_skip: bool = True
    shared_layers: bool = False
    head_dim: int | None = None  # ReducedAttention builds on Llama's, which asks for these
    attention_bias: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.attention_bias = True  # of queries, keys and values; W_O has none
        check_layers(self)


class ReducedQwen2DecoderLayer(ReducedLayer, Qwen2DecoderLayer):
    pass


class QectomyQwen2PreTrainedModel(ReducedPreTrained, Qwen2PreTrainedModel):
    config: QectomyQwen2Config
    _no_split_modules = ["ReducedQwen2DecoderLayer"]
    _can_record_outputs = {"hidden_states": ReducedQwen2DecoderLayer, "attentions": ReducedAttention}


class QectomyQwen2Model(ReducedModel, QectomyQwen2PreTrainedModel, Qwen2Model):
    layer_class = ReducedQwen2DecoderLayer


class QectomyQwen2ForCausalLM(QectomyQwen2PreTrainedModel, Qwen2ForCausalLM):
    def __init__(self, config: QectomyQwen2Config):
        with no_layers(config):
            super().__init__(config)
        self.model = QectomyQwen2Model(config)
        self.post_init()


for _family in ("Llama", "Mistral", "Qwen2"):
    _config, _base, _causal = (globals()[f"Qectomy{_family}{kind}"] for kind in ("Config", "Model", "ForCausalLM"))
    _config.register_for_auto_class("AutoConfig")
    _base.register_for_auto_class("AutoModel")
    _causal.register_for_auto_class("AutoModelForCausalLM")
