"""The shipped classes: each query map against its formula, and the ways transformers runs a model."""

import pytest
import torch
from tiny_models import EVERY_MAP, LLAMA_SHAPES, load_reduced, tiny_model, tokens
from transformers import AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import qectomy
from qectomy.modeling.modeling_qectomy_llama import (
    QUERY_MODULES,
    QectomyLlamaConfig,
    QectomyLlamaForCausalLM,
)
from qectomy.models.query_maps import NAMES

# B batch, T positions, D d_model, H n_heads, G n_kv_heads, K d_head


def query_formula(name, state, hidden, key, config):
    """The queries (B, T, H, K) of a map, channel by channel, from its definition."""
    n_heads, d_head = config.num_attention_heads, config.head_dim
    group = n_heads // config.num_key_value_heads
    queries = torch.zeros(*hidden.shape[:2], n_heads, d_head, dtype=hidden.dtype)
    keys = key.unflatten(-1, (config.num_key_value_heads, d_head))
    for h in range(n_heads):
        for i in range(d_head):
            channel = h * d_head + i
            own = hidden[..., channel % config.hidden_size]
            if name == "identity":
                value = own
            elif name == "select":
                value = hidden[..., state["index"][channel].item()] * state["gain"][channel]
            elif name == "key-shared":
                value = torch.einsum("btk,k->bt", keys[:, :, h // group], state["mix"][h, :, i])
            else:
                value = own * state["gain"][channel]
                value = value + torch.einsum("btd,rd,r->bt", hidden, state["down"], state["up"][channel])
            queries[:, :, h, i] = value + state["bias"][channel] if "bias" in state else value
    return queries


def scrambled_query(name, config, generator):
    module = QUERY_MODULES[name](config, 3).double()
    for key, tensor in module.state_dict().items():
        if key == "index":
            tensor.copy_(torch.randint(config.hidden_size, tensor.shape, generator=generator))
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module


def config_of(name, **overrides):
    return QectomyLlamaConfig(**{**tiny_model(name).config.to_dict(), "query_maps": None, **overrides})


@pytest.mark.parametrize("query_map", list(QUERY_MODULES))
@pytest.mark.parametrize("name", ["llama", "mha", "mqa", "biases", "wide-heads", "narrow-heads"])
def test_queries_follow_the_formula(name, query_map):
    config, generator = config_of(name), torch.Generator().manual_seed(1)
    module = scrambled_query(query_map, config, generator)
    hidden = torch.randn(2, 5, config.hidden_size, generator=generator, dtype=torch.float64)
    key = torch.randn(2, 5, config.num_key_value_heads * config.head_dim, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        queries = module(hidden, key).unflatten(-1, (-1, config.head_dim))
        expected = query_formula(query_map, module.state_dict(), hidden, key, config)
    torch.testing.assert_close(queries, expected, rtol=1e-12, atol=1e-12)
    assert ("bias" in module.state_dict()) == config.attention_bias


def dense_of(name, state, W_K, b_K, config):
    """Return (W_Q (H*K, D), b_Q (H*K)) of a map in float64: the matrix written out, not probed."""
    n_heads, d_head, d_model = config.num_attention_heads, config.head_dim, config.hidden_size
    n_query, group = n_heads * d_head, config.num_attention_heads // config.num_key_value_heads
    W_Q, b_Q = torch.zeros(n_query, d_model).double(), torch.zeros(n_query).double()
    rows = torch.arange(n_query)
    if name == "identity":
        W_Q[rows, rows % d_model] = 1
    elif name == "select":
        W_Q[rows, state["index"].long()] = state["gain"]
    elif name == "key-shared":
        for h in range(n_heads):
            own, shared = (
                slice(h * d_head, (h + 1) * d_head),
                slice(h // group * d_head, (h // group + 1) * d_head),
            )
            W_Q[own] = state["mix"][h].T @ W_K[shared]
            if b_K is not None:
                b_Q[own] = state["mix"][h].T @ b_K[shared]
    else:
        W_Q[rows, rows % d_model] = state["gain"]
        W_Q += state["up"] @ state["down"]
    return W_Q, b_Q + state.get("bias", 0)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("query_map", ["identity", "select", "key-shared", "low-rank:3"])
@pytest.mark.parametrize("name", [name for name in LLAMA_SHAPES if name not in ("bf16", "fp16", "sharded")])
def test_equals_the_stock_model_with_that_matrix(tiny_reduced, name, query_map):
    """Layer 0 has the map, layer 1 the stock projection; float64 logits agree to 1e-12."""
    reduced = load_reduced(tiny_reduced((query_map, "dense"), name), torch.float64)
    config, attention = reduced.config, reduced.model.layers[0].self_attn
    state = {key: tensor.detach() for key, tensor in attention.query.state_dict().items()}
    key_bias = attention.k_proj.bias.detach() if config.attention_bias else None
    W_Q, b_Q = dense_of(query_map.partition(":")[0], state, attention.k_proj.weight.detach(), key_bias, config)
    stock = tiny_model(name).double()
    with torch.no_grad():
        stock.model.layers[0].self_attn.q_proj.weight.copy_(W_Q)
        if config.attention_bias:
            stock.model.layers[0].self_attn.q_proj.bias.copy_(b_Q)
        ids = tokens(2, 70)  # beyond every sliding window and rope's original length
        expected = stock(ids).logits
        assert relative(reduced(ids).logits, expected) < 1e-12
        attention.k_proj.weight[0, 0] *= 1.01
        assert relative(reduced(ids).logits, expected) > 1e-7


@pytest.mark.parametrize("name, window", [("mistral", 5), ("mistral-full", None), ("llama", None)])
def test_attention_is_told_of_the_window(tiny_reduced, monkeypatch, name, window):
    """Flash attention takes the window as an argument and looks at no mask."""
    told = []

    def record(*args, sliding_window=None, **kwargs):
        told.append(sliding_window)
        return sdpa_attention_forward(*args, **kwargs)

    model = load_reduced(tiny_reduced(EVERY_MAP, name))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    model(tokens())
    assert told == [window] * len(EVERY_MAP)


def test_names_agree():
    """The names that recipes know are those that the modelling file builds."""
    assert set(NAMES) == {*QUERY_MODULES, "dense"}
    assert QectomyLlamaConfig(num_hidden_layers=3).query_maps == ["dense"] * 3
    with pytest.raises(ValueError, match=r"query_maps names 1 layers, the model has 3"):
        QectomyLlamaConfig(num_hidden_layers=3, query_maps=["select"])
    with pytest.raises(ValueError, match=r"query_maps must be a list with a name for each layer, not 'select'"):
        QectomyLlamaConfig(num_hidden_layers=6, query_maps="select")
    bad = config_of("llama", query_maps=["dense", "sélect"])
    with pytest.raises(ValueError, match="layer 1: unknown query map 'sélect'; known: identity, select"):
        QectomyLlamaForCausalLM(bad)


def test_registering_twice_is_harmless():
    qectomy.register()
    qectomy.register()
    assert AutoConfig.for_model("qectomy_llama").model_type == "qectomy_llama"
