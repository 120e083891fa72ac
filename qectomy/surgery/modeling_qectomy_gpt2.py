"""GPT-2 without W_Q: the model code that travels beside a reduced checkpoint's weights.

This file stands alone: it imports only torch and transformers, so a folder that holds it loads with
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` where qectomy is not installed.

The attention is transformers' own; only its fused projection `c_attn` is another module, which projects keys and
values alone and puts the queries of the layer's query map in front. A query map is one of

    identity       q = x̂                         the paper's W_Q = I; a query bias lies in the LayerNorm's shift
    select         q = x̂[index] + b              chosen channels; their gains lie in W_K
    key-shared     q_h = (x̂ W_K^h) A_h + b       the head's own key, mixed
    low-rank:R     q = x̂ * gain + (x̂ U) V + b    U: D x R, V: R x D
    dense          the stock c_attn

Keys need no bias, since softmax does not see it, and values none, since it lies in the output's bias.
Theory: Karbevski & Mijoski, "Key and Value Weights Are Probably All You Need", arXiv 2510.23912.
Dimensions: B batch, T positions, D d_model, H n_heads, K d_head, R rank; H*K = D.
"""

import torch
from torch import nn
from transformers.models.gpt2.configuration_gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2Attention,
    GPT2Block,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
)


def is_loaded(tensor: torch.Tensor) -> bool:
    """Whether transformers has read this tensor from a file; of torch's own initialisers it takes care itself."""
    return getattr(tensor, "_is_hf_initialized", False)


class QueryMap(nn.Module):
    """What stands where W_Q stood: (x̂ (B, T, D), keys (B, T, D)) -> queries (B, T, D)."""

    def __init__(self, config, rank: int = 0):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class IdentityQuery(QueryMap):
    """q = x̂. Stores nothing."""

    def __init__(self, config, rank: int = 0):
        nn.Module.__init__(self)

    def reset_parameters(self) -> None:
        pass

    def forward(self, hidden, key):
        return hidden


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

    def forward(self, hidden, key):
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

    def forward(self, hidden, key):
        heads, d_head, _ = self.mix.shape
        shared = key.reshape(-1, heads, d_head).transpose(0, 1)  # (H, B*T, K)
        return torch.bmm(shared, self.mix).transpose(0, 1).reshape(key.shape) + self.bias


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

    def forward(self, hidden, key):
        correction = nn.functional.linear(nn.functional.linear(hidden, self.down), self.up, self.bias)
        return hidden * self.gain + correction


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


class QectomyGPT2Config(GPT2Config):
    """GPT2Config plus `query_maps`, one query-map name a layer, and `softmax_scale`.

    `softmax_scale` is the factor on the logits before the softmax in place of 1/√K; None keeps GPT-2's own. The
    paper's models take half of it.
    """

    model_type = "qectomy_gpt2"
    query_maps: list[str] | None = None
    softmax_scale: float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not self.query_maps:
            self.query_maps = ["dense"] * self.n_layer
        if len(self.query_maps) != self.n_layer:
            raise ValueError(f"query_maps names {len(self.query_maps)} layers, the model has {self.n_layer}")


class ReducedProjection(nn.Module):
    """Stands where `c_attn` stood: x̂ (B, T, D) -> queries, keys and values side by side, (B, T, 3D).

    `weight` is W_K and W_V side by side, (D, 2D), in GPT-2's layout (in, out).
    """

    def __init__(self, config: QectomyGPT2Config, query: nn.Module):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, 2 * config.hidden_size))
        self.query = query

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        key_value = torch.matmul(hidden, self.weight)
        key = key_value[..., : self.weight.shape[0]]
        return torch.cat([self.query(hidden, key), key_value], dim=-1)


class ReducedGPT2Attention(GPT2Attention):
    """Stock attention whose queries come from the layer's query map. Nothing is kept between calls."""

    def __init__(self, config: QectomyGPT2Config, layer_idx: int):
        super().__init__(config, layer_idx=layer_idx)
        query = build_query(config, layer_idx)
        if query is not None:
            self.c_attn = ReducedProjection(config, query)
        if config.softmax_scale is not None:
            if not hasattr(self, "scaling"):
                raise ImportError("a GPT-2 with a softmax_scale of its own needs transformers 5.4 or newer")
            own = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
            self.scaling *= config.softmax_scale / own


class ReducedGPT2Block(GPT2Block):
    def __init__(self, config: QectomyGPT2Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attn = ReducedGPT2Attention(config, layer_idx)
        self.attn.c_proj.writes_stream = self.mlp.c_proj.writes_stream = True


class QectomyGPT2PreTrainedModel(GPT2PreTrainedModel):
    config: QectomyGPT2Config
    _no_split_modules = ["ReducedGPT2Block"]
    _can_record_outputs = {"hidden_states": ReducedGPT2Block, "attentions": ReducedGPT2Attention}

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, QueryMap):
            module.reset_parameters()
        elif isinstance(module, ReducedProjection):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif getattr(module, "writes_stream", False):
            # GPT-2 draws these smaller; transformers does it from modules that it leaves out in other people's classes.
            nn.init.normal_(module.weight, std=self.config.initializer_range / (2 * self.config.n_layer) ** 0.5)


class QectomyGPT2Model(QectomyGPT2PreTrainedModel, GPT2Model):
    def __init__(self, config: QectomyGPT2Config):
        super().__init__(config)
        self.h = nn.ModuleList(ReducedGPT2Block(config, i) for i in range(config.n_layer))
        self.post_init()


class QectomyGPT2ForCausalLM(QectomyGPT2PreTrainedModel, GPT2LMHeadModel):
    def __init__(self, config: QectomyGPT2Config):
        super().__init__(config)
        self.transformer = QectomyGPT2Model(config)
        self.post_init()


QectomyGPT2Config.register_for_auto_class("AutoConfig")
QectomyGPT2Model.register_for_auto_class("AutoModel")
QectomyGPT2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
