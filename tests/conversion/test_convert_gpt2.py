"""GPT-2 checkpoints as they are found: under older names, with buffers, and those that cannot be converted."""

import json
import shutil

import pytest
import torch
from conversions import convert_tiny, hashes, measured
from safetensors.torch import load_file, save_file

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.errors import CheckpointError, TextError, UnsupportedArchitecture


@pytest.mark.parametrize("context, match", [(129, "longer than the model's 128 positions; use 128"), (8, "16 or more")])
def test_windows_that_do_not_suit_are_refused(context, match, tiny_checkpoint, raven, tmp_path):
    with pytest.raises(TextError, match=match):
        convert_tiny(tiny_checkpoint("gpt2"), tmp_path / "out", "select", raven, context=context, tokens=1024)
    assert not list(tmp_path.iterdir())


def as_openai_published(folder, mask_dtype):
    """Rewrite a GPT-2 checkpoint as the hub's first one is: no `transformer.`, and the causal mask as buffers."""
    tensors = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert len(old) == len(tensors)
    assert not set(old) & set(tensors)
    for layer in range(2):
        old[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 128, 128).tril().to(mask_dtype)
        old[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(old, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool, torch.uint8])
def test_a_checkpoint_as_openai_published_it(mask_dtype, tiny_checkpoint, tiny_copy, raven, tmp_path):
    """Its tensors are found under the names they have without a prefix; the result is the same to the byte."""
    source = tiny_copy("gpt2")
    as_openai_published(source, mask_dtype)
    before = hashes(source)
    report = convert_tiny(source, tmp_path / "out", "0=identity,1=select", raven)
    assert hashes(source) == before
    usual = convert_tiny(tiny_checkpoint("gpt2"), tmp_path / "usual", "0=identity,1=select", raven)
    ours, theirs = hashes(tmp_path / "out"), hashes(tmp_path / "usual")
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {
        "qectomy.json",
        "qectomy-run.json",
        "README.md",
    }  # names, times
    assert report["perplexity"] == usual["perplexity"]
    assert report["perplexity"]["before"] == pytest.approx(measured(source, raven), rel=1e-4)
    assert report["parameters"] == usual["parameters"]  # a mask is no parameter
    assert report["bytes"] == usual["bytes"]
    assert report["source"]["sha256"]["model.safetensors"] == before["model.safetensors"]


def test_a_gpt2_that_cannot_be_converted_is_refused(tiny_copy):
    for field, value, error, message in (
        ("add_cross_attention", True, UnsupportedArchitecture, "cross-attention"),
        ("n_head", 5, CheckpointError, "n_embd 32 is not a multiple of n_head 5"),
    ):
        folder = tiny_copy("gpt2")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, field: value}))
        with pytest.raises(error, match=message):
            open_checkpoint(folder)
        shutil.rmtree(folder)
