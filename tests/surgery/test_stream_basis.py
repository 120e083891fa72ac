"""Turning the residual stream keeps the function: every logit, where it should be exact, in float64."""

import pytest
import torch
from tiny_models import tiny_model, tokens
from torch import nn

from qectomy.models.architectures import FAMILIES
from qectomy.surgery.stream_basis import FAR, StreamBasis, random_basis, random_orthogonal

LLAMA = FAMILIES["llama"]
SHAPES = ["llama", "mha", "mqa", "biases", "wide-heads", "narrow-heads", "mistral", "qwen2", "rope-yarn"]


class Float64Norm(nn.Module):
    """RMSNorm that stays in float64; transformers' own casts to float32 and hides what lies below 3e-8."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def float64_model(name, **overrides):
    model = tiny_model(name, **overrides).double()
    model.config._attn_implementation = "sdpa"  # the eager one takes the softmax in float32
    for layer in model.model.layers:
        layer.input_layernorm = Float64Norm(layer.input_layernorm)
        layer.post_attention_layernorm = Float64Norm(layer.post_attention_layernorm)
    model.model.norm = Float64Norm(model.model.norm)
    return model


def basis_for(model, tied, seed=0):
    table = model.get_input_embeddings().weight.detach()
    return random_basis(
        model.model.norm.weight.detach().clone(), table.square().sum(0), tied, torch.Generator().manual_seed(seed)
    )


def turn(model, basis, family=LLAMA):
    """Put every tensor of an untied model in the new basis, in place."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i in range(len(model.model.layers)):
        prefix = family.prefix(i)
        layer = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        before = {name: tensor.clone() for name, tensor in layer.items()}
        turned = basis.layer(family, layer)
        assert turned.keys() == layer.keys()
        assert all(torch.equal(layer[name], before[name]) for name in layer)  # the input is left alone
        state |= {prefix + name: tensor for name, tensor in turned.items()}
    state[family.embedding] = basis.embedding_rows(state[family.embedding])
    state[family.head] = basis.head_rows(state[family.head])
    state[f"{family.final_norm}.weight"] = basis.new_final_gain
    model.load_state_dict(state, strict=True)


@torch.no_grad()
def logits(model):
    return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("name", SHAPES)
def test_a_turned_model_gives_the_same_logits(name):
    model = float64_model(name)
    expected = logits(model)
    old = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    turn(model, basis_for(model, tied=False), FAMILIES[model.config.model_type])
    assert (logits(model) - expected).abs().max() < 1e-10 * expected.abs().max()
    changed = [key for key, tensor in model.state_dict().items() if not torch.allclose(tensor, old[key], atol=1e-3)]
    readers_biases = (".q_proj.bias", ".k_proj.bias", ".v_proj.bias", ".gate_proj.bias", ".up_proj.bias")
    assert set(old) - set(changed) == {key for key in old if key.endswith(readers_biases)}
    for layer in model.model.layers:
        assert (layer.input_layernorm.weight == 1).all()


@pytest.mark.parametrize("spoil", ["input_layernorm", "post_attention_layernorm", "final_norm", "output_bias"])
def test_what_is_not_folded_shows(spoil, monkeypatch):
    """The comparison above can fail: leave one gain (or bias) out of the fold, and the logits move."""
    model = float64_model("biases")
    expected, basis = logits(model), basis_for(model, tied=False)
    fold = StreamBasis.layer

    def partial(self, family, tensors, scaled_embedding=False):
        given = dict(tensors)
        if spoil.endswith("layernorm"):
            given[f"{spoil}.weight"] = torch.ones_like(given[f"{spoil}.weight"])
        out = fold(self, family, given, scaled_embedding)
        if spoil == "output_bias":
            out["self_attn.o_proj.bias"] = tensors["self_attn.o_proj.bias"]
        return out

    monkeypatch.setattr(StreamBasis, "layer", partial)
    if spoil == "final_norm":
        basis = StreamBasis(basis.theta, torch.ones_like(basis.final_gain), basis.common_gain, tied=False)
    turn(model, basis)
    assert (logits(model) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_theta_is_orthogonal_and_seeded():
    eye = torch.eye(24, dtype=torch.float64)
    thetas = [random_orthogonal(24, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert (thetas[0] @ thetas[0].T - eye).abs().max() < 1e-13
    assert torch.equal(thetas[0], thetas[1])
    assert not torch.allclose(thetas[0], thetas[2])
    assert thetas[0].abs().max() < 0.95  # every channel carries some of everything
    draws = torch.stack([random_orthogonal(4, torch.Generator().manual_seed(seed)) for seed in range(99)])
    assert draws.sign().mean(0).abs().max() < 0.4  # no sign is preferred, on the diagonal neither


def test_states_go_there_and_back():
    model = float64_model("llama")
    basis = basis_for(model, tied=False)
    x = torch.randn(3, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    turned = basis.states(x)
    assert not torch.allclose(turned, x, atol=0.1)
    torch.testing.assert_close(basis.original_states(turned), x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)
    assert basis.states(x.float()).dtype == torch.float32


class TestTiedHead:
    @pytest.fixture
    def model(self):
        model = float64_model("tied")
        with torch.no_grad():
            gain = model.model.norm.weight
            gain[3], gain[11], gain[20] = 60.0, 1e-3, -55.0
            model.get_input_embeddings().weight[:, [3, 20]] *= 1e-2  # as in real models, such channels start small
        return model

    def test_head_rows_keep_every_logit_of_given_states(self, model):
        basis = basis_for(model, tied=True)
        x = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        head, norm = model.lm_head.weight.detach(), model.model.norm
        with torch.no_grad():
            expected = norm(x) @ head.T
            norm.weight.copy_(basis.new_final_gain)
            turned = norm(basis.states(x)) @ basis.head_rows(head).T
        assert (turned - expected).abs().max() < 1e-11 * expected.abs().max()
        assert torch.equal(basis.embedding_rows(head), basis.head_rows(head))  # one matrix for both

    def test_channels_with_a_far_gain_are_not_turned(self, model):
        basis = basis_for(model, tied=True)
        eye = torch.eye(32, dtype=torch.float64)
        assert (basis.theta @ basis.theta.T - eye).abs().max() < 1e-13
        size = (basis.final_gain / basis.common_gain).abs()
        assert ((size > 1 / FAR) & (size < FAR)).all()
        for channel in (3, 11, 20):
            assert torch.equal(basis.theta[channel], eye[channel])
            assert torch.equal(basis.theta[:, channel], eye[channel])
            assert basis.new_final_gain[channel] == basis.final_gain[channel]
        others = basis.theta[[i for i in range(32) if i not in (3, 11, 20)]]
        assert others.abs().max() < 0.95

    def test_the_first_attention_reads_the_scaled_embedding_as_the_original(self, model):
        """Up to the size that RMSNorm takes out, what W_Q, W_K and W_V give on the stored rows is what they gave."""
        basis = basis_for(model, tied=True)
        layer = {n: t.detach() for n, t in model.model.layers[0].state_dict().items()}
        rows = model.get_input_embeddings().weight.detach()[:50]
        stored = basis.embedding_rows(rows)
        for scaled in (True, False):
            turned = basis.layer(LLAMA, layer, scaled_embedding=scaled)
            for name in ("q_proj", "k_proj", "v_proj"):
                key = f"self_attn.{name}.weight"
                expected = (rows * layer["input_layernorm.weight"]) @ layer[key].T
                found = stored @ turned[key].T
                assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9) == scaled
        for name in ("mlp.gate_proj.weight", "self_attn.o_proj.weight"):
            assert torch.equal(turned[name], basis.layer(LLAMA, layer, scaled_embedding=True)[name])
