"""Healing as a whole, on tiny checkpoints: what is written, and that the report tells the truth."""

import csv
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import hashes, tensor_hashes, window_nll
from damage import edit_weights
from healings import QUICK_HEAL, STEP, STEPS, Pair, heal_tiny, trained_alike
from matplotlib.image import imread
from safetensors.torch import load_file
from tiny_models import load_reduced, tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from qectomy.checkpoint.checkpoint import open_checkpoint, sha256
from qectomy.eval.evaluate import evaluate
from qectomy.eval.protocol import Protocol
from qectomy.healing.models import Distillation, load_student, load_teacher, stream_basis
from qectomy.record.reduced import read_reduced
from qectomy.text.text import read_source

CASES = [("llama", "identity"), ("llama", "select"), ("gpt2", "key-shared")]


@dataclass(frozen=True)
class Healed:
    pair: Pair
    out: Path
    report: dict[str, Any]
    before: list[dict[str, str]]

    @property
    def healing(self):
        return self.report["healing"]


@pytest.fixture(scope="module")
def rough_gpt2(pair, tmp_path_factory):
    """A GPT-2 that its fit left worse than a tiny one's is."""
    found = pair("gpt2", "key-shared")
    reduced = Path(shutil.copytree(found.reduced, tmp_path_factory.mktemp("rough") / "gpt2"))
    g = torch.Generator().manual_seed(0)

    def spoil(tensors):
        for name in tensors:
            if "attn" in name:
                tensors[name] += 0.1 * torch.randn(tensors[name].shape, generator=g)

    edit_weights(reduced, spoil)
    return Pair(found.original, reduced)


@pytest.fixture(scope="module")
def made(pair, rough_gpt2, raven, tmp_path_factory):
    """Return a function (name, query) -> Healed, made once."""
    done: dict[tuple[str, str], Healed] = {}

    def make(name, query):
        if (name, query) not in done:
            found = rough_gpt2 if name == "gpt2" else pair(name, query)
            before = [hashes(folder) for folder in (found.original, found.reduced)]
            out = tmp_path_factory.mktemp("healed") / "out"
            done[name, query] = Healed(found, out, heal_tiny(found, out, raven, draw=True), before)
        return done[name, query]

    return make


@pytest.fixture(params=CASES, ids="-".join)
def healed(made, request):
    return made(*request.param)


def weights(folder):
    return load_file(folder / "model.safetensors")


# What is written


def test_the_loss_falls(healed):
    losses = [row["validation_loss"] for row in healed.healing["validation"]["curve"]]
    assert losses[-1] < 0.97 * losses[0]
    assert healed.healing["kl"]["healed"] < 0.98 * healed.healing["kl"]["fitted"]
    assert healed.healing["best_step"] > 0
    assert min(losses) == losses[healed.healing["best_step"] // 2]


def test_only_the_output_is_left_and_nothing_else_was_touched(healed):
    assert [path.name for path in healed.out.parent.iterdir()] == ["out"]
    assert [hashes(folder) for folder in (healed.pair.original, healed.pair.reduced)] == healed.before


def test_the_folder_holds_all_that_a_reduced_checkpoint_does(healed):
    fitted = {path.name for path in healed.pair.reduced.iterdir()}
    assert {path.name for path in healed.out.iterdir()} - {"report.html"} == fitted | {"healing.csv", "healing.png"}
    ours, theirs = (open_checkpoint(folder, reduced=True) for folder in (healed.out, healed.pair.reduced))
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert ours.config == theirs.config
    assert ours.recipe == theirs.recipe


def test_the_report_has_the_sha256_of_each_tensor(healed):
    assert json.loads((healed.out / "qectomy.json").read_text())["tensors_sha256"] == tensor_hashes(healed.out)


def test_it_loads_with_the_package_and_gives_what_its_weights_give(healed):
    model, ids = AutoModelForCausalLM.from_pretrained(healed.out), tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, load_reduced(healed.out)(input_ids=ids).logits)
    assert any(
        not torch.equal(tensor, weights(healed.pair.reduced)[name]) for name, tensor in weights(healed.out).items()
    )


def test_a_stranger_can_load_it(made, tmp_path):
    """Someone without this package, by the code in the folder."""
    script = """
import json, sys, torch
sys.modules["qectomy"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
sums = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("Nevermore, quoth the raven")["input_ids"]])
    sums.append(model(input_ids=ids).logits.double().sum().item())
open("sums.json", "w").write(json.dumps(sums))
"""
    folders = [made(*case).out for case in CASES[1:]]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, folders)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    ids = torch.tensor([tiny_tokenizer()("Nevermore, quoth the raven")["input_ids"]])
    sums = json.loads((tmp_path / "sums.json").read_text())
    for folder, found in zip(folders, sums, strict=True):
        assert found == pytest.approx(load_reduced(folder)(input_ids=ids).logits.double().sum().item(), rel=1e-4)


# The report


def test_the_report_is_complete(healed, raven):
    report, healing = healed.report, healed.healing
    assert json.loads((healed.out / "qectomy.json").read_text()) == report
    assert healing["texts"] == [
        {
            "text": "raven.txt",
            "sha256": sha256(raven),
            "read_as": {"kind": "plain text"},
            "left_out": [0, 160],
            "validation_tokens": 160,
            "tokens": STEPS * STEP,
        }
    ]
    assert (healing["tokens"], healing["steps"], healing["planned_steps"]) == (STEPS * STEP, STEPS, STEPS)
    assert (healing["micro_batch"], healing["accumulation"], healing["tokens_a_step"]) == (4, 1, STEP)
    assert healing["processes"] == 1
    assert healing["device"].startswith("cpu (")
    assert healing["settings"].items() >= QUICK_HEAL.items()
    assert healing["settings"].items() >= {"train": "all", "loss": "kl", "seed": 0, "weight_decay": 2**-5}.items()
    assert {"texts", "command", "device"}.isdisjoint(healing["settings"])
    assert healing["fitted_sha256"] == open_checkpoint(healed.pair.reduced, reduced=True).hashes()
    assert report["source"]["sha256"] == open_checkpoint(healed.pair.original).hashes()
    assert healing["trained_parameters"] == sum(p.numel() for p in load_reduced(healed.out).parameters())
    assert 0 < healing["seconds"]["training"] <= healing["seconds"]["this_process"] + 1e-3
    assert {"torch", "transformers"} <= healing["versions"].keys()
    fitted = json.loads((healed.pair.reduced / "qectomy.json").read_text())
    for kept in ("layers", "calibration", "parameters", "bytes"):
        assert report[kept] == fitted[kept]
    assert 0 <= report["reload_check"]["largest_relative_logit_error"] < 1e-4


def test_the_three_perplexities_are_those_of_eval(healed, raven):
    perplexity = healed.healing["perplexity"]
    source, protocol = read_source(str(raven)), Protocol(context=32, tokens=160)
    folders = {"original": healed.pair.original, "fitted": healed.pair.reduced, "healed": healed.out}
    for kind, folder in folders.items():
        found = evaluate(str(folder), source, protocol, dtype="float32", reference=str(healed.pair.original))
        assert found.perplexity == pytest.approx(perplexity[kind], rel=1e-5)
        told = healed.report["perplexity"]["protocol"]
        assert found.protocol.as_dict() | {"first_token": 0, "fitted_on": False, "overlap": told["overlap"]} == told
        assert kind != "healed" or found.overlap.as_dict() == told["overlap"] | {"fitted_text": True}
        if kind != "original":
            assert perplexity[f"{kind}_ratio"] == pytest.approx(perplexity[kind] / perplexity["original"])
            assert healed.healing["kl"][kind] == pytest.approx(found.kl, rel=1e-4)
            assert healed.healing["top1_agreement"][kind] == pytest.approx(found.top1_agreement, abs=0.01)
    costs = healed.report["perplexity"]
    assert (costs["before"], costs["after"]) == (perplexity["original"], perplexity["healed"])
    assert healed.report["kl"] == healed.healing["kl"]["healed"]


def test_the_curve_is_that_of_the_validation_windows(healed, raven):
    """The first row is the fitted model, the last the healed one: the text after what was measured and fitted on."""
    curve = healed.healing["validation"]["curve"]
    assert [row["step"] for row in curve] == [0, 2, 4, 6, 8]
    assert [row["tokens"] for row in curve] == [step * STEP for step in (0, 2, 4, 6, 8)]
    windows = torch.tensor(tiny_tokenizer()(raven.read_text())["input_ids"][480:640]).view(-1, 32)
    stock = AutoModelForCausalLM.from_pretrained(healed.pair.original, dtype=torch.float32)
    original = float(window_nll(stock, windows).mean().exp())
    assert healed.healing["validation"]["original_perplexity"] == pytest.approx(original, rel=1e-5)
    rows = [(0, healed.pair.reduced), (healed.healing["best_step"] // 2, healed.out)]
    for number, folder in rows:
        found = float(window_nll(load_reduced(folder), windows).mean().exp())
        assert curve[number]["validation_perplexity"] == pytest.approx(found, rel=1e-4)
    assert all(row["validation_loss"] == pytest.approx(row["validation_kl"], rel=1e-5) for row in curve)
    lines = list(csv.DictReader((healed.out / "healing.csv").read_text().splitlines()))
    assert [{name: float(x) for name, x in line.items() if x} for line in lines] == curve
    assert imread(healed.out / "healing.png").shape[0] > 400


def test_the_rate_rises_and_falls(healed):
    rates = [row.get("learning_rate") for row in healed.healing["validation"]["curve"]]
    assert rates[0] is None
    assert rates[1] == max(rates[1:]) <= 3e-3
    assert rates[-1] < 0.1 * 3e-3


def test_the_card_says_that_it_was_healed(healed):
    card = (healed.out / "README.md").read_text()
    assert "healed" in card
    assert f"{STEPS * STEP:,} tokens of `raven.txt`" in card
    assert "healing.png" in card
    assert f"{healed.healing['perplexity']['fitted']:.3f}" in card
    assert f"{healed.healing['perplexity']['healed']:.3f}" in card


# Types, and which weights are kept


def test_stored_types_are_kept(pair, raven, tmp_path):
    found = pair("bf16", "select")
    heal_tiny(found, tmp_path / "out", raven)
    ours, theirs = weights(tmp_path / "out"), weights(found.reduced)
    assert {name: x.dtype for name, x in ours.items()} == {name: x.dtype for name, x in theirs.items()}
    assert {x.dtype for x in ours.values()} == {torch.bfloat16, torch.int32}
    for name, x in theirs.items():
        assert torch.equal(ours[name], x) == (x.dtype == torch.int32), name


def test_the_start_is_kept_where_nothing_was_better(pair, raven, tmp_path):
    found = pair("bf16", "key-shared")
    report = heal_tiny(found, tmp_path / "out", raven, lr=3.0, warmup=0.0)
    losses = [row["validation_loss"] for row in report["healing"]["validation"]["curve"]]
    assert min(losses) == losses[0]
    assert report["healing"]["best_step"] == 0
    assert sha256(tmp_path / "out/model.safetensors") == sha256(found.reduced / "model.safetensors")
    perplexity = report["healing"]["perplexity"]
    assert perplexity["healed"] == pytest.approx(perplexity["fitted"], rel=1e-6)


def prefer(monkeypatch, best):
    """Make the validation at one step the best, and keep a copy of the weights that each had."""
    from qectomy.healing import trainer

    right, kept = trainer.HealTrainer.prediction_step, {}

    def step(self, model, *arguments, **named):
        loss, each, labels = right(self, model, *arguments, **named)
        kept[self.state.global_step] = {name: x.detach().clone() for name, x in self.model.state_dict().items()}
        return loss, each * (0.5 if self.state.global_step == best else 1.5), labels

    monkeypatch.setattr(trainer.HealTrainer, "prediction_step", step)
    return kept


@pytest.mark.parametrize("best", [2, 4, 8])
def test_the_best_by_validation_is_what_is_written(best, pair, raven, tmp_path, monkeypatch):
    kept = prefer(monkeypatch, best)
    report = heal_tiny(pair(), tmp_path / "out", raven)
    assert report["healing"]["best_step"] == best
    ours = weights(tmp_path / "out")
    assert all(torch.equal(x, kept[best][name]) for name, x in ours.items())
    assert not all(torch.equal(x, kept[best - 2][name]) for name, x in ours.items())


@pytest.mark.parametrize("name, part", [("llama", "self_attn."), ("gpt2", "attn.")])
def test_what_is_not_trained_stays_bit_for_bit(name, part, pair, raven, tmp_path, monkeypatch):
    prefer(monkeypatch, 8)
    found = pair(name, "key-shared")
    report = heal_tiny(found, tmp_path / "out", raven, train="attention")
    ours, theirs = weights(tmp_path / "out"), weights(found.reduced)
    norm = "input_layernorm" if name == "llama" else "ln_1"
    trained = {key for key, x in theirs.items() if part in key or norm in key}
    assert {key for key in theirs if not torch.equal(ours[key], theirs[key])} == trained
    assert report["healing"]["trained_parameters"] == sum(theirs[key].numel() for key in trained)


def test_only_matrices_decay(pair, raven, tmp_path, monkeypatch):
    from qectomy.healing import trainer

    seen, train = [], trainer.HealTrainer.train

    def watch(self, **options):
        found = train(self, **options)
        seen.extend(self.optimizer.param_groups)
        return found

    monkeypatch.setattr(trainer.HealTrainer, "train", watch)
    heal_tiny(pair("gpt2", "select"), tmp_path / "out", raven, weight_decay=0.25, tokens=2 * STEP)
    dims = {group["weight_decay"]: {p.ndim for p in group["params"]} for group in seen}
    assert dims == {0.25: {2}, 0.0: {1}}
    assert all(group["betas"] == (0.9, 0.98) for group in seen)


# Settings that change what is computed, and those that must not


def losses_of(report):
    return [row["validation_loss"] for row in report["healing"]["validation"]["curve"]]


def close(report, wanted, tolerance=1e-5):
    assert losses_of(report) == pytest.approx(losses_of(wanted), rel=tolerance)


def test_windows_at_a_time_change_nothing(made, raven, tmp_path):
    wanted = made("llama", "select")
    report = heal_tiny(wanted.pair, tmp_path / "out", raven, micro_batch=1)
    assert (report["healing"]["micro_batch"], report["healing"]["accumulation"]) == (1, 4)
    close(report, wanted.report)
    ours, theirs = weights(tmp_path / "out"), weights(wanted.out)
    assert trained_alike(ours, theirs, STEPS)
    assert not trained_alike(weights(wanted.pair.reduced), theirs, STEPS)


def test_activation_checkpointing_changes_nothing(made, raven, tmp_path):
    wanted = made("llama", "select")
    close(heal_tiny(wanted.pair, tmp_path / "out", raven, activation_checkpointing=True), wanted.report)


def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(made, raven, tmp_path):
    wanted = made("gpt2", "key-shared")
    for seed in (0, 1):
        heal_tiny(wanted.pair, tmp_path / str(seed), raven, seed=seed)
    found = [sha256(folder / "model.safetensors") for folder in (wanted.out, tmp_path / "0", tmp_path / "1")]
    assert found[0] == found[1] != found[2]
    assert (tmp_path / "0/healing.csv").read_bytes() == (wanted.out / "healing.csv").read_bytes()


def test_bfloat16_products_come_close(made, raven, tmp_path):
    wanted = made("llama", "select")
    report = heal_tiny(wanted.pair, tmp_path / "out", raven, dtype="bfloat16")
    close(report, wanted.report, 0.05)
    assert losses_of(report) != losses_of(wanted.report)
    assert report["healing"]["settings"]["dtype"] == "bfloat16"
    for kind in ("original", "fitted"):  # measured in float32 whatever was trained in
        assert report["healing"]["perplexity"][kind] == pytest.approx(wanted.healing["perplexity"][kind], rel=1e-6)


@pytest.mark.parametrize("loss", ["ce", "mixed"])
def test_cross_entropy_fits_the_text(loss, made, raven, tmp_path):
    wanted = made("llama", "select")
    report = heal_tiny(wanted.pair, tmp_path / "out", raven, loss=loss, ce_weight=0.25)
    first, last = report["healing"]["validation"]["curve"][0], report["healing"]["validation"]["curve"][-1]
    w = {"ce": 1.0, "mixed": 0.25}[loss]
    nll = math.log(first["validation_perplexity"])
    assert first["validation_loss"] == pytest.approx((1 - w) * first["validation_kl"] + w * nll, rel=1e-5)
    assert last["validation_perplexity"] < wanted.healing["validation"]["curve"][-1]["validation_perplexity"]


@pytest.mark.parametrize("name, query", CASES[:2])
def test_hidden_states_are_drawn_to_the_originals(name, query, made, raven, tmp_path, monkeypatch):
    prefer(monkeypatch, 8)
    wanted = made(name, query)
    heal_tiny(wanted.pair, tmp_path / "out", raven, hidden_weight=2.0)
    teacher = load_teacher(open_checkpoint(wanted.pair.original), "float32", "cpu")
    basis = stream_basis(load_student(open_checkpoint(wanted.pair.reduced, reduced=True)), teacher)
    ids = torch.tensor([tiny_tokenizer()(raven.read_text())["input_ids"][480:544]])
    errors = []
    for folder in (wanted.pair.reduced, tmp_path / "out"):
        student = load_student(open_checkpoint(folder, reduced=True))
        criterion = Distillation(teacher, 0.0, 1.0, basis)
        criterion.attach_(student)
        found = student(input_ids=ids, teacher_states=criterion.teach(ids))
        errors.append(float(found["loss"] - found["kl"].mean()))
    assert 0 < errors[1] < errors[0]


def test_both_models_are_compiled_where_that_is_asked_for(made, raven, tmp_path, monkeypatch):
    compiled, wanted = [], made("llama", "select")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(type(self).__name__))
    close(heal_tiny(wanted.pair, tmp_path / "out", raven, compile=True), wanted.report)
    assert compiled == ["QectomyLlamaModel", "LlamaModel"]


# Texts


def test_a_short_text_is_read_again(made, raven, tmp_path):
    wanted = made("llama", "select")
    report = heal_tiny(wanted.pair, tmp_path / "out", raven, tokens=100 * STEP, lr=1e-5, evaluations=1)
    there = report["healing"]["texts"][0]["tokens"]
    assert there < 100 * STEP == report["healing"]["tokens"]
    once = heal_tiny(wanted.pair, tmp_path / "once", raven, tokens=None, lr=1e-5, evaluations=1)
    assert once["healing"]["texts"] == report["healing"]["texts"]
    assert once["healing"]["steps"] == math.ceil(there / STEP)


def test_every_window_is_trained_on_once_a_reading(made, raven, tmp_path, monkeypatch):
    from qectomy.healing import trainer

    seen, step = [], trainer.HealTrainer.training_step

    def watch(self, model, inputs, *rest):
        seen.extend(map(tuple, inputs["input_ids"].tolist()))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(trainer.HealTrainer, "training_step", watch)
    heal_tiny(made("llama", "select").pair, tmp_path / "out", raven, tokens=6 * STEP, evaluations=1)
    ids = tiny_tokenizer()(raven.read_text())["input_ids"][640:]
    assert sorted(seen) == sorted(tuple(ids[i * 32 : i * 32 + 32]) for i in range(24))
    assert seen != sorted(seen)


@pytest.mark.parametrize("same", [True, False])
def test_a_text_to_measure_on(same, made, raven, tmp_path):
    """Of a text that is also trained on, what is measured on is left out, whatever the file's name."""
    other = tmp_path / "heldout.txt"
    other.write_text(raven.read_text() if same else raven.read_text().upper())
    report = heal_tiny(made("llama", "select").pair, tmp_path / "out", raven, eval_text=str(other), eval_tokens=96)
    assert report["healing"]["texts"][0]["left_out"] == [0, 96 if same else 0]
    assert report["perplexity"]["protocol"]["text"] == "heldout.txt"
    assert report["perplexity"]["protocol"]["tokens"] == 96


def test_of_a_short_text_an_eighth_is_measured_on(made, tmp_path):
    text = tmp_path / "short.txt"
    text.write_text(tiny_tokenizer().decode(tiny_tokenizer()("quoth the raven: nevermore! " * 400)["input_ids"][:1000]))
    report = heal_tiny(made("llama", "select").pair, tmp_path / "out", text, eval_tokens=10_000, tokens=STEP)
    assert report["healing"]["texts"][0]["left_out"] == [0, 96]
    assert report["perplexity"]["protocol"]["tokens"] == 96


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_progress_counts_the_steps_and_says_the_loss_of_each(micro_batch, made, raven, tmp_path):
    calls, pair = [], made("llama", "select").pair
    told = {"micro_batch": micro_batch, "progress": lambda *call: calls.append(call)}
    curve = heal_tiny(pair, tmp_path / "out", raven, **told)["healing"]["validation"]["curve"]
    losses = [float(re.match(r"loss (\S+), ", call[2])[1]) for call in calls if "loss" in call[2]]
    means = [sum(losses[i : i + 2]) / 2 for i in range(0, STEPS, 2)]
    assert means == pytest.approx([row["train_loss"] for row in curve[1:]], abs=1e-4)
    assert [call[:2] for call in calls if "loss" in call[2]] == [(step, STEPS) for step in range(1, STEPS + 1)]
    assert all("tokens/s" in call[2] for call in calls if "loss" in call[2])
    measured = [call for call in calls if "measuring" in call[2]]
    assert [call[:2] for call in measured] == [(layer, 6) for layer in range(1, 7)]  # two layers of three models


def test_healing_again_keeps_the_first_record(made, raven, tmp_path):
    first = made("llama", "select")
    report = heal_tiny(Pair(first.pair.original, first.out), tmp_path / "out", raven, tokens=2 * STEP)
    assert report["healing"]["earlier"] == first.healing
    assert report["healing"]["perplexity"]["fitted"] == pytest.approx(first.healing["perplexity"]["healed"], rel=1e-5)


def test_a_checkpoint_without_a_report(tiny_checkpoint, tiny_reduced, raven, tmp_path):
    found = Pair(tiny_checkpoint("gpt2"), tiny_reduced(("select", "key-shared"), "gpt2"))
    report = heal_tiny(found, tmp_path / "out", raven, tokens=2 * STEP)
    assert [layer["map"] for layer in report["layers"]] == ["select", "key-shared"]
    assert report["parameters"]["before"] > report["parameters"]["after"]
    assert (tmp_path / "out/README.md").is_file()


@pytest.mark.parametrize("same", [True, False])
def test_a_teacher_that_is_another_model_is_told_apart(same, made, raven, tmp_path, capsys):
    """It has the original's sizes, so it can teach; but the report must not call it the original."""
    from qectomy.commands.heal import show_healed

    wanted = made("llama", "select").pair
    teacher = tmp_path / "teacher"
    shutil.copytree(wanted.original, teacher)
    if not same:
        edit_weights(teacher, lambda tensors: tensors["lm_head.weight"].mul_(1.01))
    report = heal_tiny(Pair(teacher, wanted.reduced), tmp_path / "out", raven, tokens=STEP, evaluations=1)
    assert report["healing"]["teacher_is_source"] is same
    assert report["source"]["sha256"]["model.safetensors"] == sha256(teacher / "model.safetensors")
    written = read_reduced(tmp_path / "out/qectomy.json")
    show_healed(written, written.healing, tmp_path / "out")
    said = " ".join(capsys.readouterr().out.split())
    assert ("the teacher is not the checkpoint that the reduced one was made from" in said) is not same
    assert "measured on 155 tokens of raven.txt in windows of 32, not trained on" in said


def test_an_early_end_is_said(capsys, made):
    from qectomy.commands.heal import show_healed

    run = made("llama", "select")
    report = read_reduced(run.out / "qectomy.json")
    report.healing.steps = 3
    show_healed(report, report.healing, run.out)
    assert f"in 3 steps, of {STEPS} planned (--patience, --minutes)" in " ".join(capsys.readouterr().out.split())
