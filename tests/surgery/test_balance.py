"""Balanced weights: the same function, with blocks of numbers of like size."""

import pytest
import torch
from foldings import in_float64
from tiny_models import EVERY_MAP, SHAPES, load_reduced, save_reduced, save_tiny, tokens
from transformers import AutoModelForCausalLM

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.surgery.balance import balance_channels, balance_heads, cosine_basis
from qectomy.surgery.materialize import materialize


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def uneven(dtype=torch.float64, spread=4.0):
    """Return a norm and readers of 16 channels whose gains differ by orders of magnitude, as those of `identity` do."""
    gain = torch.exp(normal(16, seed=1) * spread / 2)
    norm = {"weight": gain.to(dtype), "bias": (gain * normal(16, seed=2)).to(dtype)}
    readers = {role: ((normal(16, 8, seed=3 + i) / gain[:, None]).to(dtype), None) for i, role in enumerate("qkv")}
    return norm, readers


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if "dtype" not in shape])
@torch.no_grad()
def test_a_materialised_float64_model_is_the_same_function(tmp_path, name):
    source = save_tiny(tmp_path / "source", name, dtype="float64", num_hidden_layers=5)
    folder, ids = save_reduced(tmp_path / "reduced", source, EVERY_MAP), tokens(2, 40)
    materialize(open_checkpoint(folder, reduced=True), tmp_path / "stock")
    expected = in_float64(load_reduced(folder, torch.float64))(ids).logits
    stock = in_float64(AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float64).eval())
    assert ((stock(ids).logits - expected).abs().max() / expected.abs().max()).item() < 1e-12
    gains = dict(stock.named_parameters())[
        "transformer.h.0.ln_1.weight" if "gpt2" in name else "model.layers.0.input_layernorm.weight"
    ]
    gains[3] *= 1 + 1e-9
    assert ((stock(ids).logits - expected).abs().max() / expected.abs().max()).item() > 1e-12


def test_channels_have_one_scale_and_the_same_products():
    norm, readers = uneven()
    x = normal(30, 16, seed=9)
    scaled, balanced = balance_channels(norm, readers, of=("k", "v"))
    for role, (W, _) in readers.items():
        before = (x * norm["weight"] + norm["bias"]) @ W
        after = (x * scaled["weight"] + scaled["bias"]) @ balanced[role][0]
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)
    rms = torch.cat([balanced["k"][0], balanced["v"][0]], 1).square().mean(1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, rms[0].item()), rtol=1e-12, atol=0)
    before = torch.cat([readers["k"][0], readers["v"][0]], 1).square().mean(1).sqrt()
    assert before.max() > 50 * before.min()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_channels_without_gain_weights_or_range_stay(dtype):
    norm, readers = uneven(dtype, spread=0.5)
    norm["weight"][0] = 0.0  # only the shift is read there
    for role in ("k", "v"):
        readers[role][0][1] = 0.0  # nothing but queries reads this one
        readers[role][0][2] = torch.finfo(dtype).tiny  # of gains that would vanish beside queries that overflow
    norm["weight"][2] = 2 * torch.finfo(dtype).tiny
    norm["weight"][3] = 2 * torch.finfo(dtype).tiny  # a quarter of this lacks digits
    for role, (W, _) in readers.items():
        W[3] = W[4] * (0.1 if role in "kv" else 1)
    scaled, balanced = balance_channels(norm, readers, of=("k", "v"))
    for name, vector in scaled.items():
        assert vector.to(dtype).isfinite().all()
        assert (vector[0] == 0) == (name == "weight")
        assert torch.equal(vector[1:4].to(dtype), norm[name][1:4])
    assert not torch.equal(scaled["bias"][0], norm["bias"][0].double())
    for role, (W, _) in balanced.items():
        assert W.to(dtype).isfinite().all()
        assert torch.equal(W[1:4].to(dtype), readers[role][0][1:4])
    assert (scaled["weight"][4:] == norm["weight"][4:].double()).sum() <= 1  # the median channel


def test_readers_that_are_all_zero_stay():
    norm, readers = uneven()
    readers |= {role: (torch.zeros(16, 8, dtype=torch.float64), None) for role in "kv"}
    scaled, balanced = balance_channels(norm, readers, of=("k", "v"))
    assert torch.equal(scaled["weight"], norm["weight"])
    assert torch.equal(balanced["q"][0], readers["q"][0])


@pytest.mark.parametrize("rank", [6, 3, 0])
def test_heads_keep_their_product_and_share_its_singular_values(rank):
    left, right = normal(2, 20, 6, seed=1), normal(2, 6, 33, seed=2)
    left[:, :, rank:] = 0.0
    new_left, new_right = balance_heads(left, right)
    torch.testing.assert_close(new_left @ new_right, left @ right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(new_left.mT @ new_left, new_right @ new_right.mT, rtol=1e-10, atol=1e-10)


def test_an_identity_block_is_spread_over_its_rows():
    """The largest number of a row over its rms, which is what a block's step goes by."""
    left, right = 0.1 * normal(1, 64, 8, seed=1), normal(1, 8, 64, seed=2)
    left[0, :8] = torch.eye(8)
    peak = lambda W: (W.abs().amax(1) / W.square().mean(1).sqrt()).max().item()  # noqa: E731
    assert peak(balance_heads(left, right)[0]) < 0.8 * peak(left)


@pytest.mark.parametrize("size", [1, 2, 6, 32])
def test_the_cosine_basis_is_orthogonal(size):
    R = cosine_basis(size)
    torch.testing.assert_close(R @ R.T, torch.eye(size).double(), rtol=0, atol=1e-13)
