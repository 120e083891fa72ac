"""The audit's pass over a text: what it measures is what the stock model's own norms put out."""

import tempfile

import numpy as np
import pytest
import torch
from damage import edit_weights
from tiny_models import save_tiny, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.audit import audit_layers, text_moments, white_moments
from qectomy.errors import NonFiniteError, TextError
from qectomy.surgery.stream_basis import random_orthogonal
from qectomy.text.text import read_source
from qectomy.text.windows import make_windows

SHAPES = ["llama", "biases", "wide-heads", "bf16", "sharded", "mistral", "qwen2", "rope-llama3", "gpt2", "gpt2-inverse"]
WINDOWS = dict(tokens=640, context=32)  # 20 windows: more than a batch


def stock_moments(folder, ids):
    """E[x̂ᵀx̂] of each layer by hooks on the norms of transformers' own model, and its W_Q (D, H*K), as numpy."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    gpt2 = model.config.model_type == "gpt2"
    blocks = model.transformer.h if gpt2 else model.model.layers
    sums = [0.0] * len(blocks)

    def add(layer, x):
        rows = x.detach().flatten(0, 1).double().numpy()
        sums[layer] = sums[layer] + rows.T @ rows

    for layer, block in enumerate(blocks):
        norm = block.ln_1 if gpt2 else block.input_layernorm
        norm.register_forward_hook(lambda _, __, out, layer=layer: add(layer, out))
    with torch.no_grad():
        model(ids)
        weights = [
            b.attn.c_attn.weight[:, : model.config.n_embd] if gpt2 else b.self_attn.q_proj.weight.T for b in blocks
        ]
    return [total / ids.numel() for total in sums], [W.detach().double().numpy() for W in weights]


def rank_by_svd(C, W, energy=0.99):
    values, vectors = np.linalg.eigh(C)
    held = np.linalg.svd(np.sqrt(values.clip(0))[:, None] * (vectors.T @ W), compute_uv=False) ** 2
    return next(r for r in range(1, len(held) + 1) if held[:r].sum() >= energy * held.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_those_of_the_stock_model(shape, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, ids = tiny_checkpoint(shape), tokens(20, 32)
    expected, _ = stock_moments(folder, ids)
    found = [C.numpy() for C in text_moments(open_checkpoint(folder), ids)]
    assert len(found) == len(expected) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == np.float64
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(found[0] - found[1]).max() > 0.1 * np.abs(found[0]).max()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shape", ["llama", "gpt2", "wide-heads"])
def test_records_of_a_text(shape, tiny_checkpoint, raven):
    folder = tiny_checkpoint(shape)
    steps = []
    records = audit_layers(
        open_checkpoint(folder), [str(raven)], **WINDOWS, progress=lambda *step: steps.append(step[:2])
    )
    assert steps == [(1, 2), (2, 2)]
    windows = make_windows(tiny_tokenizer(), [read_source(str(raven))], **WINDOWS, vocab_size=320)
    expected, weights = stock_moments(folder, windows.tokens)
    for record, C, W in zip(records, expected, weights, strict=True):
        assert record["rank_99"] == rank_by_svd(C, W)
        assert record["rank_99_data"] == "raven.txt, 640 tokens"
        assert record["cond"] == pytest.approx(np.linalg.cond(W), rel=1e-6)
        assert record["d_model"] == 32
        assert record["cond_why_not"] is None
        if shape == "wide-heads":
            assert record["distance_from_orthogonal"] is None
            assert "n_heads * d_head is 48, more than d_model 32" in record["distance_why_not"]
        else:
            assert 0.2 < record["distance_from_orthogonal"] < 1
            assert record["distance_why_not"] is None


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_white_states_are_the_gains_alone(shape, tiny_checkpoint):
    folder = tiny_checkpoint(shape)
    source = open_checkpoint(folder)
    records, moments = audit_layers(source, [], tokens=1, context=32), list(white_moments(source))
    _, weights = stock_moments(folder, tokens(1, 4))
    names = {"llama": "model.layers.{}.input_layernorm.weight", "gpt2": "transformer.h.{}.ln_1.weight"}
    for layer, (record, C, W) in enumerate(zip(records, moments, weights, strict=True)):
        gamma = source.read(names[shape].format(layer)).double().numpy()
        np.testing.assert_array_equal(C.numpy(), np.diag(gamma**2))
        assert record["rank_99"] == rank_by_svd(np.diag(gamma**2), W)
        assert record["rank_99_data"] == "white states"


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
def test_a_layer_that_goes_exactly_is_told_from_one_that_does_not(shape, tiny_copy):
    folder, size = tiny_copy(shape), 32
    generator = torch.Generator().manual_seed(0)
    theta = random_orthogonal(size, generator)
    if shape == "gpt2":  # LayerNorm asks for a turn that keeps the mean direction, and sees no mean
        basis, _ = torch.linalg.qr(torch.cat([torch.ones(size, 1).double(), theta[:, 1:]], 1))
        turn = torch.block_diag(torch.ones(1, 1).double(), random_orthogonal(size - 1, generator))
        theta = basis @ turn @ basis.T + torch.randn(size, generator=generator)

    def fold(weights):
        if shape == "gpt2":
            W = theta / weights["transformer.h.1.ln_1.weight"][:, None]
            weights["transformer.h.1.attn.c_attn.weight"][:, :size] = W
        else:
            W = theta / weights["model.layers.1.input_layernorm.weight"][:, None]
            weights["model.layers.1.self_attn.q_proj.weight"].copy_(W.T)

    edit_weights(folder, fold)
    other, exact = audit_layers(open_checkpoint(folder), [], tokens=1, context=32)
    assert other["distance_from_orthogonal"] > 0.2
    assert exact["distance_from_orthogonal"] < 1e-6


def test_a_singular_layer_has_reasons_in_the_place_of_numbers(tiny_copy):
    folder = tiny_copy()

    def equal_columns(weights):
        weights["model.layers.1.self_attn.q_proj.weight"][9] = weights["model.layers.1.self_attn.q_proj.weight"][8]

    edit_weights(folder, equal_columns)
    first, second = audit_layers(open_checkpoint(folder), [], tokens=1, context=32)
    assert first["cond"] > 1
    assert (second["cond"], second["distance_from_orthogonal"]) == (None, None)
    assert "singular" in second["cond_why_not"]
    assert "the block of head 1 is singular" in second["distance_why_not"]
    assert second["rank_99"] <= 31


def test_several_texts_are_named(tiny_checkpoint, raven, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(raven.read_text().upper())
    found = audit_layers(open_checkpoint(tiny_checkpoint()), [str(raven), str(other)], **WINDOWS)
    assert found[0]["rank_99_data"] == "raven.txt, other.txt, 640 tokens"


@pytest.mark.parametrize(
    "shape, text, sizes, message",
    [
        ("llama", "raven", dict(tokens=31, context=32), r"--tokens 31 is fewer than one window of 32"),
        ("gpt2", "raven", dict(tokens=500, context=129), r"longer than the model's 128 positions"),
        ("llama", "short", dict(tokens=64, context=32), r"short.txt has \d+ tokens, fewer than one window of 32"),
    ],
)
def test_what_is_too_short_is_refused(shape, text, sizes, message, tiny_checkpoint, raven, tmp_path):
    (tmp_path / "short.txt").write_text("Nevermore.")
    name = str(raven) if text == "raven" else str(tmp_path / "short.txt")
    with pytest.raises(TextError, match=message):
        audit_layers(open_checkpoint(tiny_checkpoint(shape)), [name], **sizes)


def test_what_is_not_finite_is_refused_and_leaves_no_file(tmp_path, raven, monkeypatch):
    folder, scratch = save_tiny(tmp_path / "model"), tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    edit_weights(folder, lambda weights: weights["model.layers.0.mlp.down_proj.weight"].mul_(1e38))
    with pytest.raises(NonFiniteError, match=r"the original model's layer 0 gives NaN or Inf on windows 0 to 15"):
        audit_layers(open_checkpoint(folder), [str(raven)], **WINDOWS)
    edit_weights(folder, lambda weights: weights["model.layers.1.self_attn.q_proj.weight"].fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=r"model.layers.1.self_attn.q_proj.weight holds NaN"):
        audit_layers(open_checkpoint(folder), [], tokens=1, context=32)
    assert list(scratch.iterdir()) == []


def test_an_interrupt_leaves_no_file(tiny_checkpoint, raven, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def stop(*_):
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        audit_layers(open_checkpoint(tiny_checkpoint()), [str(raven)], **WINDOWS, progress=stop)
    assert list(tmp_path.iterdir()) == []
    assert caught.tb  # which keeps the frames: it is not their end that removed the file
