"""The shipped GPT-2 class: each query map against its formula, and the ways transformers runs the model."""

import json
import shutil

import pytest
import torch
from tiny_models import EVERY_MAP, GPT2_SHAPES, load_reduced, tiny_model, tokens
from transformers import AutoConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qectomy.modeling.modeling_qectomy_gpt2 import (
    QUERY_MODULES,
    QectomyGPT2Config,
    QectomyGPT2ForCausalLM,
    ReducedGPT2Attention,
)
from qectomy.models.query_maps import NAMES

# B batch, T positions, D d_model, H n_heads, K d_head; H*K = D

FULL = [name for name in GPT2_SHAPES if name not in ("gpt2-bf16", "gpt2-sharded")]
SCALES = ["gpt2", "gpt2-inverse", "gpt2-unscaled"]


def query_formula(name, state, hidden, key, n_heads):
    """The queries (B, T, D) of a map, channel by channel, from its definition."""
    queries, d_head = torch.zeros_like(hidden), hidden.shape[-1] // n_heads
    for channel in range(hidden.shape[-1]):
        h, i = divmod(channel, d_head)
        own = hidden[..., channel]
        if name == "identity":
            queries[..., channel] = own
            continue
        if name == "select":
            value = hidden[..., state["index"][channel].item()]
        elif name == "key-shared":
            value = torch.einsum("btk,k->bt", key[..., h * d_head : (h + 1) * d_head], state["mix"][h, :, i])
        else:
            value = own * state["gain"][channel]
            value = value + torch.einsum("btd,rd,r->bt", hidden, state["down"], state["up"][channel])
        queries[..., channel] = value + state["bias"][channel]
    return queries


def config_of(name, **overrides):
    return QectomyGPT2Config(**{**tiny_model(name).config.to_dict(), "query_maps": None, **overrides})


@pytest.mark.parametrize("query_map", list(QUERY_MODULES))
@pytest.mark.parametrize("name", ["gpt2", "gpt2-one-head"])
def test_queries_follow_the_formula(name, query_map):
    config, generator = config_of(name), torch.Generator().manual_seed(1)
    module = QUERY_MODULES[query_map](config, 3).double()
    for key, tensor in module.state_dict().items():
        if key == "index":
            tensor.copy_(torch.randint(config.n_embd, tensor.shape, generator=generator))
        else:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    hidden, key = (torch.randn(2, 5, config.n_embd, generator=generator, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        queries = module(hidden, key)
        expected = query_formula(query_map, module.state_dict(), hidden, key, config.n_head)
    torch.testing.assert_close(queries, expected, rtol=1e-12, atol=1e-12)
    assert ("bias" in module.state_dict()) == (query_map != "identity")  # whose bias lies in the norm's shift


def dense_of(name, state, W_K):
    """Return (W_Q (D, D), as in x W, and b_Q (D,)) of a map in float64: the matrix written out, not probed."""
    W_Q, channels = torch.zeros_like(W_K), torch.arange(len(W_K))
    if name == "identity":
        return torch.eye(len(W_K), dtype=W_K.dtype), torch.zeros_like(W_K[0])
    if name == "select":
        W_Q[state["index"].long(), channels] = 1
    elif name == "key-shared":
        d_head = state["mix"].shape[1]
        for h, mix in enumerate(state["mix"]):
            own = slice(h * d_head, (h + 1) * d_head)
            W_Q[:, own] = W_K[:, own] @ mix
    else:
        W_Q = torch.diag(state["gain"]) + state["down"].T @ state["up"].T
    return W_Q, state["bias"]


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def stock_with_maps(reduced, name, factor=1.0):
    """The stock model with every map of `reduced` written out, key and value biases 0, W_Q and b_Q times `factor`."""
    config = reduced.config
    stock, d_model = tiny_model(name, num_hidden_layers=config.n_layer).double(), config.n_embd
    with torch.no_grad():
        for block, ours, query_map in zip(stock.transformer.h, reduced.transformer.h, config.query_maps, strict=True):
            theirs = block.attn.c_attn
            if query_map != "dense":
                state = {key: tensor.detach() for key, tensor in ours.attn.c_attn.query.state_dict().items()}
                W_K = ours.attn.c_attn.weight.detach()[:, :d_model]
                W_Q, b_Q = dense_of(query_map.partition(":")[0], state, W_K)
                theirs.weight[:, :d_model], theirs.bias[:d_model], theirs.bias[d_model:] = W_Q, b_Q, 0
            theirs.weight[:, :d_model] *= factor
            theirs.bias[:d_model] *= factor
    return stock


@pytest.mark.parametrize("query_map", ["identity", "select", "key-shared", "low-rank:3"])
@pytest.mark.parametrize("name", FULL)
def test_equals_the_stock_model_with_that_matrix(tiny_reduced, name, query_map):
    """Layers 0 and 2 have the map, layer 1 the stock projection; float64 logits agree to 1e-12."""
    reduced = load_reduced(tiny_reduced((query_map, "dense", query_map), name), torch.float64)
    stock, ids = stock_with_maps(reduced, name), tokens(2, 70)
    with torch.no_grad():
        expected = stock(ids).logits
        assert relative(reduced(ids).logits, expected) < 1e-12
        stock.transformer.h[0].attn.c_attn.bias[:32] += 0.01
        assert relative(reduced(ids).logits, stock(ids).logits) > 1e-7
        reduced.transformer.h[2].attn.c_attn.weight[0, 0] *= 1.01
        assert relative(reduced(ids).logits, expected) > 1e-7


@pytest.mark.parametrize("scale", [0.05, 0.5])
@pytest.mark.parametrize("name", SCALES)
def test_softmax_scale_is_a_factor_on_the_queries(tiny_reduced, tmp_path, name, scale):
    """Logits times s in place of 1/√K are those of W_Q and b_Q times s √K, in dense layers too."""
    folder = shutil.copytree(tiny_reduced(("select", "dense", "low-rank:3"), name), tmp_path / "reduced")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "softmax_scale": scale}))
    reduced, ids = load_reduced(folder, torch.float64), tokens(2, 40)
    own = 1.0 if name == "gpt2-unscaled" else 8**-0.5  # four heads of 8 channels
    with torch.no_grad():
        logits = reduced(ids).logits
        assert relative(logits, stock_with_maps(reduced, name, scale / own)(ids).logits) < 1e-12
        assert relative(logits, stock_with_maps(reduced, name)(ids).logits) > 1e-3


@pytest.mark.parametrize("options", [{}, dict(softmax_scale=0.1)], ids=str)
@pytest.mark.parametrize("name", SCALES)
def test_attention_is_told_of_the_scale(name, options, monkeypatch):
    """Every attention function takes it as an argument; flash attention scales by nothing else."""
    told = []

    def record(*args, scaling=None, **kwargs):
        told.append(scaling)
        return sdpa_attention_forward(*args, scaling=scaling, **kwargs)

    config = config_of(name, n_layer=5, query_maps=list(EVERY_MAP), **options)
    model = QectomyGPT2ForCausalLM(config).eval()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    model(tokens())
    one = options.get("softmax_scale") or (1.0 if name == "gpt2-unscaled" else 8**-0.5)
    assert told == pytest.approx([one / (layer + 1 if name == "gpt2-inverse" else 1) for layer in range(5)])


@pytest.mark.parametrize("name", SCALES)
def test_eager_with_reordering_equals_sdpa(tiny_reduced, monkeypatch, name):
    calls, reordered = [], ReducedGPT2Attention._upcast_and_reordered_attn

    def watch(self, *args, **kwargs):
        calls.append(self.layer_idx)
        return reordered(self, *args, **kwargs)

    monkeypatch.setattr(ReducedGPT2Attention, "_upcast_and_reordered_attn", watch)
    model, ids = load_reduced(tiny_reduced(EVERY_MAP, name, reorder_and_upcast_attn=True)), tokens(2, 40)
    with torch.no_grad():
        expected = model(ids).logits
        assert calls == []
        model.set_attn_implementation("eager")
        assert relative(model(ids).logits, expected) < 1e-5
        assert calls == [0, 1, 2, 3, 4]
        model.transformer.h[0].attn.scaling *= 1.01
        assert relative(model(ids).logits, expected) > 1e-4


def test_names_agree():
    """The names that recipes know are those that the modelling file builds."""
    assert set(NAMES) == {*QUERY_MODULES, "dense"}
    assert QectomyGPT2Config(n_layer=3).query_maps == ["dense"] * 3
    assert QectomyGPT2Config(num_hidden_layers=3).query_maps == ["dense"] * 3
    with pytest.raises(ValueError, match=r"query_maps names 1 layers, the model has 3"):
        QectomyGPT2Config(n_layer=3, query_maps=["select"])
    with pytest.raises(ValueError, match=r"query_maps must be a list with a name for each layer, not 'select'"):
        QectomyGPT2Config(n_layer=6, query_maps="select")
    bad = config_of("gpt2", query_maps=["dense", "sélect"])
    with pytest.raises(ValueError, match="layer 1: unknown query map 'sélect'; known: identity, select"):
        QectomyGPT2ForCausalLM(bad)


def test_the_auto_classes_know_it():
    config = AutoConfig.for_model("qectomy_gpt2")
    assert type(config) is QectomyGPT2Config
    assert config.softmax_scale is None
