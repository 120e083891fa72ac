"""Whatever goes wrong, a conversion ends with one clear error and leaves nothing behind."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conversions import convert_tiny, hashes
from damage import allow_interrupts, edit_json, edit_weights
from safetensors import SafetensorError

from qectomy.calibrate import convert as convert_module
from qectomy.calibrate.convert import check_device
from qectomy.errors import CheckpointError, NonFiniteError, OutputError, QectomyError, TextError
from qectomy.surgery.writer import ShardWriter


@pytest.fixture
def fails(raven, tmp_path):
    """Return a function (source, error, message) that converts into a folder of its own and finds it empty after."""
    place = tmp_path / "place"
    place.mkdir()

    def run(source, error, message, query="select", **settings):
        before = hashes(source)
        with pytest.raises(error, match=message) as caught:
            convert_tiny(source, place / "out", query, raven, **settings)
        assert list(place.iterdir()) == []
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

    monkeypatch.setattr("qectomy.calibrate.layer_pass.refit_layer", spoil)
    fails(tiny_checkpoint(), NonFiniteError, r"model.layers.0.self_attn.o_proj.weight came out as NaN or Inf")


def test_logits_that_overflow(tiny_copy, fails):
    source = tiny_copy()
    edit_weights(source, lambda tensors: tensors["lm_head.weight"].mul_(1e38))
    fails(source, NonFiniteError, r"logits are NaN or Inf on evaluation windows")


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
def test_weights_too_large_for_the_dtype(tiny_copy, fails, name):
    """Also in the row of a token that the text does not hold."""
    source = tiny_copy()
    edit_weights(source, lambda tensors: tensors[name].view(tensors[name].shape[0], -1)[2].fill_(1e5))
    fails(source, NonFiniteError, r"does not fit in F16.*--dtype float32", dtype="float16")


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


# A full disk


@pytest.mark.parametrize("after", [0, 3, 20, 30])
def test_the_disk_fills_up(tiny_checkpoint, fails, monkeypatch, after):
    calls, pwrite = [], os.pwrite

    def full(*arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", full)
    fails(tiny_checkpoint(), OutputError, r"out could not be written: the disk is full. Nothing was left behind")
    assert len(calls) > after


def test_the_disk_fills_up_before_the_reload_check(tiny_checkpoint, fails, monkeypatch):
    """safetensors has an error of its own for it."""

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("qectomy.eval.reload.save_file", full)
    fails(tiny_checkpoint(), OutputError, r"No space left on device")


def test_too_little_room_is_said_at_once(tiny_checkpoint, fails, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    fails(tiny_checkpoint(), OutputError, r"has 1,000 bytes free; [\d,]+ are needed")


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
    fails(tiny_checkpoint(shape), CheckpointError, r"gives other logits in a fresh process: off by \d", "key-shared")


def test_an_output_that_does_not_load_is_found(tiny_checkpoint, fails, monkeypatch):
    def spoil(family, folder):
        edit_json(folder / "config.json", lambda config: config.update(query_maps=["select"]))

    monkeypatch.setattr(convert_module, "copy_model_code", spoil)
    fails(tiny_checkpoint(), CheckpointError, r"does not load in a fresh process: .*query_maps")


# Interruptions


def test_ctrl_c_in_any_stage(tiny_checkpoint, raven, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    stages = ["layer_fit.make_start", "layer_fit.refine", "layer_pass.refit_layer", "layer_pass.final_scores"]
    stages += ["convert.check_reload", "convert.write_report", "states.WindowFile.__setitem__"]
    for stage in stages:
        place = tmp_path / stage
        place.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr(f"qectomy.calibrate.{stage}", interrupt)
            with pytest.raises(KeyboardInterrupt):
                convert_tiny(tiny_checkpoint(), place / "out", "select", raven)
        assert list(place.iterdir()) == [], stage


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_the_command(tiny_checkpoint, raven, tmp_path, number):
    source = tiny_checkpoint("llama", num_hidden_layers=40)
    place = tmp_path / "place"
    place.mkdir()
    command = ["convert", source, "--out", place / "deep/out", "--text", raven, "--context", 32]
    command += ["--tokens", 1024, "--eval-tokens", 160]
    process = subprocess.Popen(
        [sys.executable, "-m", "qectomy", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=allow_interrupts,
    )
    try:
        deadline = time.monotonic() + 60
        while not list(place.glob("deep/.out.partial-*/model.safetensors")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    assert list(place.iterdir()) == []
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].endswith("interrupted; nothing was left behind")
    assert stdout == ""
