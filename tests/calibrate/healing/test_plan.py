"""How long a run is, by tokens, by minutes or by the text, and that a resumed run keeps its plan."""

from types import SimpleNamespace

import pytest
import torch
from healings import Pair
from hypothesis import given
from hypothesis import strategies as st

from qectomy.calibrate.healing import plan as plan_module
from qectomy.calibrate.healing.models import Distillation, load_student, load_teacher
from qectomy.calibrate.healing.packing import Packed
from qectomy.calibrate.healing.plan import Plan, batches, make_plan, tokens_to_train
from qectomy.calibrate.healing.run_folder import RunFolder
from qectomy.calibrate.healing.settings import HealSettings
from qectomy.calibrate.processes import Processes
from qectomy.errors import QectomyError
from qectomy.surgery.checkpoint import open_checkpoint

UNUSED = Distillation(None, 0.0)


def told(**settings):
    return HealSettings(**{"texts": ("a",), "context": 32, "batch_tokens": 1024, "micro_batch": 4, **settings})


def processes(count=1):
    found = Processes("cpu")
    found.count = count
    return found


@pytest.fixture
def folder(tmp_path):
    found = RunFolder(tmp_path / "out")
    found.start({}, resume=False)
    return found


@pytest.fixture
def timed(monkeypatch):
    """Let a batch take a second."""
    monkeypatch.setattr(plan_module, "_seconds_of_a_batch", lambda *_: 1.0)


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
    assert tokens_to_train(folder, told(), None, UNUSED, processes()) is None
    assert make_plan(folder, told(), None, packed(windows), processes()) == Plan(steps, 4, 8, 32, 1024)


def test_minutes_are_spent_on_steps_and_validations(folder, timed):
    """A batch of 4 windows takes a second: 60 seconds less a tenth, less 3 validations of half a second a batch."""
    settings = told(minutes=1.0, evaluations=2, validation_tokens=40 * 32)
    assert tokens_to_train(folder, settings, None, UNUSED, processes()) == (0.9 * 60 - 3 * 10 / 2) * 4 * 32


def test_the_shorter_of_minutes_and_tokens_counts(folder, timed, tmp_path):
    settings = dict(minutes=10.0, validation_tokens=32, evaluations=1)
    assert tokens_to_train(folder, told(**settings, tokens=5 * 1024), None, UNUSED, processes()) == 5 * 1024
    other = RunFolder(tmp_path / "other")
    other.start({}, resume=False)
    found = tokens_to_train(other, told(**settings, tokens=500 * 1024), None, UNUSED, processes())
    assert 500 * 128 < found < 600 * 128


def test_minutes_that_are_too_few_give_one_window(folder, timed):
    assert tokens_to_train(folder, told(minutes=1e-6), None, UNUSED, processes()) == 32


def test_a_resumed_run_keeps_its_plan(folder, packed, monkeypatch):
    assert tokens_to_train(folder, told(tokens=10_500), None, UNUSED, processes()) == 10_500
    first = make_plan(folder, told(), 10_500, packed(999), processes())
    monkeypatch.setattr(plan_module, "_seconds_of_a_batch", lambda *_: pytest.fail("timed again"))
    assert tokens_to_train(folder, told(minutes=5.0), None, UNUSED, processes()) == 10_500
    assert make_plan(folder, told(batch_tokens=64), 99, packed(3), processes()) == first


def test_a_resumed_run_needs_as_many_processes(folder, packed):
    make_plan(folder, told(), 10_500, packed(999), processes(2))
    with pytest.raises(QectomyError, match=r"out\.healing holds a run of 2 process\(es\); go on with as many, not 1$"):
        make_plan(folder, told(), 10_500, packed(999), processes())


# Timing


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_a_batch_is_timed_without_changing_a_weight(pair, monkeypatch, hidden_weight):
    found: Pair = pair("gpt2", "select")
    student, teacher = open_checkpoint(found.reduced, reduced=True), open_checkpoint(found.original)
    model, theirs = load_student(student), load_teacher(teacher, "float32", "cpu")
    criterion = Distillation(theirs, 0.0, hidden_weight)
    criterion.attach_(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clock, forwards, teach = iter((100.0, 103.0)), [], criterion.teach

    def watch(tokens):
        forwards.append(tuple(tokens.shape))
        return teach(tokens)

    monkeypatch.setattr(criterion, "teach", watch)
    monkeypatch.setattr(plan_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    settings = told(hidden_weight=hidden_weight, dtype="float32")
    assert (
        plan_module._seconds_of_a_batch(settings, model, criterion, processes(), 3) == 1.5
    )  # of two, and one before them
    assert forwards == [(3, 32)] * 3
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
