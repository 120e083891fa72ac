"""Norms folded on whole checkpoints: a stock model with the same logits, and the part of the norm gone."""

import pytest
import torch
from damage import edit_weights
from foldings import in_float64, load_stock, relative
from safetensors.torch import load_file
from tiny_models import load_reduced, save_variant, tokens

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.errors import NonFiniteError, OutputError, QectomyError, Stopped, UnsupportedArchitecture
from qectomy.runs import run_dir
from qectomy.runs.run_dir import RunDir
from qectomy.surgery.norm_fusion import fold_norms

PARTS = [("gain",), ("shift",), ("mean",), ("gain", "mean"), None]


@pytest.mark.parametrize("only", PARTS, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "biases", "mistral", "qwen2", "mqa"])
@torch.no_grad()
def test_the_logits_stay(name, only, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(name)
    result = fold_norms(open_checkpoint(source), tmp_path / "out", only)
    old, new = in_float64(load_stock(source)), in_float64(load_stock(tmp_path / "out"))
    assert relative(new(tokens()).logits, old(tokens()).logits) < 1e-5  # stored in float32
    gpt2 = name.startswith("gpt2")
    assert set(result["folded"]) == set(only or ("gain", "shift", "mean")) & (
        {"gain", "shift", "mean"} if gpt2 else {"gain"}
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert {k: v.shape for k, v in before.items()} == {k: v.shape for k, v in after.items()}
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert bool(changed) == bool(result["folded"])


def norms(folder):
    return {
        k: v for k, v in load_file(folder / "model.safetensors").items() if v.ndim == 1 and ("ln_" in k or "norm" in k)
    }


@pytest.mark.parametrize("name, left", [("gpt2-untied", 0), ("gpt2", 1), ("llama", 0), ("tied", 1)])
def test_gains_become_1_but_a_tied_heads(name, left, tiny_checkpoint, tmp_path):
    fold_norms(open_checkpoint(tiny_checkpoint(name)), tmp_path / "out", ["gain"])
    gains = {k: v for k, v in norms(tmp_path / "out").items() if k.endswith("weight")}
    assert len(gains) == 5
    assert [k for k, v in gains.items() if not (v == 1).all()] == [
        k for k in gains if "layers" not in k and ".h." not in k
    ][:left]


def test_shifts_become_0_but_the_last(tiny_checkpoint, tmp_path):
    result = fold_norms(open_checkpoint(tiny_checkpoint("gpt2")), tmp_path / "out", ["shift"])
    assert result["left"] == ["the final norm's shift"]
    assert [k for k, v in norms(tmp_path / "out").items() if k.endswith("bias") and v.any()] == [
        "transformer.ln_f.bias"
    ]


def test_writers_have_no_mean(tiny_checkpoint, tmp_path):
    fold_norms(open_checkpoint(tiny_checkpoint("gpt2-untied")), tmp_path / "out", ["mean"])
    tensors = load_file(tmp_path / "out/model.safetensors")
    writers = [k for k in tensors if "c_proj" in k or "wte" in k or "wpe" in k]
    assert len(writers) == 10
    assert max(tensors[k].double().mean(-1).abs().max() for k in writers) < 1e-7
    assert tensors["lm_head.weight"].double().mean(-1).abs().max() > 1e-3


def test_what_is_refused(tiny_checkpoint, tmp_path):
    source = open_checkpoint(tiny_checkpoint())
    with pytest.raises(QectomyError, match="unknown part of a norm 'gains'; known: gain, shift, mean"):
        fold_norms(source, tmp_path / "out", ["gains"])
    with pytest.raises(OutputError, match="exists"):
        fold_norms(source, tmp_path)
    bare = save_variant(tmp_path / "bare", "llama", norms=False)
    with pytest.raises(UnsupportedArchitecture, match="has no norms to fold"):
        fold_norms(open_checkpoint(bare), tmp_path / "out")


@torch.no_grad()
def test_layers_that_share_their_weights(tmp_path):
    source = save_variant(tmp_path / "source", "llama", shared_layers=True)
    fold_norms(open_checkpoint(source), tmp_path / "out")
    old, new = (in_float64(load_reduced(folder, torch.float64)) for folder in (source, tmp_path / "out"))
    assert relative(new(tokens()).logits, old(tokens()).logits) < 1e-12
    assert (load_file(tmp_path / "out/model.safetensors")["model.layers.0.input_layernorm.weight"] == 1).all()


def test_what_overflows_is_named(tiny_copy, tmp_path):
    source = tiny_copy("fp16")
    edit_weights(source, lambda tensors: tensors["model.layers.0.input_layernorm.weight"].fill_(6e4))
    edit_weights(source, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].mul_(10))
    with pytest.raises(NonFiniteError, match=r"layer 0: self_attn.q_proj.weight does not fit in its type"):
        fold_norms(open_checkpoint(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_finished_output_of_another_run(tiny_checkpoint, tmp_path, monkeypatch):
    """A kill between the output's appearance and the end leaves OUT.converting beside it."""
    out, left = tmp_path / "out", tmp_path / "out.converting"
    source = open_checkpoint(tiny_checkpoint("gpt2"))
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "remove", lambda self: None)
        made = fold_norms(source, out)
    with pytest.raises(
        QectomyError, match="out is whole, and another run made it: parts was gain, mean, shift, is gain"
    ):
        fold_norms(source, out, ["gain"], resume=True)
    with pytest.raises(QectomyError, match=r"another run made it: source's config.json was .*, is "):
        fold_norms(open_checkpoint(tiny_checkpoint("gpt2-untied")), out, resume=True)
    for _ in range(2):
        assert fold_norms(source, out, resume=True) == made
        assert not left.exists()


def test_steps_that_are_lost_are_told(tiny_checkpoint, tmp_path, capsys):
    source, out, said = open_checkpoint(tiny_checkpoint()), tmp_path / "out", []

    def stop(done, total, doing):
        if done == 2:
            raise Stopped("stopped for the test")

    with pytest.raises(Stopped):
        fold_norms(source, out, progress=stop)
    for shard in (tmp_path / "out.converting/result").glob("*.safetensors"):
        shard.unlink()
    fold_norms(source, out, resume=True, progress=lambda *call: said.append(call))
    assert "note: step 1 of 2 in " in capsys.readouterr().err
    assert said == [(done, 3, "folding") for done in (1, 2, 3)]


def test_what_is_whole_but_not_in_its_place_is_not_written_again(tiny_checkpoint, tmp_path, monkeypatch):
    """As a kill leaves it just before the output appears."""
    source, out, said = open_checkpoint(tiny_checkpoint()), tmp_path / "out", []
    with monkeypatch.context() as patch:
        patch.setattr(run_dir, "move", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(Stopped, match="interrupted"):
            fold_norms(source, out)
    fold_norms(source, out, resume=True, progress=lambda *call: said.append(call))
    assert said == []
