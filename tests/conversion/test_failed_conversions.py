"""Whatever goes wrong, a conversion ends with one clear error and leaves nothing behind, or what can be resumed."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import conversions
import pytest
import torch
from conversions import convert_tiny, hashes
from damage import allow_interrupts, edit_json, edit_weights
from interruptions import same_output
from safetensors import SafetensorError

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.shards import ShardWriter, TensorSpec
from qectomy.conversion import fitted as convert_module
from qectomy.conversion.fitted import check_device
from qectomy.conversion.layerwise import LayerPass
from qectomy.errors import (
    CheckpointError,
    NonFiniteError,
    OutputError,
    QectomyError,
    Stopped,
    TextError,
    UnreadableError,
)
from qectomy.eval import reload
from qectomy.runs.produce import run_dir
from qectomy.runs.run_dir import RunDir
from qectomy.runs.step_writer import StepWriter


@pytest.fixture
def fails(raven, tmp_path):
    """Return a function (source, error, message) that converts into a folder of its own and finds what it left there.

    That is nothing or, of a conversion whose layers are all done, what can be resumed.
    """
    place = tmp_path / "place"
    place.mkdir()

    def run(source, error, message, query="select", left=(), **settings):
        before = hashes(source)
        with pytest.raises(error, match=message) as caught:
            convert_tiny(source, place / "out", query, raven, **settings)
        assert [path.name for path in place.iterdir()] == list(left)
        assert hashes(source) == before
        assert len(str(caught.value).splitlines()) == 1

    return run


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight"]
)
def test_weights_that_are_no_numbers(tiny_copy, fails, name, value):
    source = tiny_copy()
    edit_weights(source, lambda tensors: tensors[name].view(-1)[3:4].fill_(value))
    fails(source, NonFiniteError, rf"tensor {name} holds NaN or Inf")


@pytest.mark.parametrize(
    "name, query",
    [
        ("mlp.down_proj", "0=dense,1=dense"),
        ("mlp.down_proj", "0=select,1=dense"),
        ("input_layernorm", "0=dense,1=select"),
        ("self_attn.k_proj", "0=dense,1=key-shared"),
    ],
)
def test_hidden_states_that_overflow_name_the_layer(tiny_copy, fails, name, query):
    source = tiny_copy()
    edit_weights(source, lambda tensors: tensors[f"model.layers.1.{name}.weight"].fill_(3e38))
    fails(source, NonFiniteError, r"the original model's layer 1 gives NaN or Inf on windows", query=query)


@pytest.mark.parametrize("query", ["0=dense,1=select", "0=dense,1=key-shared"])
def test_second_moments_that_overflow_name_the_layer(tiny_copy, fails, query):
    """x̂ is so large, and what reads it so small, that the model runs in float32 and x̂'s squares do not."""
    source, layer = tiny_copy(), "model.layers.1."

    def scale(tensors):
        tensors[f"{layer}input_layernorm.weight"].mul_(1e20)
        for name in ("q_proj", "k_proj", "v_proj"):
            tensors[f"{layer}self_attn.{name}.weight"].mul_(1e-20)

    edit_weights(source, scale)
    fails(source, NonFiniteError, r"layer 1 cannot be fitted: .* overflow", query=query)


def test_a_fit_that_gives_no_number(tiny_checkpoint, fails, monkeypatch):
    def spoil(runner, student, streams, settings):
        student.self_attn.o_proj.weight[0, 0] = torch.nan

    monkeypatch.setattr("qectomy.conversion.layerwise.refit_layer", spoil)
    fails(tiny_checkpoint(), NonFiniteError, r"model.layers.0.self_attn.o_proj.weight came out as NaN or Inf")


def test_logits_that_overflow(tiny_copy, fails):
    source = tiny_copy()
    edit_weights(source, lambda tensors: tensors["lm_head.weight"].mul_(1e38))
    told = r"logits are NaN or Inf on evaluation windows .*out.converting holds what was done"
    fails(source, NonFiniteError, told, left=["out.converting"])


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
def test_weights_too_large_for_the_dtype(tiny_copy, fails, name, monkeypatch):
    """Also in the row of a token that the text does not hold; before the first layer is fitted."""
    source = tiny_copy()
    monkeypatch.setattr(LayerPass, "_layer", None)
    edit_weights(source, lambda tensors: tensors[name].view(tensors[name].shape[0], -1)[2].fill_(-1e5))
    told = rf"{name} holds 1e\+05, and float16 ends at 6.55e\+04: .*Use --dtype bfloat16 or float32"
    fails(source, NonFiniteError, told, dtype="float16")


def test_settings_that_cannot_be(tiny_checkpoint, fails, tmp_path):
    source = tiny_checkpoint()
    fails(source, QectomyError, r"unknown --dtype 'int8'; known: float32, bfloat16, float16", dtype="int8")
    fails(source, QectomyError, r"--device cuda:7: not usable here", device="cuda:7")
    fails(source, QectomyError, r"--device abacus: not usable here", device="abacus")
    fails(source, TextError, r"no calibration text: give --text FILE", texts=())
    fails(source, TextError, r"fewer than one window of 2048", context=2048, eval_tokens=99_999)
    short = tmp_path / "short.txt"
    short.write_text("Nevermore, " * 22)
    fails(source, TextError, r"short.txt has \d+ tokens; less the first 160", texts=(str(short),), eval_tokens=160)


def test_a_device_that_holds_no_numbers():
    with pytest.raises(QectomyError, match="--device meta: not usable"):
        check_device("meta")


def test_a_tokenizer_of_another_model(tiny_checkpoint, fails):
    fails(tiny_checkpoint(vocab_size=280), CheckpointError, r"token id \d+, but the model's embedding has 280 rows")


def test_a_checkpoint_without_tokenizer(tiny_copy, fails):
    source = tiny_copy()
    for path in source.glob("tokenizer*"):
        path.unlink()
    fails(source, CheckpointError, "holds no tokenizer that can be loaded")


def test_an_output_that_exists_is_left_as_it_is(tiny_checkpoint, raven, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "theirs").write_text("theirs")
    with pytest.raises(OutputError, match=r"out exists; nothing is overwritten"):
        convert_tiny(tiny_checkpoint(), out, "select", raven)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["theirs"]


# A disk that is full or fails


@pytest.fixture(scope="module")
def calm(raven, tmp_path_factory):
    """Return a function (source) -> the output of a conversion to which nothing happened, made once."""
    made = {}

    def make(source):
        if source.name not in made:
            made[source.name] = tmp_path_factory.mktemp("calm") / "out"
            convert_tiny(source, made[source.name], "select", raven)
        return made[source.name]

    return make


@pytest.fixture
def stopped(raven, calm, tmp_path):
    """Return a function (source, what happens, error) that fails, resumes and finds what a calm run gives.

    It returns what the error said and how many steps were kept.
    """

    def run(source, act, error=OutputError):
        place = tmp_path / "place"
        place.mkdir()
        before = hashes(source)
        with pytest.MonkeyPatch.context() as patch:
            act(patch)
            with pytest.raises(error) as caught:
                convert_tiny(source, place / "out", "select", raven)
        assert hashes(source) == before
        assert len(str(caught.value).splitlines()) == 1
        if [path.name for path in place.iterdir()] == []:
            return str(caught.value), 0
        assert [path.name for path in place.iterdir()] == ["out.converting"]
        steps = len(RunDir(place / "out").journal.entries)
        convert_tiny(source, place / "out", "select", raven, resume=True)
        same_output(place / "out", calm(source))
        assert [path.name for path in place.iterdir()] == ["out"]
        return str(caught.value), steps

    return run


FULL, FAILING = (errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")
CALLS = [("pwrite", after, *FULL) for after in (0, 3, 12, 20, 30, 40)]
CALLS += [("posix_fallocate", after, *FULL) for after in (0, 8)]
CALLS += [("fsync", after, *FAILING) for after in (0, 1, 4, 5, 9, 10, 14, 15, 20)]


@pytest.mark.parametrize("name, after, code, what", CALLS)
def test_a_call_fails(name, after, code, what, tiny_checkpoint, stopped):
    calls = []

    def fail_late(patch):
        right = getattr(os, name)

        def fail(*arguments):
            calls.append(arguments)
            if len(calls) > after:
                raise OSError(code, os.strerror(code))
            return right(*arguments)

        patch.setattr(os, name, fail)

    said, steps = stopped(tiny_checkpoint(), fail_late)
    assert len(calls) > after
    assert "no room for" in said if name == "posix_fallocate" else f"out could not be written: {what}." in said
    if steps:
        assert said.endswith("out.converting holds what was done: go on with --resume, or start anew with --clean.")
    else:
        assert said.endswith("Nothing was left behind.")


def test_how_far_calls_that_fail_late_get(tiny_checkpoint, stopped):
    """The numbers above reach every step: the last call that syncs is one of the output's."""
    said, steps = stopped(tiny_checkpoint(), lambda patch: patch.setattr(Path, "rename", refuse(errno.EACCES)))
    assert "out could not be written: Permission denied. " in said
    assert steps == 3  # the outer tensors and both layers


def refuse(code):
    def act(*_, **__):
        raise OSError(code, os.strerror(code))

    return act


def test_the_disk_fills_up_before_the_reload_check(tiny_checkpoint, stopped):
    """safetensors has an error of its own for it."""

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    said, steps = stopped(tiny_checkpoint(), lambda patch: patch.setattr("qectomy.eval.reload.save_file", full))
    assert "No space left on device" in said
    assert "--resume" in said
    assert steps == 3


def test_the_reload_check_is_killed(tiny_checkpoint, stopped):
    def killed(command, **_):
        return subprocess.CompletedProcess(command, -signal.SIGKILL, "", "")

    def act(patch):
        patch.setattr(conversions, "reload_here", lambda patch: patch.setattr(reload.subprocess, "run", killed))

    said, steps = stopped(tiny_checkpoint(), act, Stopped)
    assert "most likely out of memory. " in said
    assert steps == 3


def test_a_result_that_is_refused_at_the_end_is_kept(tiny_checkpoint, stopped):
    """Hours of layers are not to be thrown away for what can be mended beside them."""

    def refuses(command, **_):
        return subprocess.CompletedProcess(command, reload.REFUSED, "", "CheckpointError: it gives other logits")

    def act(patch):
        patch.setattr(conversions, "reload_here", lambda patch: patch.setattr(reload.subprocess, "run", refuses))

    said, steps = stopped(tiny_checkpoint(), act, CheckpointError)
    assert "it gives other logits. " in said
    assert said.endswith("out.converting holds what was done: go on with --resume, or start anew with --clean.")
    assert steps == 3


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/proc/mounts").exists(), reason="only root mounts a small disk")
@pytest.mark.parametrize("kilobytes", [80, 160, 200, 240, 280])
def test_a_small_disk(kilobytes, tiny_checkpoint, raven, calm, tmp_path, monkeypatch):
    """A real one: what a process can still do on it, to tell, to remove and to resume, is tested too."""
    place, source = tmp_path / "disk", tiny_checkpoint()
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**12}))
    try:
        with pytest.raises(OutputError, match=r"the disk is full|no room for|No space left on device"):
            convert_tiny(source, place / "out", "select", raven)
        left = [path.name for path in place.iterdir()]
        assert left in ([], ["out.converting"])
        subprocess.run([*mount[:4], "remount,size=10m", *mount[5:]], check=True)
        convert_tiny(source, place / "out", "select", raven, resume=True)
        same_output(place / "out", calm(source))
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_too_little_room_is_said_at_once(tiny_checkpoint, fails, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    fails(tiny_checkpoint(), OutputError, r"has 1,000 bytes free; [\d,]+ are needed")


# A source that changes, or cannot be read any more


def at_layer(number, act):
    """Return a function (patch) that lets something happen when a layer has been run."""

    def install(patch):
        right = LayerPass._layer

        def layer(self, index, *rest):
            record = right(self, index, *rest)
            if index == number:
                act()
            return record

        patch.setattr(LayerPass, "_layer", layer)

    return install


@pytest.mark.parametrize(
    "name, how",
    [
        ("model.safetensors", "in place"),
        ("model.safetensors", "with its time put back"),
        ("model.safetensors", "gone"),
        ("config.json", "in place"),
        ("tokenizer.json", "replaced"),
    ],
)
def test_a_source_that_changes_is_named(name, how, tiny_copy, raven, calm, tmp_path):
    source = tiny_copy()
    path, kept = source / name, (source / name).read_bytes()

    def change():
        status = path.stat()
        if how in ("replaced", "gone"):
            path.unlink()
        if how != "gone":
            path.write_bytes(kept + b"\n" if path.suffix == ".json" else kept[:-9] + bytes([kept[-9] ^ 1]) + kept[-8:])
        if how == "with its time put back":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.MonkeyPatch.context() as patch:
        at_layer(1, change)(patch)
        with pytest.raises(Stopped, match=rf"{name} (has changed since this run began|is gone).*--resume") as caught:
            convert_tiny(source, tmp_path / "out", "select", raven)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert len(RunDir(tmp_path / "out").journal.entries) == 2  # the layer that might come of two models is none
    if how != "gone":
        with pytest.raises(QectomyError, match=rf"holds another run: source's {name} was [0-9a-f]+, is [0-9a-f]+\."):
            convert_tiny(source, tmp_path / "out", "select", raven, resume=True)
    path.write_bytes(kept)
    convert_tiny(source, tmp_path / "out", "select", raven, resume=True)
    same_output(tmp_path / "out", calm(source))


def test_a_source_that_changes_after_the_last_layer(tiny_copy, raven, tmp_path, monkeypatch):
    source = tiny_copy()
    right = convert_module.write_report

    def change(*arguments):
        right(*arguments)
        edit_json(source / "config.json", lambda config: config.update(rope_theta=1.0))

    monkeypatch.setattr(convert_module, "write_report", change)
    with pytest.raises(Stopped, match=r"config\.json has changed since this run began"):
        convert_tiny(source, tmp_path / "out", "select", raven)
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_touched_but_the_same(tiny_copy, raven, tmp_path, monkeypatch):
    source = tiny_copy()
    at_layer(0, lambda: [os.utime(path) for path in source.iterdir()])(monkeypatch)
    convert_tiny(source, tmp_path / "out", "select", raven)
    assert (tmp_path / "out/qectomy.json").is_file()


def test_a_source_that_cannot_be_read_any_more(tiny_copy, stopped):
    source = tiny_copy()
    right = Checkpoint.read_layer

    def fail(self, layer, *rest):
        if layer:
            raise UnreadableError("model.safetensors: cannot read tensor w: Input/output error")
        return right(self, layer, *rest)

    said, steps = stopped(source, lambda patch: patch.setattr(Checkpoint, "read_layer", fail), UnreadableError)
    assert "Input/output error. " in said
    assert steps == 2


# What was written is not what was meant


@pytest.mark.parametrize("shape", ["llama", "bf16"])
@pytest.mark.parametrize("name", ["mlp.down_proj.weight", "self_attn.k_proj.weight", "input_layernorm.weight"])
def test_a_tampered_output_is_found(tiny_checkpoint, fails, monkeypatch, shape, name):
    write = ShardWriter.write

    def flip(self, key, tensor):
        if key == f"model.layers.1.{name}":
            tensor = tensor.clone()
            tensor.view(-1)[:4] *= -3.0
        write(self, key, tensor)

    monkeypatch.setattr(ShardWriter, "write", flip)
    told = r"gives other logits in a fresh process: off by \d"
    fails(tiny_checkpoint(shape), CheckpointError, told, "key-shared", left=["out.converting"])


def test_an_output_that_does_not_load_is_found(tiny_checkpoint, fails, monkeypatch):
    def spoil(family, folder):
        edit_json(folder / "config.json", lambda config: config.update(query_maps=["select"]))

    monkeypatch.setattr(convert_module, "copy_model_code", spoil)
    told = r"does not load in a fresh process: .*query_maps"
    fails(tiny_checkpoint(), CheckpointError, told, left=["out.converting"])


def test_bits_that_flip_between_write_and_reload(tiny_checkpoint, stopped):
    """The tensor is named; what a fresh process computes need not show it."""

    def flip_late(patch):
        right = convert_module.copy_model_code

        def flip(family, folder):
            right(family, folder)
            path = folder / "model.safetensors"
            data = bytearray(path.read_bytes())
            data[8 + int.from_bytes(data[:8], "little")] ^= 1  # the last bit of the first number
            path.write_bytes(data)

        patch.setattr(convert_module, "copy_model_code", flip)

    said, steps = stopped(tiny_checkpoint(), flip_late, Stopped)
    assert "tensor model.embed_tokens.weight is not on the disk as it was written" in said
    assert steps == 3


# Interruptions


def test_ctrl_c_in_any_stage(tiny_checkpoint, raven, calm, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    early = ["calibrate.hidden_states.WindowFile.__setitem__", "conversion.fitted.SourceWatch"]
    late = ["calibrate.layer_fit.fitted_map", "calibrate.layer_fit.refine"]
    late += ["conversion.layerwise.refit_layer", "conversion.layerwise.final_scores"]
    late += ["conversion.fitted.check_reload", "conversion.fitted.write_report"]
    for stage in early + late:
        place = tmp_path / stage
        place.mkdir()
        error = Stopped if stage in late else KeyboardInterrupt
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(f"qectomy.{stage}", interrupt)
            with pytest.raises(error) as caught:
                convert_tiny(tiny_checkpoint(), place / "out", "select", raven)
        assert [path.name for path in place.iterdir()] == (["out.converting"] if stage in late else []), stage
        if stage in late:
            assert str(caught.value) == (
                f"interrupted. {place / 'out.converting'} holds what was done: go on with --resume, or start anew with "
                "--clean."
            )
            convert_tiny(tiny_checkpoint(), place / "out", "select", raven, resume=True)
            same_output(place / "out", calm(tiny_checkpoint()))


def command(source, out, raven):
    """Return a command line that takes a while."""
    options = f"convert {source} --out {out} --text {raven} --context 32 --tokens 1024 --eval-tokens 160"
    return [sys.executable, "-m", "qectomy", *options.split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_of_the_command(tiny_checkpoint, raven, tmp_path, number):
    source = tiny_checkpoint("llama", num_hidden_layers=40)
    place = tmp_path / "place"
    place.mkdir()
    process = subprocess.Popen(
        command(source, place / "deep/out", raven),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=allow_interrupts,
    )
    try:
        journal = place / "deep/out.converting/journal"
        deadline = time.monotonic() + 60
        while not journal.exists() or journal.read_bytes().count(b"\n") < 2:  # a step is kept
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.poll() is None
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 75
    assert [str(path.relative_to(place)) for path in place.glob("*/*")] == ["deep/out.converting"]
    assert "Traceback" not in stderr
    *_, said, then = stderr.strip().splitlines()
    assert said.endswith("go on with --resume, or start anew with --clean.")
    assert then.startswith(f"to go on: qectomy convert --resume {source} ")
    assert stdout == ""


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As nohup wants it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run_dir(tmp_path / "out", {}) as work:
            signal.raise_signal(signal.SIGHUP)
            StepWriter(work, {"w": TensorSpec((1,), "F32")})
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
