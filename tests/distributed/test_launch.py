"""What a launcher tells a process, and what is said of one that it told too little."""

import subprocess
import sys

import pytest

from qectomy.distributed.launch import Launch, launch
from qectomy.distributed.process_group import join
from qectomy.errors import QectomyError

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def told(monkeypatch):
    """Set the environment of a launched process."""

    def tell(**names):
        for name in TORCHRUN:
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    return tell


def test_one_of_several_or_alone(told):
    told(**TORCHRUN)
    assert launch() == Launch(count=4, rank=2)
    for alone in ({}, {"RANK": "1"}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "1", "RANK": "0"}):
        told(**alone)
        assert launch() == Launch(count=1, rank=0)


@pytest.mark.parametrize(
    "names, message",
    [
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "but what they need to find each other is not set (MASTER_ADDR, MASTER_PORT): start",
        ),
        (TORCHRUN | {"MASTER_ADDR": ""}, "is not set (MASTER_ADDR): start"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is '' in the environment, and has to be a number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is '-1' in the environment, and has to be a number from 0 on"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 is none of WORLD_SIZE=4 processes"),
    ],
)
def test_an_environment_of_which_no_run_can_come(names, message, told):
    told(**names)
    with pytest.raises(QectomyError) as caught:
        join("cpu")
    assert message in str(caught.value)
    assert "torchrun" in str(caught.value)


def test_a_process_that_has_nothing_to_do_says_so(told, tmp_path):
    told(**TORCHRUN)
    command = [sys.executable, "-m", "qectomy", "fold-norms", str(tmp_path), "--out", str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")
    assert found.stderr == "note: process 2 of 4 has nothing to do: process 0 does this alone\n"
