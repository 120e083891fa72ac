"""Progress in a file is a few whole lines; a terminal gets a bar."""

import os
import pty
import subprocess
import sys

import pytest

from qectomy import progress
from qectomy.progress import SECONDS_A_LINE, progress_bar


@pytest.fixture(params=[{}, {"FORCE_COLOR": "1"}, {"TTY_COMPATIBLE": "1"}], ids=str)
def clock(request, monkeypatch):
    """The time as `progress` reads it, to be set; with variables that make rich take a file for a terminal."""
    for name, value in request.param.items():
        monkeypatch.setenv(name, value)
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_the_ends_of_each_stage_and_a_line_in_thirty_seconds(clock, capsys):
    with progress_bar("healing") as report:
        for step in range(1, 101):
            report(step, 100, f"loss {step}")
            clock[0] += SECONDS_A_LINE / 9.5
        for layer in (1, 2, 3):
            report(layer, 3, "measuring")
    lines = capsys.readouterr().err.splitlines(keepends=True)
    steps = [1, *range(11, 100, 10), 100]
    expected = [f"healing {step}/100 loss {step}\n" for step in steps]
    assert lines == [*expected, "healing 1/3 measuring\n", "healing 3/3 measuring\n"]


def test_a_stage_of_as_many_steps_begins_anew(clock, capsys):
    with progress_bar("evaluating") as report:
        for name in ("one", "two [/x]"):
            for window in (1, 2, 3):
                report(window, 3, name)
        for what in ("loading", "packing"):
            report(0, 1, what)
    told = "1/3 one, 3/3 one, 1/3 two [/x], 3/3 two [/x], 0/1 loading, 0/1 packing"
    assert capsys.readouterr().err.splitlines() == [f"evaluating {line}" for line in told.split(", ")]


def test_a_terminal_gets_a_bar():
    script = (
        "from qectomy.progress import progress_bar\nwith progress_bar('converting') as report: report(1, 2, 'a note')"
    )
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stderr=theirs, env={**os.environ, "TERM": "xterm"}) as child:
        os.close(theirs)
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert child.wait() == 0
    os.close(ours)
    assert b"ETA" in shown
    assert b"\x1b[" in shown


def test_bars_of_other_libraries_stay_out_of_a_file():
    script = """
import sys
from qectomy import cli
cli.app = lambda: None
cli.main()
import tqdm
from datasets.utils import tqdm as theirs
list(tqdm.tqdm(range(3)))
list(theirs(range(3)))
print("done", file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "done\n"
