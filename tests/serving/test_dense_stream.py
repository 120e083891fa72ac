"""The tensors that an engine gets are those of the same model with nothing gauged and nothing shared."""

import random

import pytest
import torch
from foldings import in_float64
from tiny_models import tokens, variant_model
from variant_reference import ungauge

from qectomy.modeling.modeling_qectomy_llama import index_digest
from qectomy.serving.dense_stream import dense_config, dense_tensors, own_tensors

GAUGES = {  # family, query maps, value maps, what else differs
    "llama": ("llama", ["dense", "key-shared", "select"], ["gauge", "gauge", "dense"], {}),
    "llama-narrow": ("llama", ["low-rank:3", "dense"], ["gauge", "gauge"], {"head_dim": 6}),
    "mistral": ("mistral", ["identity", "dense"], ["dense", "gauge"], {}),
    "qwen2": ("qwen2", ["identity", "dense"], ["gauge", "gauge"], {}),
    "gpt2": ("gpt2", ["gauge", "key-shared", "dense"], ["gauge", "gauge", "dense"], {}),
    "llama-shared": ("llama", ["key-shared"] * 3, ["gauge"] * 3, {"shared_layers": True}),
    "llama-biases": ("llama", ["dense"] * 3, ["gauge", "dense", "gauge"], {"attention_bias": True}),
    "gpt2-shared": ("gpt2", ["gauge"] * 3, ["gauge"] * 3, {"shared_layers": True}),
}


def stored_model(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A float64 model with random pivots, and the tensors that its checkpoint holds."""
    family, queries, values, fields = GAUGES[name]
    maps = dict(num_hidden_layers=len(queries), query_maps=queries, value_maps=values)
    model = in_float64(variant_model(family, **maps, **fields))
    generator = torch.Generator().manual_seed(7)
    for key, buffer in model.named_buffers():
        if key.endswith("pivots"):
            for head in buffer:
                head.copy_(torch.randperm(model.config.hidden_size, generator=generator)[: len(head)])
    state = model.state_dict()
    if fields.get("shared_layers"):
        state = {key: tensor for key, tensor in state.items() if not any(f".{i}." in key for i in (1, 2))}
    return model, {key: tensor for key, tensor in state.items() if key != "lm_head.weight" or not tied(model)}


def tied(model: torch.nn.Module) -> bool:
    return bool(model.config.tie_word_embeddings)


def shuffled(state: dict[str, torch.Tensor], seed: int = 3) -> list[tuple[str, torch.Tensor]]:
    items = list(state.items())
    random.Random(seed).shuffle(items)
    return items


@pytest.mark.parametrize("name", GAUGES)
def test_the_dense_model_computes_the_same(name):
    model, state = stored_model(name)
    config = dense_config(model.config)
    assert set(config.value_maps) == {"dense"}
    assert "gauge" not in config.query_maps
    assert "gauge" in model.config.value_maps, "the stored config was changed"
    dense = in_float64(type(model)(config)).eval()
    stream = dict(dense_tensors(shuffled(state), model.config))
    assert not any("pivots" in key or "gauge" in key for key in stream)
    wanted = {key for key in dense.state_dict() if key != "lm_head.weight" or not tied(model)}
    assert stream.keys() == wanted
    dense.load_state_dict(stream, strict=False)
    ids = tokens()
    with torch.no_grad():
        got, expected = dense(ids).logits, model(ids).logits
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_identity_blocks_are_written_out_by_their_definition():
    model, state = stored_model("llama")
    at = "model.layers.1.self_attn.v_proj."
    dense = dict(dense_tensors(state.items(), model.config))[at + "weight"]
    assert torch.equal(dense, ungauge(state[at + "pivots"], state[at + "weight"].T).T)

    model, state = stored_model("gpt2")
    at = "transformer.h.0.attn.c_attn."
    stream = dict(dense_tensors(state.items(), model.config))
    d_model, gauged = model.config.n_embd, ungauge(state[at + "gauge.pivots"], state[at + "gauge.weight"])
    parts = [gauged[:, :d_model], state[at + "weight"], gauged[:, d_model:]]
    assert torch.equal(stream[at + "weight"], torch.cat(parts, 1))
    bias = state[at + "gauge.bias"]
    assert torch.equal(stream[at + "bias"], torch.cat([bias, torch.zeros(2 * d_model, dtype=bias.dtype)]))


def test_a_stream_without_identity_blocks_comes_through_as_it_is():
    model = variant_model("gpt2", query_maps=["key-shared", "dense"])
    items = shuffled(model.state_dict())
    got = list(dense_tensors(items, model.config))
    assert len(got) == len(items)
    assert all(a is b and one == other for (one, a), (other, b) in zip(got, items, strict=True))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("lost", ["pivots", "weight"])
def test_an_identity_block_without_all_its_tensors_is_refused(name, lost):
    model, state = stored_model(name)
    projection = "h.0.attn.c_attn.gauge." if name == "gpt2" else "layers.0.self_attn.v_proj."
    (key,) = (key for key in state if key.endswith(projection + lost))
    del state[key]
    with pytest.raises(ValueError, match=r"layer 0: by config\.json .* has identity blocks"):
        list(dense_tensors(state.items(), model.config))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dense_weights_beside_a_config_with_identity_blocks_are_refused(name):
    model, state = stored_model(name)
    dense = dict(dense_tensors(state.items(), model.config))
    with pytest.raises(ValueError, match="The config and the weights are of two models"):
        list(dense_tensors(dense.items(), model.config))


def test_pivots_that_the_config_does_not_tell_of_are_refused():
    """As config.json has their sha256; with the right ones the dense model is told of the other layers' alone."""
    for name, gauged in (("llama", [True, True, False]), ("gpt2", [True, True, False])):
        model, state = stored_model(name)
        attentions = model.reduced_attentions()
        model.config.index_sha256 = [index_digest(attention.indices()) for attention in attentions]
        kept = dense_config(model.config).index_sha256
        assert kept == [None if own else model.config.index_sha256[i] for i, own in enumerate(gauged)]
        stream = dict(dense_tensors(state.items(), model.config))
        type(model)(dense_config(model.config)).load_state_dict(stream, strict=False)
        for layer in (0, 1):
            model.config.index_sha256[layer] = "0" * 64
            with pytest.raises(ValueError, match=f"layer {layer}: the channel numbers in memory"):
                list(dense_tensors(state.items(), model.config))
            model.config.index_sha256[layer] = index_digest(attentions[layer].indices())
        model.config.index_sha256 = None
        assert dense_config(model.config).index_sha256 is None


def test_own_tensors_are_those_of_the_query_maps_and_their_buffers():
    model = variant_model("llama", query_maps=["select", "key-shared"])
    at = "model.layers.{}.self_attn.query.{}".format
    assert set(own_tensors(model)) == {at(0, "index"), at(0, "gain"), at(1, "mix")}
