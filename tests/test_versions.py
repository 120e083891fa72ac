"""With a transformers on which no reduced model loads, a command says so in one sentence, before it does anything."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qectomy.errors import QectomyError
from qectomy.versions import TRANSFORMERS, check_transformers

ROOT = Path(__file__).parents[1]
WITH_OLD = """
import importlib.metadata, sys
found = importlib.metadata.version
importlib.metadata.version = lambda name: "5.3.0" if name == "transformers" else found(name)
sys.argv[0] = "qectomy"
from qectomy.cli import main
main()
"""


def run(*arguments, folder):
    return subprocess.run(
        [sys.executable, "-c", WITH_OLD, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
    )


def test_a_command_ends_in_one_sentence_and_makes_nothing(tiny_checkpoint, tmp_path):
    done = run("convert", tiny_checkpoint(), "--out", "out", "--query", "exact", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: qectomy needs transformers 5.4 or newer, and 5.3.0 is installed here: on it no reduced model loads. "
        "To mend it: pip install 'transformers>=5.4'\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [("--help",), ("convert", "--help"), ("--version",)])
def test_what_only_tells_of_the_commands_works(arguments, tmp_path):
    done = run(*arguments, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "installed, fits",
    [("4.57.6", False), ("5.0.0rc1", False), ("5.3.9", False), ("5.4.0", True), ("5.24.0.dev0", True), ("6.0", True)],
)
def test_versions_are_compared_by_their_numbers(installed, fits, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", {"transformers": installed}.__getitem__)
    if fits:
        check_transformers()
    else:
        with pytest.raises(QectomyError, match=f"and {re.escape(installed)} is installed here"):
            check_transformers()


@pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="the tests run without the repository")
def test_it_is_what_pip_is_told():
    (told,) = re.findall(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert told == ".".join(map(str, TRANSFORMERS))
