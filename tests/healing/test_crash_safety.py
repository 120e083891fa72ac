"""A run that ends at any moment goes on as if nothing had been: killed, out of room, out of numbers, interrupted."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conversions import hashes
from damage import edit_weights
from healings import STEP, heal_tiny, kill, killed, options
from safetensors import SafetensorError
from safetensors.torch import load_file

from qectomy.checkpoint import checkpoint as checkpoint_module
from qectomy.checkpoint.checkpoint import sha256
from qectomy.errors import NonFiniteError, OutputError, QectomyError, Stopped
from qectomy.healing import budget, trainer
from qectomy.healing import export as export_module
from qectomy.healing import heal as heal_module
from qectomy.healing.checkpoints import Checkpoints, is_complete
from qectomy.runs import input_hashes
from qectomy.runs.run_dir import HEALING, RunDir
from qectomy.text import packing

STEPS = {"tokens": 6 * STEP, "evaluations": 3}  # a checkpoint after steps 2, 4 and 6
COMPARED = ("model.safetensors", "healing.csv", "config.json")


@pytest.fixture(scope="module")
def whole(pair, raven, tmp_path_factory):
    """The output of a run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    heal_tiny(pair(), out, raven, **STEPS)
    return out


@pytest.fixture
def run(pair, raven, tmp_path):
    """Return a function (settings) that heals into tmp_path / out."""
    made = pair()  # here, as what kills a healing at its end would kill the conversion that makes it, too
    return lambda **settings: heal_tiny(made, tmp_path / "out", raven, **{**STEPS, **settings})


@pytest.fixture
def goes_on(run, whole, tmp_path):
    """Return a function that resumes the run and finds what an uninterrupted one gives."""

    def finish(**settings):
        assert not (tmp_path / "out").exists()
        report = run(**{"resume": True, **settings})
        for name in COMPARED:
            assert (tmp_path / "out" / name).read_bytes() == (whole / name).read_bytes(), name
        assert [path.name for path in tmp_path.iterdir() if "partial" not in path.name] == ["out"]
        return report

    return finish


def checkpoints(tmp_path):
    return {path.name: is_complete(path) for path in (tmp_path / "out.healing/checkpoints").iterdir()}


def at_call(number, then, first=lambda *_, **__: None):
    """Return a function that does `first`, and at its call of a number `then`."""
    calls = []

    def act(*arguments, **named):
        calls.append(arguments)
        return (then if len(calls) == number else first)(*arguments, **named)

    return act


# Killed


def in_the_middle(patch, place, number):
    """Kill the process at a call of a function, before it does anything."""
    owner, name = place
    patch.setattr(owner, name, at_call(number, kill, getattr(owner, name)))


MOMENTS = {
    "before anything is planned": ((heal_module, "make_plan"), 1),
    "while the text is packed": ((packing, "_pack_one"), 1),
    "when the text is packed but not noted": ((packing, "write_record"), 1),
    "in the first step": ((trainer.HealTrainer, "training_step"), 1),
    "in the first checkpoint": ((torch, "save"), 1),
    "after the first checkpoint": ((trainer.HealTrainer, "training_step"), 4),
    "in a later checkpoint": ((torch, "save"), 5),
    "before a checkpoint is marked": ((trainer, "mark_complete"), 2),
    "before others are removed": ((Checkpoints, "keep_only"), 3),
    "while others are removed": ((shutil, "rmtree"), 1),
    "between training and export": ((heal_module, "export"), 1),
    "in the middle of the export": ((export_module, "write_report"), 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bytes(moment, run, goes_on):
    with pytest.MonkeyPatch.context() as patch:
        in_the_middle(patch, *MOMENTS[moment])
        killed(run)
    goes_on()


@pytest.mark.parametrize("moment", ["before anything is removed", "when run.json is gone"])
@pytest.mark.parametrize("resume", [True, False])
def test_killed_when_the_output_is_there(moment, resume, run, tmp_path):
    """`--resume` returns the report, of this run alone; whatever is asked for, nothing stays beside the output."""
    with pytest.MonkeyPatch.context() as patch:
        if moment == "before anything is removed":
            in_the_middle(patch, (RunDir, "remove"), 1)
        else:
            patch.setattr(Path, "unlink", at_unlink("lock", Path.unlink))
        killed(run)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.healing"]
    if not resume:
        with pytest.raises(OutputError, match="out exists; nothing is overwritten"):
            run()
    else:
        with pytest.raises(QectomyError, match=r"out is whole, and another run made it: seed was 0, is 1\."):
            run(resume=True, seed=1)
        for _ in range(2):
            assert run(resume=True) == json.loads((tmp_path / "out/qectomy.json").read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def at_unlink(name, right):
    """Kill the process when a file of this name is removed."""
    return lambda path, **named: kill() if path.name == name else right(path, **named)


def test_a_run_that_is_killed_again_and_again(run, goes_on, tmp_path):
    for number in (4, 2, 3):
        with pytest.MonkeyPatch.context() as patch:
            in_the_middle(patch, (trainer.HealTrainer, "training_step"), number)
            killed(lambda: run(resume=True))
    assert "checkpoint-4" in checkpoints(tmp_path)
    goes_on()


@pytest.mark.parametrize("damage", ["complete.json", "model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_a_checkpoint_that_lost_something_is_not_gone_on_from(damage, run, goes_on, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        in_the_middle(patch, (trainer.HealTrainer, "training_step"), 6)
        killed(run)
    assert checkpoints(tmp_path) == {"checkpoint-2": True, "checkpoint-4": True}
    path = tmp_path / "out.healing/checkpoints/checkpoint-4" / damage
    if damage == "complete.json":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size // 2)
    goes_on()


@pytest.mark.parametrize(
    "damaged, back",
    [
        ({4: "model.safetensors"}, 2),
        ({4: "optimizer.pt"}, 2),
        ({4: "rng_state.pth"}, 2),
        ({4: "complete.json"}, 2),
        ({2: "model.safetensors"}, 4),
        ({2: "model.safetensors", 4: "scheduler.pt"}, 0),
    ],
)
def test_a_byte_that_flips_in_a_checkpoint(damaged, back, run, goes_on, tmp_path, monkeypatch, capsys):
    """It is noticed, said, and made good from the checkpoint before, down to the start."""
    with pytest.MonkeyPatch.context() as patch:
        in_the_middle(patch, (trainer.HealTrainer, "training_step"), 6)
        killed(run)
    for step, name in damaged.items():
        flip(tmp_path / f"out.healing/checkpoints/checkpoint-{step}" / name)
    trained, step = [], trainer.HealTrainer.training_step
    monkeypatch.setattr(trainer.HealTrainer, "training_step", lambda *a, **k: trained.append(1) or step(*a, **k))
    capsys.readouterr()
    if back:
        goes_on(resume="only")
    else:
        with pytest.raises(QectomyError, match=r"out\.healing holds nothing sound to go on from, and --resume-only"):
            run(resume="only")
        assert not trained
        goes_on()
    assert len(trained) == 6 - back
    told = " and ".join(f"checkpoint-{step}" for step in damaged)
    then = f"going on from checkpoint-{back}" if back else "training anew"
    [noted] = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert noted.endswith(f" in {tmp_path / 'out.healing'} was damaged on the disk: {then}")
    assert all(f"checkpoint-{step}" in noted for step in damaged), told


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_killed_from_outside(number, pair, raven, tmp_path):
    """A real process of the command, killed once a checkpoint is there, and the command again."""
    found, settings = pair(), {"tokens": 60 * STEP, "evaluations": 20, "patience": 0}
    command = [sys.executable, "-m", "qectomy", "heal", str(found.reduced), "--teacher", str(found.original)]
    command += ["--out", str(tmp_path / "out"), *options(raven, **settings)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out.healing/checkpoints/*/complete.json")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 75
        said, then = stderr.splitlines()[-2:]
        assert said == f"error: interrupted; {tmp_path / 'out.healing'} holds the run, --resume goes on with it"
        assert then.startswith(f"to go on: qectomy heal --resume {found.reduced} ")
    assert not (tmp_path / "out").exists()
    refused = "holds a run that was not finished: go on with --resume, or start anew with --clean"
    with pytest.raises(QectomyError, match=refused):
        heal_tiny(found, tmp_path / "out", raven, **settings)
    heal_tiny(found, tmp_path / "out", raven, resume=True, **settings)
    heal_tiny(found, tmp_path / "whole", raven, **settings)
    for name in COMPARED:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "out.healing").exists()


@pytest.mark.parametrize("name", ["train.bin", "validation.bin"])
def test_a_byte_that_flips_in_the_packed_text(name, run, goes_on, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        in_the_middle(patch, (trainer.HealTrainer, "training_step"), 4)
        killed(run)
    flip(tmp_path / "out.healing" / name)
    capsys.readouterr()
    goes_on()
    told = f"note: {name} in {tmp_path / 'out.healing'} was damaged on the disk: the texts are packed again"
    assert told in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", ["run.json", "data.json"])
def test_a_byte_that_flips_in_a_record_is_refused(name, unfinished, run, tmp_path):
    path = tmp_path / "out.healing" / name
    path.write_text(path.read_text().replace('"tokens', '"t0kens', 1))
    with pytest.raises(QectomyError, match=rf"{name} was damaged on the disk after it was written; remove the folder"):
        run(resume=True)
    assert checkpoints(tmp_path)["checkpoint-6"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[2 * len(data) // 3] ^= 1
    path.write_bytes(data)


# What may not change on the way


@pytest.fixture
def unfinished(run, monkeypatch, tmp_path):
    """A run that stopped after its training."""
    with monkeypatch.context() as patch:
        patch.setattr(heal_module, "export", at_call(1, stop))
        with pytest.raises(ZeroDivisionError):
            run()
    assert (tmp_path / "out.healing/run.json").is_file()


def stop(*_, **__):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"lr": 1e-3}, r"holds another run: lr was 0\.003, is 0\.001\. Give what that run was given, or another --out"),
        ({"seed": 1}, r"another run: seed was 0, is 1\."),
        ({"train": "attention", "loss": "ce"}, r"another run: loss was kl, is ce; train was all, is attention\."),
        ({"tokens": 99 * STEP}, r"another run: tokens was 768, is 12672\."),
        ({"dtype": "bfloat16"}, r"another run: dtype was float32, is bfloat16\."),
    ],
)
def test_other_settings_are_refused_by_name(changed, message, unfinished, run):
    with pytest.raises(QectomyError, match=message):
        run(resume=True, **changed)


def test_another_text_or_model_is_refused(unfinished, pair, raven, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(raven.read_text())
    with pytest.raises(QectomyError, match=r"text hashes was .*; texts was"):
        heal_tiny(pair(), tmp_path / "out", other, resume=True, **STEPS)
    with pytest.raises(QectomyError, match="another run: reduced checkpoint was"):
        heal_tiny(pair("llama", "select"), tmp_path / "out", raven, resume=True, **STEPS)


def test_what_changes_no_number_may_change(unfinished, goes_on):
    goes_on(command="another")


def test_resuming_a_run_that_is_done_trains_no_more(unfinished, goes_on, monkeypatch):
    monkeypatch.setattr(trainer.HealTrainer, "training_step", lambda *_: pytest.fail("trained"))
    goes_on()


def test_an_unfinished_run_is_refused_without_resume(unfinished, run, tmp_path):
    before = hashes(tmp_path / "out.healing/checkpoints/checkpoint-6")
    with pytest.raises(QectomyError, match=r"out\.healing holds a run that was not finished: go on with --resume"):
        run()
    assert hashes(tmp_path / "out.healing/checkpoints/checkpoint-6") == before


def test_an_output_that_exists_is_left_as_it_is(run, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="out exists; nothing is overwritten"):
        run()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_too_little_room_is_said_at_once(run, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(OutputError, match=r"has 1,000 bytes free; [\d,]+ are needed"):
        run()
    assert list(tmp_path.iterdir()) == []


# Checkpoints that change meanwhile


def copied(pair, tmp_path):
    """Return a pair that is the test's own, to change."""
    found = pair()
    folders = [shutil.copytree(folder, tmp_path / f"own/{folder.name}-{i}") for i, folder in enumerate(astuple(found))]
    return replace(found, original=folders[0], reduced=folders[1])


@pytest.mark.parametrize("whose", ["original", "reduced"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_checkpoint_that_changes_is_named(whose, name, pair, raven, whole, tmp_path, monkeypatch):
    found, out = copied(pair, tmp_path), tmp_path / "out"
    path = getattr(found, whose) / name
    kept = path.read_bytes()
    changed = kept + b"\n" if path.suffix == ".json" else kept[:-9] + bytes([kept[-9] ^ 1]) + kept[-8:]
    right = export_module.write_report
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_report", lambda *told: (right(*told), path.write_bytes(changed)))
        with pytest.raises(
            Stopped, match=rf"{name} has changed since this run began.*out\.healing.*--resume$"
        ) as caught:
            heal_tiny(found, out, raven, **STEPS)
    assert caught.value.resumable
    assert not out.exists()
    with pytest.raises(QectomyError, match=r"holds another run: (reduced|original) checkpoint was"):
        heal_tiny(found, out, raven, resume=True, **STEPS)
    path.write_bytes(kept)
    heal_tiny(found, out, raven, resume=True, **STEPS)
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("load", ["load_teacher", "load_student"])
def test_no_step_is_taken_from_weights_that_change_while_they_are_loaded(load, pair, raven, tmp_path, monkeypatch):
    found, right = copied(pair, tmp_path), getattr(heal_module, load)
    folder = found.original if load == "load_teacher" else found.reduced

    def change(*told):
        edit_weights(folder, lambda tensors: [tensor.mul_(2) for tensor in tensors.values()])
        return right(*told)

    monkeypatch.setattr(heal_module, load, change)
    monkeypatch.setattr(heal_module, "budget_of", lambda *_: pytest.fail("went on"))
    with pytest.raises(Stopped, match=r"model\.safetensors has changed since this run began"):
        heal_tiny(found, tmp_path / "out", raven, **STEPS)


def test_each_file_of_the_checkpoints_is_hashed_once(pair, raven, tmp_path, monkeypatch):
    hashed, found = [], copied(pair, tmp_path)
    for module in (checkpoint_module, input_hashes):
        monkeypatch.setattr(module, "sha256", lambda path: hashed.append(Path(path)) or sha256(path))
    heal_tiny(found, tmp_path / "out", raven, **STEPS)
    weights = [path for path in hashed if path.parent in astuple(found) and path.name == "model.safetensors"]
    assert sorted(weights) == sorted(folder / "model.safetensors" for folder in astuple(found))


# Numbers that are none


def spoiled(step, right=trainer.HealTrainer.compute_loss):
    """A loss that is NaN in the training of one step."""

    def compute_loss(self, model, inputs, return_outputs=False, **named):
        loss = right(self, model, inputs, return_outputs, **named)
        return loss * torch.nan if model.training and self.state.global_step == step - 1 else loss

    return compute_loss


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_a_loss_that_is_no_number_names_the_step_and_keeps_the_checkpoint(micro_batch, run, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.HealTrainer, "compute_loss", spoiled(5))
    with pytest.raises(NonFiniteError) as caught:
        run(micro_batch=micro_batch)
    assert str(caught.value) == (
        f"step 5: the loss is nan, the norm of its gradient nan. {tmp_path / 'out.healing'} keeps the last checkpoint "
        "before it. A new run (--clean) may get past it with a lower --lr, a longer --warmup or --dtype float32"
    )
    assert checkpoints(tmp_path)["checkpoint-4"]
    assert not (tmp_path / "out").exists()


def test_after_a_loss_that_was_no_number_the_run_goes_on(run, goes_on, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer.HealTrainer, "compute_loss", spoiled(5))
        with pytest.raises(NonFiniteError, match="step 5"):
            run()
    goes_on()


def test_a_rate_that_is_far_too_high(run, tmp_path):
    with pytest.raises(NonFiniteError, match=r"step 2: the loss is .*, the norm of its gradient (nan|inf)\."):
        run(lr=1e30, warmup=0.0, clip=1e30)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_no_number_on_the_validation_windows(run, monkeypatch):
    right = trainer.HealTrainer.compute_loss

    def compute_loss(self, model, inputs, return_outputs=False, **named):
        found = right(self, model, inputs, return_outputs, **named)
        return (found[0], {**found[1], "nll": found[1]["nll"] * torch.inf}) if return_outputs else found

    monkeypatch.setattr(trainer.HealTrainer, "compute_loss", compute_loss)
    with pytest.raises(
        NonFiniteError, match=r"on the validation windows the model gives NaN or Inf \(KL \d.*log p inf\)"
    ):
        run()


# No room, no memory, Ctrl-C


ROOM = r"the disk is full; .*out\.healing holds the last whole checkpoint\. Free some room, then --resume"
MEMORY = (
    r"out of memory\. Run fewer windows at a time with --micro-batch \(the step keeps its --batch-tokens\), use a "
    r"--context below 32, --activation-checkpointing, or --train attention"
)
FULL = {
    "os": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "torch": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),  # names no disk
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("error", FULL.values(), ids=FULL)
def test_the_disk_fills_up_in_a_checkpoint(error, run, goes_on, monkeypatch, tmp_path):
    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "mark_complete", at_call(2, full, trainer.mark_complete))
        with pytest.raises(OutputError, match=ROOM):
            run()
    assert checkpoints(tmp_path) == {"checkpoint-2": True, "checkpoint-4": False}
    goes_on()


def test_the_disk_fills_up_while_the_text_is_packed(run, goes_on, monkeypatch):
    def full(*_, **__):
        raise FULL["os"]

    with monkeypatch.context() as patch:
        patch.setattr(packing, "_pack_one", full)
        with pytest.raises(OutputError, match=ROOM):
            run()
    goes_on()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_running_out_of_memory_says_what_helps(error, run, goes_on, monkeypatch):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        step = trainer.HealTrainer.training_step
        patch.setattr(trainer.HealTrainer, "training_step", at_call(4, fail, step))
        with pytest.raises(QectomyError, match=MEMORY):
            run()
    goes_on()


def test_ctrl_c_says_how_to_go_on(run, goes_on, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        step = trainer.HealTrainer.training_step
        patch.setattr(trainer.HealTrainer, "training_step", at_call(4, interrupt, step))
        with pytest.raises(
            Stopped, match=r"interrupted; .*out\.healing holds the run, --resume goes on with it"
        ) as caught:
            run()
    assert caught.value.resumable
    goes_on()


def test_a_disk_that_fails_in_a_checkpoint(run, goes_on, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "mark_complete", at_call(2, fail, trainer.mark_complete))
        with pytest.raises(
            OutputError, match=r"^Input/output error; .*checkpoint\. Mend the disk, then --resume"
        ) as caught:
            run()
    assert caught.value.resumable
    goes_on()


def test_errors_that_no_user_can_mend_stay_what_they_are(run, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer.HealTrainer, "training_step", fail)
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        run()


# Ends that were meant


def rising(monkeypatch):
    """Let every validation be worse than the one before."""
    right = trainer.HealTrainer.prediction_step

    def step(self, *arguments, **named):
        loss, each, labels = right(self, *arguments, **named)
        return loss, each + self.state.global_step, labels

    monkeypatch.setattr(trainer.HealTrainer, "prediction_step", step)


@pytest.mark.parametrize("patience, steps", [(1, 1), (3, 3), (6, 6), (0, 6)])
def test_patience_ends_a_run_that_gets_no_better(patience, steps, run, monkeypatch):
    rising(monkeypatch)
    healing = run(patience=patience, evaluations=6)["healing"]
    assert (healing["steps"], healing["planned_steps"], healing["tokens"]) == (steps, 6, steps * STEP)
    assert [row["step"] for row in healing["validation"]["curve"]] == list(range(steps + 1))
    assert healing["best_step"] == 0


def test_a_run_that_patience_ended_is_not_gone_on_with(run, monkeypatch):
    rising(monkeypatch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heal_module, "export", kill)
        killed(lambda: run(patience=1, evaluations=6))
    assert run(patience=1, evaluations=6, resume=True)["healing"]["steps"] == 1


@pytest.fixture
def clock(monkeypatch):
    """A clock that only a step moves, by 25 seconds."""
    now, step = [0.0], trainer.HealTrainer.training_step

    def training_step(*arguments, **named):
        now[0] += 25.0
        return step(*arguments, **named)

    monkeypatch.setattr(trainer.HealTrainer, "training_step", training_step)
    for module in (trainer, budget):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(budget, "_speed", lambda *_: (1e6, 0.0))
    return now


@pytest.mark.parametrize("minutes, steps", [(1.0, 3), (0.4, 1), (60.0, 6)])
def test_minutes_end_a_run(minutes, steps, run, clock):
    healing = run(minutes=minutes)["healing"]
    assert (healing["steps"], healing["planned_steps"]) == (steps, 6)
    assert healing["validation"]["curve"][-1]["step"] == steps
    assert healing["seconds"]["training"] == 25.0 * steps


def test_minutes_of_an_earlier_process_count(run, clock, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        in_the_middle(patch, (trainer.HealTrainer, "training_step"), 3)
        killed(lambda: run(minutes=1.6))
    assert RunDir(tmp_path / "out", HEALING).record()["seconds"] == 50.0
    healing = run(minutes=1.6, resume=True)["healing"]
    assert healing["steps"] == 4
    assert healing["seconds"]["training"] == 100.0


def test_a_checkpoint_now_and_then_besides_those_of_validations(run, whole, clock, monkeypatch, tmp_path):
    saved = []
    monkeypatch.setattr(trainer, "SECONDS_A_CHECKPOINT", 30.0)
    mark = trainer.mark_complete
    monkeypatch.setattr(trainer, "mark_complete", lambda folder: (saved.append(folder.name), mark(folder)))
    run(evaluations=1)
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_old_checkpoints_are_removed_but_the_best_and_the_last_two(run, monkeypatch, tmp_path):
    seen = []

    def look(*_, **__):
        seen.append(set(checkpoints(tmp_path)))
        raise ZeroDivisionError

    right = trainer.HealTrainer.prediction_step

    def step(self, *arguments, **named):
        loss, each, labels = right(self, *arguments, **named)
        return loss, each * (0.5 if self.state.global_step == 2 else 1.5), labels

    monkeypatch.setattr(trainer.HealTrainer, "prediction_step", step)
    monkeypatch.setattr(heal_module, "export", look)
    with pytest.raises(ZeroDivisionError):
        run(patience=0, evaluations=6)
    assert seen == [{"checkpoint-2", "checkpoint-5", "checkpoint-6"}]


# What may change, and who may enter


def test_fewer_windows_at_a_time_after_running_out_of_memory(run, goes_on, monkeypatch, tmp_path):
    """The step stays the same: another number of windows at a time is no other run."""

    def fail(self, *_, **__):
        raise torch.OutOfMemoryError("out")

    with monkeypatch.context() as patch:
        patch.setattr(trainer.HealTrainer, "training_step", fail)
        with pytest.raises(QectomyError, match="--micro-batch"):
            run(micro_batch=4)
    healing = run(micro_batch=3, resume=True)["healing"]
    assert (healing["micro_batch"], healing["accumulation"], healing["tokens_a_step"]) == (2, 2, STEP)


def test_two_processes_do_not_share_a_run(run, tmp_path):
    other = RunDir(tmp_path / "out", HEALING)
    other.start({}, resume=False)
    with pytest.raises(QectomyError, match=r"out\.healing is in use: another process works there"):
        run(resume=True)
    other.release()
    with pytest.raises(QectomyError, match="another run"):
        run(resume=True)


def test_a_folder_that_is_no_runs_is_not_entered(run, tmp_path):
    (tmp_path / "out.healing").mkdir()
    (tmp_path / "out.healing/thesis.tex").write_text("years of work")
    for resume in (True, False):
        with pytest.raises(QectomyError, match=r"is no run's folder \(it holds thesis\.tex\)"):
            run(resume=resume)
    assert (tmp_path / "out.healing/thesis.tex").read_text() == "years of work"


def test_a_run_that_was_moved_keeps_its_best_checkpoint(run, monkeypatch, tmp_path):
    """Trainer notes the best one by its whole path."""
    right = trainer.HealTrainer.prediction_step

    def step(self, *arguments, **named):
        loss, each, labels = right(self, *arguments, **named)
        return loss, each * (0.5 if self.state.global_step == 2 else 1.5), labels

    monkeypatch.setattr(trainer.HealTrainer, "prediction_step", step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heal_module, "export", kill)
        killed(lambda: run(patience=0))
    whole = load_file(tmp_path / "out.healing/checkpoints/checkpoint-2/model.safetensors")
    state = tmp_path / "out.healing/checkpoints/checkpoint-6/trainer_state.json"
    text = state.read_text()
    state.write_text(text.replace(str(tmp_path), str(tmp_path)[:-1] + "?"))
    assert state.read_text() != text
    healing = run(patience=0, resume=True)["healing"]
    assert healing["best_step"] == 2
    ours = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(ours[name], whole[name]) for name in ours)
