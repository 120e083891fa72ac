"""What minutes are spent on: validations and timing take a bounded share, and too few minutes are called so."""

from types import SimpleNamespace

import pytest
import torch
from healings import Pair
from hypothesis import given
from hypothesis import strategies as st

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.distributed.process_group import ProcessGroup
from qectomy.healing import budget as module
from qectomy.healing.budget import Budget, budget_of, spending
from qectomy.healing.models import Distillation, load_student, load_teacher
from qectomy.healing.plan import STEPS
from qectomy.healing.settings import HealSettings
from qectomy.runs.run_dir import HEALING, RunDir

CONTEXT = 512
SECONDS = 0.9 * 60  # that are planned for, a minute


def told(**settings):
    return HealSettings(**{"texts": ("a",), "context": CONTEXT, "dtype": "float32", **settings})


def processes(count=1):
    found = ProcessGroup("cpu")
    found.world_size = count
    return found


@pytest.fixture
def budget(tmp_path, monkeypatch):
    """Return a function (tokens a second, seconds an update, settings) -> Budget, by a clock that stands still."""
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: 0.0))

    def make(rate, update=0.0, *, count=1, **settings):
        monkeypatch.setattr(module, "_speed", lambda *_: (float(rate), update))
        folder = RunDir(tmp_path / f"out{len(list(tmp_path.iterdir()))}", HEALING)
        folder.start({}, resume=False)
        found = budget_of(folder, told(**settings), None, Distillation(None, 0.0), processes(count))
        folder.release()
        return found

    return make


def test_three_slow_minutes_are_spent_on_training(budget):
    """At 132 tokens a second validations as they are asked for would take four times the minutes."""
    found = budget(132, minutes=3.0)
    assert 11 * 16_384 / 132 / 2 > 3 * 180
    assert (found.evaluations, found.validation_tokens) == (2, 2138)
    assert 15_000 < found.tokens < 132 * 3 * SECONDS


@pytest.mark.parametrize("rate, wanted", [(1e5, (10, 16_384)), (2_000, (10, 8836)), (132, (2, 2138)), (20, (1, 512))])
def test_validations_become_shorter_before_they_become_fewer(budget, rate, wanted):
    found = budget(rate, minutes=3.0 if rate < 1e4 else 60.0)
    assert (found.evaluations, found.validation_tokens) == wanted


@given(
    rate=st.floats(10, 1e6),
    minutes=st.floats(0.5, 600),
    update=st.floats(0, 1),
    evaluations=st.integers(1, 50),
    validation_tokens=st.integers(512, 100_000),
)
def test_validation_and_steps_fit_into_the_minutes(rate, minutes, update, evaluations, validation_tokens):
    settings = told(minutes=minutes, evaluations=evaluations, validation_tokens=validation_tokens)
    found = module._in_time(settings, processes(), rate, update, timing=0.0)
    assert found.evaluations <= evaluations
    assert found.validation_tokens <= max(CONTEXT, validation_tokens)
    validating = (found.evaluations + 1) * found.validation_tokens / rate / 2
    unavoidable = 2 * CONTEXT / rate / 2  # a window at the start, one at the end
    assert validating <= max(0.15 * minutes * SECONDS * (1 + 1e-9), unavoidable)
    steps = max(1, module._steps(settings, found.tokens, processes()))
    training = found.tokens / rate + steps * update
    left, a_step = minutes * SECONDS - validating, training / steps
    assert training <= left + update + 1e-6 or found.tokens == CONTEXT
    if found.tokens > CONTEXT:
        assert training > 0.45 * left - a_step  # steps become longer with the tokens: some time may be left over


def test_what_the_optimizer_takes_is_no_time_to_train(budget):
    assert budget(512, minutes=1.0).tokens / CONTEXT == pytest.approx(0.85 * SECONDS, abs=1)
    assert budget(512, 1.0, minutes=1.0).tokens / CONTEXT == pytest.approx(0.85 * SECONDS / 2, abs=1)


def test_timing_counts_as_time_of_the_run(tmp_path, monkeypatch):
    now = iter((100.0, 104.0))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(module, "_speed", lambda *_: (512.0, 0.0))
    folder = RunDir(tmp_path / "out", HEALING)
    folder.start({}, resume=False)
    found = budget_of(folder, told(minutes=1.0), None, Distillation(None, 0.0), processes())
    assert found.timing_seconds == folder.record()["seconds"] == 4.0
    assert found.tokens / CONTEXT == pytest.approx(0.85 * (SECONDS - 4), abs=1)


def test_the_shorter_of_minutes_and_tokens_counts(budget):
    assert budget(132, minutes=3.0, tokens=2048).tokens == 2048
    assert budget(132, minutes=3.0, tokens=10**6).tokens < 132 * 180


@pytest.mark.parametrize("rate, update, count", [(132, 0.0, 1), (50, 2.0, 1), (20, 0.0, 1), (264, 0.0, 2)])
def test_too_few_minutes_are_called_so_with_how_many_would_do(budget, rate, update, count):
    found = budget(rate, update, count=count, minutes=3.0)
    assert module._steps(told(), found.tokens, processes(count)) < STEPS
    assert found.enough_minutes > 3
    enough = budget(rate, update, count=count, minutes=float(found.enough_minutes))
    assert enough.enough_minutes is None, "the minutes named do not do either"
    fewer = budget(rate, update, count=count, minutes=0.8 * found.enough_minutes)
    assert fewer.enough_minutes is not None, "fewer would have done"


def test_enough_minutes_and_few_tokens_are_not_too_few_minutes(budget):
    assert budget(1e4, minutes=3.0).enough_minutes is None
    assert budget(132, minutes=3.0, tokens=2048).enough_minutes is None


def test_what_the_minutes_are_spent_on_is_said():
    found = Budget(20_480, 2, 2138, tokens_a_second=132.0, timing_seconds=8.2, enough_minutes=9)
    assert spending(told(minutes=3.0), found, 40, 512, 16_000) == [
        "--minutes 3 at 132 tokens/s: 8 s of timing, 40 steps of 512 tokens, 3 validations on 2,048 tokens (23 s); "
        "plus about 95 s for scoring before and after, on 16,000 tokens (--eval-tokens), besides loading and "
        "checking what is written",
        "--minutes 3 gives 40 steps on this machine, and a run is better planned with 100: --minutes 9 "
        "would give about that many",
    ]
    enough = Budget(20_480, 2, 2138, tokens_a_second=132.0, timing_seconds=8.2)
    assert len(spending(told(minutes=30.0), enough, 400, 512, 16_000)) == 1


# Timing


@pytest.fixture
def models(pair):
    """A tiny student with its criterion, and all shapes (B, T) that it was run on."""
    found: Pair = pair("gpt2", "select")
    model = load_student(open_checkpoint(found.reduced, reduced=True))
    criterion = Distillation(load_teacher(open_checkpoint(found.original), "float32", "cpu"), 0.0)
    criterion.attach_(model)
    return model, criterion


def run_speed(models, monkeypatch, seconds_a_token, **settings):
    """Return (speed, shapes run), by a clock that only tokens move."""
    (model, criterion), now, shapes = models, [0.0], []
    teach = criterion.teach

    def watch(tokens):
        shapes.append(tuple(tokens.shape))
        now[0] += seconds_a_token * tokens.numel()
        return teach(tokens)

    monkeypatch.setattr(criterion, "teach", watch)
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    settings = told(**{"context": 32, "micro_batch": 4, **settings})
    return module._speed(settings, model, criterion, processes()), shapes


def test_batches_grow_to_a_runs_own(models, monkeypatch):
    (rate, _), shapes = run_speed(models, monkeypatch, 1e-3, minutes=60.0, micro_batch=6)
    assert shapes == [(1, 32), (1, 32), (2, 32), (4, 32), (6, 32), (6, 32)]
    assert rate == pytest.approx(1000)


@pytest.mark.parametrize("minutes, windows", [(1.0, [1]), (3.0, [1, 1]), (10.0, [1, 1, 2, 4])])
def test_timing_takes_a_twentieth_of_the_minutes_or_one_window(models, monkeypatch, minutes, windows):
    """Of 3.2 seconds each, where a run's batch, thrice, would take 38."""
    (rate, _), shapes = run_speed(models, monkeypatch, 0.1, minutes=minutes)
    assert [rows for rows, _ in shapes] == windows
    assert sum(windows) == 1 or sum(windows) * 3.2 <= 0.05 * 60 * minutes
    assert rate == pytest.approx(10)


def test_what_is_compiled_is_timed_at_its_own_shape(models, monkeypatch):
    assert run_speed(models, monkeypatch, 0.1, minutes=1.0, compile=True)[1] == [(4, 32)] * 2


def test_timing_changes_no_weight(models, monkeypatch):
    model = models[0]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    (_, update), shapes = run_speed(models, monkeypatch, 1e-3, minutes=1.0)
    assert shapes
    assert update == 0.0  # by a clock that tokens alone move
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
