"""Several processes on the command line: one of them speaks for all, and all end."""

import json
import os
import signal
import sys

from conversions import reload_here
from launches import launched

from qectomy import progress
from qectomy.cli import main
from qectomy.conversion.layerwise import LayerPass


def commanded(monkeypatch, *arguments, before=lambda: None):
    """Run the command line in two processes, in each of them `before` first; return how each ended."""
    monkeypatch.setattr(sys, "argv", ["qectomy", *map(str, arguments)])

    def act(nobody):
        before()
        main()

    return [getattr(end, "code", end) for end in launched(2, act, joined=False)]


def test_an_interruption_of_one_process_alone_ends_all(tiny_checkpoint, raven, tmp_path, monkeypatch, capfd):
    """The others wait for it in the middle of the run; it must not wait for them."""

    def before():
        layer = LayerPass._run_student

        def run(self, index, *rest):
            if index == 1 and not self.share.processes.is_main:
                os.kill(os.getpid(), signal.SIGINT)
            return layer(self, index, *rest)

        LayerPass._run_student = run

    out = tmp_path / "out"
    command = [
        "convert",
        tiny_checkpoint("llama", num_hidden_layers=3),
        "--out",
        out,
        "--text",
        raven,
        "--context",
        "32",
        "--eval-tokens",
        "160",
    ]
    assert commanded(monkeypatch, *command, "--tokens", "320", before=before) == [75, 1]
    told = capfd.readouterr().err
    assert "to go on: " not in told  # it is not known how the launcher was called
    assert told.count("error: ") == 1
    assert f"{out}.converting holds what was done: go on with --resume" in told


def test_one_process_speaks_for_all(tiny_checkpoint, raven, tmp_path, monkeypatch, capfd):
    source, given = (
        tiny_checkpoint("llama"),
        ("--text", raven, "--context", "32", "--eval-tokens", "160", "--tokens", "320"),
    )
    out = tmp_path / "out"
    for command, code, message in [
        (["convert", source, "--out", tmp_path, *given], 1, f"error: {tmp_path} exists; nothing is overwritten. "),
        (["convert", source, "--out", out, *given, "--tokens", "32"], 1, "error: 2 processes, but only 1 window(s)"),
        (["convert", source, "--out", out, *given, "--heal", "1k"], 1, "error: --heal in convert is for one process"),
        (["convert", tmp_path / "none", "--out", out, *given], 1, "error: "),
    ]:
        assert commanded(monkeypatch, *command) == [code, code]
        told = capfd.readouterr()
        assert (told.out, told.err.count("error")) == ("", 1), told.err
        assert message in told.err
        assert list(tmp_path.iterdir()) == []
    assert commanded(monkeypatch, "convert", source, "--out", out, *given, "--resume", "--clean") == [2, 2]
    told = capfd.readouterr().err
    assert "--resume goes on with what --clean removes" in " ".join(told.replace("│", " ").split())
    assert (told.count("Usage"), told.count("Traceback"), told.count("Invalid value")) == (1, 0, 1), told
    assert commanded(monkeypatch, "convert", source, "--out", out, *given, "--dry-run", "--json") == [0, 0]
    assert json.loads(capfd.readouterr().out)["plan"] == ["key-shared"] * 2


def test_the_first_process_writes_the_text_for_all(tiny_checkpoint, tmp_path, monkeypatch, capfd):
    reload_here(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bars, drawn = tmp_path / "bars", progress.progress_bar

    def bar(what):
        with bars.open("a") as file:
            file.write(f"{what} {os.environ['RANK']}\n")
        return drawn(what)

    monkeypatch.setattr(progress, "progress_bar", bar)
    command = ["convert", tiny_checkpoint(), "--out", tmp_path / "out", "--self-generated", "--query", "select"]
    command += ["--context", "32", "--eval-tokens", "64", "--tokens", "128", "--json"]
    assert commanded(monkeypatch, *command) == [0, 0]
    found = json.loads(capfd.readouterr().out)
    assert (found["processes"], found["calibration"]["texts"][0]["tokens"]) == (2, 128)
    assert bars.read_text() == "writing 0\nconverting 0\n"  # two would draw over each other


def test_what_fits_nothing_is_done_by_the_first_process(tiny_checkpoint, raven, tmp_path, monkeypatch, capfd):
    source, out = tiny_checkpoint("gpt2"), tmp_path / "out"
    reload_here(monkeypatch)
    command = ["convert", source, "--out", out, "--query", "exact", "--json", "--context", "32", "--eval-tokens", "64"]
    assert commanded(monkeypatch, *command) == [0, 0]
    assert json.loads(capfd.readouterr().out) == json.loads((out / "qectomy.json").read_text())
    assert commanded(monkeypatch, "materialize", out, "--out", tmp_path / "stock") == [0, 0]
    assert capfd.readouterr().out.count("wrote ") == 1
