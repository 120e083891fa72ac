"""Checkpoints of nanoGPT's relatives are refused with what they are, and with two lines that save them anew."""

from types import SimpleNamespace

import pytest
import torch
from nanogpt_checkpoints import made
from tiny_models import tiny_model, tokens
from transformers import AutoModelForCausalLM

from qectomy.errors import CheckpointError
from qectomy.surgery.nanogpt import import_nanogpt


def refusal(path) -> str:
    """What the import of this file says; it writes nothing."""
    with pytest.raises(CheckpointError) as caught:
        import_nanogpt(path, path.parent / "out")
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name]
    return str(caught.value)


def run_its_lines(told: str, **changes: str) -> None:
    """Run the two lines of Python that a message ends in, with names that only the user knows put in."""
    lines = [line.strip() for line in told.splitlines() if line.startswith("    ")]
    assert len(lines) == 2, told
    text = "\n".join(lines)
    for name, value in changes.items():
        text = text.replace(name, value)
    exec(text, {})


def same_logits(folder, other) -> bool:
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(each)(tokens()).logits for each in (folder, other)]
    return torch.equal(*logits)


VARIANTS = [dict(), dict(bias=False), dict(tie_weights=False), dict(query_mode="identity", scale=8**-0.5)]


@pytest.mark.parametrize("keys", [(), ("model",), ("state_dict",), ("model_state_dict",)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_sizes_that_shapes_tell_are_filled_in(variant, keys, tmp_path, monkeypatch):
    source = made(drop=("scale",) if "scale" not in variant else (), **variant)
    import_nanogpt(source.save(tmp_path / "whole.pt"), tmp_path / "whole")
    (alone := tmp_path / "alone").mkdir()
    state = {f"module.{name}": tensor for name, tensor in source.state.items()}
    torch.save({keys[0]: state, "step": 3} if keys else state, alone / "ckpt.pt")
    told = refusal(alone / "ckpt.pt")
    assert "nanoGPT's names, but no dictionary 'model_args'" in told
    assert "N_HEAD is the number of heads" in told
    assert '"gelu_new"' in told
    monkeypatch.chdir(tmp_path)
    run_its_lines(told, N_HEAD="4")
    import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "out")
    assert same_logits(tmp_path / "out", tmp_path / "whole")


def test_heads_of_a_config_are_taken(tmp_path):
    torch.save({"model": made().state, "config": {"n_head": 4}}, tmp_path / "ckpt.pt")
    assert "n_head=4" in (told := refusal(tmp_path / "ckpt.pt"))
    assert "N_HEAD" not in told


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("key", [None, "model"])
def test_a_state_dict_of_transformers(family, key, tmp_path, monkeypatch):
    tiny_model(family).save_pretrained(tmp_path / "whole")
    (alone := tmp_path / "alone").mkdir()
    state = tiny_model(family).state_dict()
    torch.save({key: state, "model_args": {"n_embd": 32}} if key else state, alone / "model.pth")
    told = refusal(alone / "model.pth")
    assert f"it is a {'GPT-2' if family == 'gpt2' else 'Llama'} by transformers' names" in told
    monkeypatch.chdir(tmp_path)
    run_its_lines(told, ID="whole")
    assert same_logits(tmp_path / "FOLDER", tmp_path / "whole")


@pytest.mark.parametrize(
    "name, match",
    [
        ("layers.0.attention.wk.weight", "is a Llama by the names of llama2.c .1 tensors, .*hf_export.load_checkpoint"),
        ("transformer.h.0.attn.qkv.weight", "by the names of LitGPT.*convert_lit_checkpoint"),
        ("transformer.h.0.attn.attn.weight", "by the names of LitGPT"),
        ("blocks.0.attn.qkv_w", "nanoGPT's form is .* this holds tensors, first 'blocks.0.attn.qkv_w'"),
        ("transformer.h.0.attn.c_attn.weight", "this holds tensors, first 'transformer.h.0.attn.c_attn.weight'"),
    ],
)
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_names_of_other_code(name, match, prefix, tmp_path):
    torch.save({prefix + name: torch.zeros(4, 3)}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=rf"(?s){match}"):
        import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "out")


def test_llamas_are_refused_though_they_have_sizes(tmp_path):
    held = {"model": {"layers.0.attention.wk.weight": torch.zeros(4, 4)}, "model_args": {"dim": 4, "n_layers": 1}}
    torch.save(held, tmp_path / "ckpt.pt")
    assert "names of llama2.c" in refusal(tmp_path / "ckpt.pt")


class GPTConfig(SimpleNamespace):
    """As of the code that trained a model."""


def test_sizes_that_are_an_object(tmp_path, monkeypatch):
    source = made(drop=("scale",))
    import_nanogpt(source.save(tmp_path / "whole.pt"), tmp_path / "whole")
    (alone := tmp_path / "alone").mkdir()
    torch.save({"model": source.state, "config": GPTConfig(**source.args)}, alone / "ckpt.pt")
    told = refusal(alone / "ckpt.pt")
    assert "GPTConfig); unpickling that can run code, so it is not read. nanoGPT keeps its sizes as plain" in told
    monkeypatch.chdir(tmp_path)
    run_its_lines(told)
    import_nanogpt(tmp_path / "ckpt.pt", tmp_path / "out")
    assert same_logits(tmp_path / "out", tmp_path / "whole")


def test_weights_of_llm_c(tmp_path):
    (tmp_path / "gpt2_124M.bin").write_bytes((20240326).to_bytes(4, "little") + bytes(1020))
    told = refusal(tmp_path / "gpt2_124M.bin")
    assert "holds llm.c's weights" in told
    assert "from train_gpt2 import GPT" in told
    assert '"gelu_new"' in told


def test_prefixes_before_some_names_alone_are_refused(tmp_path):
    source = made()
    state = dict(source.state)
    name = "transformer.ln_f.weight"
    state[f"module.{name}"] = state.pop(name)
    torch.save({"model_args": source.args, "model": state}, tmp_path / "ckpt.pt")
    told = refusal(tmp_path / "ckpt.pt")
    assert f"begin differently, 'transformer.wte.weight' and 'module.{name}'" in told
    assert "of two models" in told
