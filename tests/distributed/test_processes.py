"""The processes of a run: alone here, and what is said of one that should not be."""

import os

import pytest
from accelerate.state import AcceleratorState

from qectomy.distributed.processes import Processes
from qectomy.errors import QectomyError


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Let accelerate find the processes anew, before and after."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found = Processes("cpu")
    assert (found.count, found.is_first, found.device) == (1, True, "cpu")
    assert found.first_alone(lambda: {"a": 1}) == {"a": 1}
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_processes_that_did_not_find_each_other(monkeypatch):
    """As under a launcher that sets the size alone: each would heal, and write, by itself."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(QectomyError, match=r"4 processes were started, but 1 found each other; use torchrun$"):
        Processes("cuda:0")


def test_what_the_first_raises_reaches_the_caller(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def fail():
        raise QectomyError("no")

    with pytest.raises(QectomyError, match=r"^no$"):
        Processes("cpu").first_alone(fail)
