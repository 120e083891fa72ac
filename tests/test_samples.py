"""The sample checkpoints and texts are what samples/README.md says, and their scripts run."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conversions import convert_tiny, few_steps, reload_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.eval.evaluate import evaluate
from qectomy.eval.protocol import Protocol
from qectomy.text.text import read_source

SAMPLES = Path(__file__).parents[1] / "samples"
sys.path.insert(0, str(SAMPLES))

import demo  # noqa: E402
import train  # noqa: E402

NAMES = ("gpt2", "llama")
PERPLEXITY = {"gpt2": (20, 60), "llama": (20, 60)}  # a model that was not trained stands near 4,096


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_small_and_of_the_kind_promised(name):
    folder = SAMPLES / name
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    source = open_checkpoint(folder)
    assert source.family.model_type == name
    assert source.dims.n_layers >= 6
    assert source.dims.vocab_size == train.VOCAB_SIZE
    assert (source.dims.n_kv_heads < source.dims.n_heads) == (name == "llama")
    curve = (folder / "training.csv").read_text().splitlines()
    losses = [float(line.split(",")[2]) for line in curve[1:]]
    assert min(losses) < losses[0] - 1
    assert losses[-1] - min(losses) < 0.01  # it had stopped falling, and not begun to rise


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_was_trained(name):
    found = evaluate(
        str(SAMPLES / name), read_source(str(SAMPLES / "kjv_heldout.txt")), Protocol(context=256, tokens=4096)
    )
    low, high = PERPLEXITY[name]
    assert low < found.perplexity < high


def test_the_texts_do_not_overlap():
    parts = {
        part: (SAMPLES / f"kjv_{part}.txt").read_text(encoding="utf-8") for part in ("train", "validation", "heldout")
    }
    assert sum(len(text.splitlines()) for text in parts.values()) == 31_102  # the verses of the Bible
    for part in ("validation", "heldout"):
        verses = parts[part].splitlines()
        found = [verse for verse in verses if len(verse) > 80 and f"\n{verse}\n" in parts["train"]]
        assert not found


def small_texts(folder: Path) -> Path:
    for part, count in (("train", 400), ("validation", 60), ("heldout", 60)):
        lines = (SAMPLES / f"kjv_{part}.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"kjv_{part}.txt").write_text("".join(lines[:count]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", train.MODELS)
def test_training_writes_a_checkpoint_that_converts(name, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    monkeypatch.setattr(train, "FOLDER", small_texts(tmp_path / "texts"))
    for setting, value in dict(VOCAB_SIZE=320, D_MODEL=32, N_LAYERS=2, D_MLP=64, CONTEXT=32, EVERY=2).items():
        monkeypatch.setattr(train, setting, value)
    figures = train.train(name, tmp_path / "out", steps=4, learning_rate=1e-3, seed=0)
    assert figures["steps"] == 4
    assert figures["validation_loss"] < 6
    assert not [path for path in tmp_path.iterdir() if ".training" in path.name]
    assert len((tmp_path / "out/training.csv").read_text().splitlines()) == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.num_parameters() == figures["parameters"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size == 320
    if name in NAMES:
        text = tmp_path / "texts/kjv_train.txt"
        assert convert_tiny(tmp_path / "out", tmp_path / "reduced", "select", text)["perplexity"]["before"] > 1
    else:
        assert open_checkpoint(tmp_path / "out", reduced=True).recipe[0].name == "identity"


def test_a_wider_mlp_spends_what_the_queries_saved():
    sizes = {name: train.build(name).num_parameters() for name in train.MODELS}
    assert sizes["gpt2-identity"] < sizes["gpt2"]
    biases = train.N_LAYERS * (3 * train.D_MODEL + train.D_MODEL // 2)  # of c_attn, and of the MLP's new channels
    assert abs(sizes["gpt2-identity-wide"] - sizes["gpt2"]) <= biases


def test_training_does_not_overwrite(tmp_path):
    done = subprocess.run(
        [sys.executable, SAMPLES / "train.py", "gpt2", "--out", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {tmp_path} exists"


def test_a_last_step_that_is_not_evaluated_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "gpt2", "--out", str(tmp_path / "out"), "--steps", "130"])
    assert train.main() == 1
    assert "--steps must be a multiple of 125" in capsys.readouterr().err


def test_the_demo_prints_a_row_a_map(tiny_checkpoint, raven, tmp_path, monkeypatch, capsys):
    few_steps(monkeypatch)
    reload_here(monkeypatch)
    monkeypatch.setenv("COLUMNS", "120")
    arguments = ["--text", raven, "--tokens", 320, "--eval-tokens", 160, "--context", 32]
    monkeypatch.setattr(
        sys, "argv", ["demo.py", *map(str, [tiny_checkpoint("gpt2"), "--out", tmp_path / "out", *arguments])]
    )
    assert demo.main() == 0
    printed = capsys.readouterr()
    for name in ("key-shared", "identity"):
        report = json.loads((tmp_path / "out" / name / "qectomy.json").read_text())
        row = next(line for line in printed.out.splitlines() if f" {name} " in line)
        assert f"{report['perplexity']['after']:.3f}" in row
        assert f"{report['parameters']['after']:,}" in row
        assert f"{name} 2/2" in printed.err
    assert str(tmp_path / "out") in printed.out.replace("\n", "")
    assert demo.main() == 1  # the folder exists now
    assert "exists; nothing is overwritten" in capsys.readouterr().err


def test_the_demo_removes_an_earlier_result_only_for_a_run_that_can_begin(
    tiny_checkpoint, raven, tmp_path, monkeypatch
):
    few_steps(monkeypatch)
    reload_here(monkeypatch)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").touch()
    model, small = tiny_checkpoint("gpt2"), ["--tokens", "320", "--eval-tokens", "160", "--context", "32"]
    wrong = [("nosuchfolder", raven, "select"), (model, "nosuch.txt", "select"), (model, raven, "selekt")]
    for checkpoint, text, query in [*wrong, (model, raven, "select")]:
        options = ["--out", tmp_path / "out", "--text", text, "--query", query, "--replace", *small]
        monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, [checkpoint, *options])])
        right = (checkpoint, text, query) not in wrong
        assert demo.main() == (0 if right else 1)
        assert (tmp_path / "out/precious").exists() == (not right)
    assert (tmp_path / "out/select/qectomy.json").is_file()


def test_the_demo_names_what_is_wrong(tmp_path, monkeypatch, capsys):
    shutil.copytree(SAMPLES / "gpt2", tmp_path / "model")
    monkeypatch.setattr(
        sys, "argv", ["demo.py", str(tmp_path / "model"), "--out", str(tmp_path / "out"), "--text", "no.txt"]
    )
    assert demo.main() == 1
    assert "no file 'no.txt'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
