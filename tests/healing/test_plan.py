"""How long a run is, by tokens or by the text, and that a resumed run keeps its plan."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qectomy.distributed.process_group import ProcessGroup
from qectomy.errors import QectomyError
from qectomy.healing import budget as budget_module
from qectomy.healing.budget import Budget, budget_of
from qectomy.healing.models import Distillation
from qectomy.healing.plan import Plan, batches, make_plan
from qectomy.healing.settings import HealSettings
from qectomy.runs.run_dir import HEALING, RunDir
from qectomy.text.packing import Packed

UNUSED = Distillation(None, 0.0)


def told(**settings):
    return HealSettings(**{"texts": ("a",), "context": 32, "batch_tokens": 1024, "micro_batch": 4, **settings})


def processes(count=1):
    found = ProcessGroup("cpu")
    found.world_size = count
    return found


@pytest.fixture
def folder(tmp_path):
    found = RunDir(tmp_path / "out", HEALING)
    found.start({}, resume=False)
    return found


@pytest.fixture
def packed(folder):
    """Return a function (windows) -> what was packed, of so many training windows."""

    def make(windows):
        (folder.path / "train.bin").write_bytes(b"\0" * 4 * 32 * windows)
        return Packed(folder.path / "train.bin", folder.path / "none", [])

    return make


# Batches


@given(st.integers(1, 100_000), st.sampled_from([16, 32, 512, 2048]), st.integers(1, 8), st.none() | st.integers(1, 64))
def test_batches_are_near_what_was_asked_for_and_fit_the_device(batch_tokens, context, count, micro_batch):
    settings = told(batch_tokens=batch_tokens, context=context, micro_batch=micro_batch)
    micro, accumulation = batches(settings, 10**9, processes(count))
    assert 1 <= micro <= (micro_batch or max(1, 4096 // context))
    wanted = max(1, round(batch_tokens / context / count))
    assert wanted <= micro * accumulation < wanted + accumulation
    assert micro * (accumulation - 1) < wanted, "a batch for nothing"


@pytest.mark.parametrize("windows, a_step", [(10**6, 512), (3200, 32), (50, 1)])
def test_a_run_has_a_hundred_steps(windows, a_step):
    """And no step more than 16,384 tokens, where nothing is said of it."""
    micro, accumulation = batches(told(batch_tokens=None), windows, processes())
    assert micro * accumulation == a_step


# Steps


def test_tokens_say_how_many_steps(folder, packed):
    plan = make_plan(folder, told(), 10_500, packed(999), processes())
    assert plan == Plan(10, 4, 8, 32, 1024)
    assert folder.record()["plan"]["steps"] == 10


def test_a_step_is_taken_by_all_processes(folder, packed):
    plan = make_plan(folder, told(), 10_500, packed(999), processes(2))
    assert plan == Plan(10, 4, 4, 32, 1024)


def test_fewer_tokens_than_a_step_are_one(folder, packed):
    assert make_plan(folder, told(), 10, packed(999), processes()).steps == 1


@pytest.mark.parametrize("windows, steps", [(1, 1), (32, 1), (33, 2), (320, 10)])
def test_without_tokens_and_minutes_the_text_is_read_once(folder, packed, windows, steps):
    assert budget_of(folder, told(), None, UNUSED, processes()).tokens is None
    assert make_plan(folder, told(), None, packed(windows), processes()) == Plan(steps, 4, 8, 32, 1024)


def test_a_resumed_run_keeps_its_plan(folder, packed, monkeypatch):
    budget = budget_of(folder, told(tokens=10_500), None, UNUSED, processes())
    assert budget == Budget(10_500, 10, 16_384)
    first = make_plan(folder, told(), 10_500, packed(999), processes())
    monkeypatch.setattr(budget_module, "_speed", lambda *_: pytest.fail("timed again"))
    assert budget_of(folder, told(minutes=5.0), None, UNUSED, processes()) == budget
    assert make_plan(folder, told(batch_tokens=64), 99, packed(3), processes()) == first


def test_a_resumed_run_needs_as_many_processes(folder, packed):
    make_plan(folder, told(), 10_500, packed(999), processes(2))
    with pytest.raises(QectomyError, match=r"out\.healing holds a run of 2 process\(es\); go on with as many, not 1$"):
        make_plan(folder, told(), 10_500, packed(999), processes())
