"""Each fold of a norm, alone, on whole stock models in float64: the same logits, and the norm's part gone."""

import pytest
import torch
from foldings import Float64Norm, in_float64, relative
from tiny_models import tiny_model, tokens

from qectomy.errors import UnsupportedArchitecture
from qectomy.surgery.basis import Basis
from qectomy.surgery.layer import fold_norm
from qectomy.surgery.norm_fusion import absorb_gain, absorb_shift, centre, centre_rows

EXACT = 1e-12


def blocks(model):
    """Yield (norm, what reads it) of a model: the names are transformers'."""
    if hasattr(model, "transformer"):
        for block in model.transformer.h:
            yield block.ln_1, [block.attn.c_attn]
            yield block.ln_2, [block.mlp.c_fc]
        yield model.transformer.ln_f, [model.lm_head]
    else:
        for layer in model.model.layers:
            attention = layer.self_attn
            yield layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]
            yield layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]
        yield model.model.norm, [model.lm_head]


def edit(module, change):
    """Replace a module's (W (in, out), bias) by what `change` makes of it."""
    is_linear = isinstance(module, torch.nn.Linear)
    W = module.weight.T if is_linear else module.weight
    new, bias = change((W.clone(), None if module.bias is None else module.bias.clone()))
    W.copy_(new)
    if module.bias is not None:
        module.bias.copy_(bias)


@pytest.mark.parametrize("name", ["gpt2-untied", "llama", "biases", "mqa", "mistral", "qwen2", "wide-heads"])
@torch.no_grad()
def test_the_gain_goes_into_the_readers(name):
    """GPT-2's shift, which stands behind its gain, is divided by it first."""
    model, ids = in_float64(tiny_model(name)), tokens()
    expected, done = model(ids).logits, 0
    for norm, readers in blocks(model):
        gamma = norm.weight.clone()
        assert (gamma - 1).abs().max() > 0.1
        for reader in readers:
            edit(reader, lambda projection, gamma=gamma: absorb_gain(gamma, projection))
        norm.weight.fill_(1)
        if getattr(norm, "bias", None) is not None:
            norm.bias /= gamma
        done += 1
    assert done == 5
    assert relative(model(ids).logits, expected) < EXACT
    readers[0].weight[0] *= 1.001
    assert relative(model(ids).logits, expected) > 1e-6


@torch.no_grad()
def test_the_shift_goes_into_the_readers_biases():
    """The head has no bias, so the final norm keeps its shift."""
    model, ids = in_float64(tiny_model("gpt2")), tokens()
    expected, final = model(ids).logits, model.transformer.ln_f
    for norm, readers in list(blocks(model))[:-1]:
        beta = norm.bias.clone()
        for reader in readers:
            edit(reader, lambda projection, beta=beta: absorb_shift(beta, projection))
        norm.bias.zero_()
    assert not any(norm.bias.any() for norm, _ in blocks(model) if norm is not final)
    assert relative(model(ids).logits, expected) < EXACT
    model.transformer.h[1].mlp.c_fc.bias[3] += 1e-3
    assert relative(model(ids).logits, expected) > 1e-7


def test_a_shift_needs_a_bias():
    with pytest.raises(UnsupportedArchitecture, match="a norm's shift cannot be folded into a projection that has no"):
        absorb_shift(torch.ones(3), (torch.ones(3, 2), None))


@torch.no_grad()
def test_centred_writers_make_layernorm_an_rmsnorm():
    """All that writes the stream less its mean: the same logits, states of mean 0, and no mean left to take out."""
    model, ids = in_float64(tiny_model("gpt2-untied")), tokens()
    expected = model(ids).logits
    transformer = model.transformer
    for table in (transformer.wte, transformer.wpe):
        table.weight.copy_(centre_rows(table.weight))
    for block in transformer.h:
        for writer in (block.attn.c_proj, block.mlp.c_proj):
            edit(writer, centre)
    assert relative(model(ids).logits, expected) < EXACT
    seen = []

    class RootMeanSquare(Float64Norm):
        def __init__(self, norm):
            torch.nn.Module.__init__(self)
            self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

        def forward(self, x):
            seen.append(x.mean(-1).abs().max().item())
            return super().forward(x) + self.bias

    for block in transformer.h:
        block.ln_1, block.ln_2 = RootMeanSquare(block.ln_1), RootMeanSquare(block.ln_2)
    transformer.ln_f = RootMeanSquare(transformer.ln_f)
    assert relative(model(ids).logits, expected) < EXACT
    assert len(seen) == 5
    assert max(seen) < 1e-14
    transformer.h[0].mlp.c_proj.bias += 1e-3  # one mean that is left shows
    assert relative(model(ids).logits, expected) > 1e-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_types_are_kept_and_inputs_left(dtype):
    W, bias, gamma = (torch.randn(*shape).to(dtype) for shape in ((4, 3), (3,), (4,)))
    kept = [tensor.clone() for tensor in (W, bias, gamma)]
    results = [*absorb_gain(gamma, (W, bias)), *absorb_shift(gamma, (W, bias)), *centre((W, bias))]
    assert {tensor.dtype for tensor in results} == {dtype}
    assert all(torch.equal(a, b) for a, b in zip((W, bias, gamma), kept, strict=True))
    exact = (gamma.double()[:, None] * W.double()).to(dtype)  # in float64, rounded once
    assert torch.equal(results[0], exact)
    assert centre((W, None))[1] is None
    assert absorb_gain(gamma, (W, None))[1] is None


def turned(kind, D=8):
    noise = torch.randn(D, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    if kind == "RMSNorm":
        return torch.linalg.qr(noise)[0]
    B = torch.linalg.qr(torch.cat([torch.ones(D, 1, dtype=torch.float64), noise[:, 1:]], 1))[0]
    inner = torch.linalg.qr(noise[1:, 1:])[0]
    return B @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), inner) @ B.T


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("one_gain", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_a_norm_whose_state_turns(kind, one_gain, keep):
    """norm(x Θ) read by Θ⁻¹ diag(g) W is norm(x) read by W."""
    draw = torch.Generator().manual_seed(1)
    x, W, gamma, beta = (torch.randn(*s, generator=draw).double() for s in ((5, 8), (8, 3), (8,), (8,)))
    if one_gain:
        gamma.fill_(1.3)
    theta = turned(kind)
    shift = beta if kind == "LayerNorm" else None

    def norm(x, gamma, beta):
        x = x - x.mean(-1, keepdim=True) if kind == "LayerNorm" else x
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gamma
        return x if beta is None else x + beta

    new_gain, new_shift, g = fold_norm(gamma, shift, Basis(theta, theta.T), keep=keep)
    expected = norm(x, gamma, shift) @ W
    found = norm(x @ theta, new_gain, new_shift) @ theta.T @ (g[:, None] * W)
    assert relative(found, expected) < 1e-13
    stays = keep and one_gain
    assert torch.equal(new_gain, gamma if stays else torch.ones(8).double())
    assert torch.equal(g, torch.ones(8).double() if stays else gamma)
    assert (new_shift is None) == (shift is None)


def test_a_channel_that_is_shift_alone_cannot_turn():
    gamma, beta, theta = torch.ones(4).double(), torch.zeros(4).double(), torch.eye(4).double()
    gamma[2] = 0
    gain, shift, g = fold_norm(gamma, beta, Basis(theta, theta))
    assert torch.equal(shift, torch.zeros(4).double())
    assert g[2] == 0
    assert (gain == 1).all()
    beta[2] = 0.1
    with pytest.raises(UnsupportedArchitecture, match="a gain of 0 beside a shift"):
        fold_norm(gamma, beta, Basis(theta, theta))
