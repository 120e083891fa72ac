"""Llama and Mistral without W_Q: the model code that travels beside a reduced checkpoint's weights.

This file stands alone: it imports only torch and transformers, so a folder that holds it loads with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` where qectomy is not installed.

A layer's query map is one of (x̂ is the hidden state after the input norm, n_heads * d_head query channels)

    identity       q = x̂                               channel i of x̂ is query channel i (i modulo d_model)
    select         q = x̂[index] * gain                 chosen channels
    key-shared     q_h = (x̂ W_K^g(h)) A_h              the head's own key, before RoPE, mixed
    low-rank:R     q = x̂ * gain + (x̂ U) V              U: d_model x R, V: R x n_heads*d_head
    dense          q = x̂ W_Q                           the stock projection

Theory: Karbevski & Mijoski, "Key and Value Weights Are Probably All You Need", arXiv 2510.23912.
Dimensions: B batch, T positions, D d_model, H n_heads, G n_kv_heads, K d_head, R rank.
"""

from collections.abc import Callable

import torch
from torch import nn
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


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether transformers has read this tensor from a file; of torch's own initialisers it takes care itself."""
    return getattr(tensor, "_is_hf_initialized", False)


class QueryMap(nn.Module):
    """What stands where W_Q stood: (x̂ (B, T, D), keys before RoPE (B, T, G*K)) -> queries (B, T, H*K)."""

    def __init__(self, config, rank: int = 0):
        super().__init__()
        self.n_query = config.num_attention_heads * config.head_dim
        self.bias = nn.Parameter(torch.zeros(self.n_query)) if config.attention_bias else None

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        query = self.project(hidden, key)
        return query if self.bias is None else query + self.bias

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
        self.n_kv_heads, self.d_head = config.num_key_value_heads, config.head_dim
        self.mix = nn.Parameter(torch.eye(self.d_head).repeat(config.num_attention_heads, 1, 1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if is_loaded(self.mix):
            return
        with torch.no_grad():
            self.mix.copy_(torch.eye(self.d_head).expand_as(self.mix))

    def project(self, hidden, key):
        mix = self.mix.view(self.n_kv_heads, -1, self.d_head, self.d_head)  # (G, H/G, K, K)
        mix = mix.transpose(1, 2).reshape(self.n_kv_heads, self.d_head, -1)  # (G, K, H/G*K)
        shared = key.reshape(-1, self.n_kv_heads, self.d_head).transpose(0, 1)  # (G, B*T, K)
        return torch.bmm(shared, mix).transpose(0, 1).reshape(*key.shape[:-1], -1)  # (B, T, H*K)


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


def check_query_maps(config) -> None:
    if not config.query_maps:
        config.query_maps = ["dense"] * config.num_hidden_layers
    if len(config.query_maps) != config.num_hidden_layers:
        raise ValueError(f"query_maps names {len(config.query_maps)} layers, the model has {config.num_hidden_layers}")


class ReducedAttention(LlamaAttention):
    """Stock attention whose queries come from the layer's query map. Nothing is kept between calls."""

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        query = build_query(config, layer_idx)
        if query is not None:
            del self.q_proj
            self.query = query

    def project_query(self, hidden_states: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Queries before RoPE, (B, T, H*K), from x̂ (B, T, D) and the keys before RoPE (B, T, G*K)."""
        return self.q_proj(hidden_states) if hasattr(self, "q_proj") else self.query(hidden_states, key)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)

        key_states = self.k_proj(hidden_states)
        query_states = self.project_query(hidden_states, key_states).view(heads).transpose(1, 2)
        key_states = key_states.view(heads).transpose(1, 2)
        value_states = self.v_proj(hidden_states).view(heads).transpose(1, 2)

        cos, sin = position_embeddings
        query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

        if past_key_values is not None:
            key_states, value_states = past_key_values.update(key_states, value_states, self.layer_idx)

        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if isinstance(self.config, MistralConfig):
            kwargs["sliding_window"] = self.config.sliding_window
        attn_output, attn_weights = attend(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(attn_output.reshape(*input_shape, -1).contiguous()), attn_weights


class QectomyLlamaConfig(LlamaConfig):
    """LlamaConfig plus `query_maps`: one query-map name a layer."""

    model_type = "qectomy_llama"
    query_maps: list[str] | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        check_query_maps(self)


class ReducedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: QectomyLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = ReducedAttention(config, layer_idx)


class QectomyLlamaPreTrainedModel(LlamaPreTrainedModel):
    config: QectomyLlamaConfig
    _no_split_modules = ["ReducedLlamaDecoderLayer"]
    _can_record_outputs = {"hidden_states": ReducedLlamaDecoderLayer, "attentions": ReducedAttention}

    def _init_weights(self, module):
        if isinstance(module, QueryMap):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class QectomyLlamaModel(QectomyLlamaPreTrainedModel, LlamaModel):
    def __init__(self, config: QectomyLlamaConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(ReducedLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class QectomyLlamaForCausalLM(QectomyLlamaPreTrainedModel, LlamaForCausalLM):
    def __init__(self, config: QectomyLlamaConfig):
        super().__init__(config)
        self.model = QectomyLlamaModel(config)
        self.post_init()


class QectomyMistralConfig(MistralConfig):
    """MistralConfig plus `query_maps`: one query-map name a layer."""

    model_type = "qectomy_mistral"
    query_maps: list[str] | None = None
    attention_bias: bool = False  # ReducedAttention builds on Llama's, which asks

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.attention_bias = False  # stock Mistral has none, whatever config.json says
        check_query_maps(self)


class ReducedMistralDecoderLayer(MistralDecoderLayer):
    def __init__(self, config: QectomyMistralConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = ReducedAttention(config, layer_idx)


class QectomyMistralPreTrainedModel(MistralPreTrainedModel):
    config: QectomyMistralConfig
    _no_split_modules = ["ReducedMistralDecoderLayer"]
    _can_record_outputs = {"hidden_states": ReducedMistralDecoderLayer, "attentions": ReducedAttention}

    def _init_weights(self, module):
        if isinstance(module, QueryMap):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class QectomyMistralModel(QectomyMistralPreTrainedModel, MistralModel):
    def __init__(self, config: QectomyMistralConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(ReducedMistralDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.post_init()


class QectomyMistralForCausalLM(QectomyMistralPreTrainedModel, MistralForCausalLM):
    def __init__(self, config: QectomyMistralConfig):
        super().__init__(config)
        self.model = QectomyMistralModel(config)
        self.post_init()


for _family in ("Llama", "Mistral"):
    _config, _base, _causal = (globals()[f"Qectomy{_family}{kind}"] for kind in ("Config", "Model", "ForCausalLM"))
    _config.register_for_auto_class("AutoConfig")
    _base.register_for_auto_class("AutoModel")
    _causal.register_for_auto_class("AutoModelForCausalLM")
