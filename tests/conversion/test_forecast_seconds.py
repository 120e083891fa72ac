"""A few layers are really converted, on few windows and steps; the seconds of the rest are counted by hand."""

import tempfile
from dataclasses import replace
from itertools import count

import pytest
import torch
from conversions import QUICK

from qectomy.calibrate import few_steps as few_steps_module
from qectomy.calibrate.few_steps import FewSteps, few_steps
from qectomy.calibrate.preconditioning import Preconditioned, adam
from qectomy.checkpoint.checkpoint import expected_layer, open_checkpoint
from qectomy.conversion.forecast import forecast as forecast_module
from qectomy.conversion.forecast import seconds
from qectomy.conversion.forecast.forecast import forecast
from qectomy.conversion.forecast.seconds import STEPS, Trial, first_layers, scaled, try_out
from qectomy.conversion.forecast.work import plan_work
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import QectomyError
from qectomy.models.query_maps import QueryMapSpec, parse_recipe

SHARED, DENSE = QueryMapSpec("key-shared"), QueryMapSpec("dense")


def planned(source, query="key-shared", **told):
    return plan_work(source, tuple(parse_recipe(query, source.dims)), **{**QUICK, **told})


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """Return the folder in which temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "shape, query",
    [
        ("llama", "key-shared"),
        ("biases", "select"),
        ("mistral", "identity"),
        ("llama", "low-rank:3"),
        ("gpt2", "identity"),
        ("gpt2", "0=dense,1=key-shared"),
        ("llama", "dense"),
    ],
)
def test_a_trial_runs_every_stage_of_each_map(shape, query, tiny_checkpoint, scratch, monkeypatch):
    taken, of = [], FewSteps.of
    monkeypatch.setattr(FewSteps, "of", lambda few, steps: (taken.append(step) or step for step in of(few, steps)))
    source = open_checkpoint(tiny_checkpoint(shape))
    work = planned(source, query)
    state = torch.get_rng_state()
    trial = try_out(source, work, ConvertSettings(context=32), 2, 1)
    assert (trial.fitted, trial.held) == (2, 1)
    assert trial.layers.keys() == set(work.recipe)
    for spec, layer in trial.layers.items():
        fits = spec.name != "dense"
        assert all(layer[stage] > 0 for stage in ("reading", "forward", "measuring", "writing", "teacher"))
        assert (layer.get("fitting", 0) > 0) is (layer["steps taken"] > 0) is fits
        assert layer["all steps"] > 5 * layer["steps taken"] or not fits  # 100 steps, of which STEPS
    assert (trial.whole.get("refitting", 0) > 0) is (query != "dense")
    assert trial.whole["embedding"] > 0 < trial.whole["scores"]
    assert set(taken) == (set() if query == "dense" else set(range(STEPS)))
    assert list(scratch.iterdir()) == []
    assert torch.equal(state, torch.get_rng_state())


def test_an_adam_is_timed_by_a_few_of_its_steps(monkeypatch):
    """A step of 1 s, after a first one of 5 s."""
    ticks = count()
    monkeypatch.setattr(few_steps_module.time, "perf_counter", lambda: (n := next(ticks)) + 4 * (n > 0))
    seen = []

    def loss(values):
        seen.append(values)
        yield values[0].sum()

    def run(steps):
        seen.clear()
        adam([Preconditioned(torch.zeros(2), lambda u: u, 1.0)], loss, steps=steps, warmup=1, betas=(0.9, 0.9))
        return len(seen)

    with few_steps(4) as few:
        assert run(100) == 4
        assert (few.taken, few.whole) == (8, 8 + 96)
        assert run(3) == 3
        assert (few.taken, few.whole) == (8 + 3, 104 + 3)
    assert run(100) == 100


@pytest.mark.parametrize("shape", ["llama", "gpt2", "biases"])
def test_the_first_layers_are_a_model_of_their_own(shape, tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint(shape))
    cut = first_layers(source, 1)
    assert cut.family.dimensions(cut.config) == cut.dims == replace(source.dims, n_layers=1)
    inside = {cut.prefix(0) + name for name in expected_layer(cut.family, cut.dims, DENSE)}
    assert cut.tensors.keys() == inside | cut.family.outer_shapes(cut.dims).keys()
    assert first_layers(source, 2).tensors == source.tensors


def took(inside=(0, 0, 0), **stages):
    """Return the seconds of a layer: its stages, and what the teacher, the steps taken and all steps took of them."""
    none = dict.fromkeys(("reading", "forward", "fitting", "measuring", "refitting", "writing"), 0)
    found = none | stages | dict(zip(("teacher", "steps taken", "all steps"), inside, strict=True))
    return {stage: float(seconds) for stage, seconds in found.items()}


OUTSIDE = {"embedding": 1.0, "keeping": 2.0, "scores": 3.0}


def test_stages_grow_with_what_they_work_on(tiny_checkpoint):
    """Two trials, of 2 and 4 of 10 fitted windows and 2 of 5 held ones, for both layers of a model."""
    work = planned(open_checkpoint(tiny_checkpoint()))
    small = took(reading=1, forward=3, fitting=5, refitting=4, measuring=1, writing=1, inside=(0.5, 1, 9))
    large = took(reading=2, forward=5, fitting=8, refitting=8, measuring=3, writing=2, inside=(0.5, 2, 20))
    stages = scaled(
        work,
        Trial(2, 2, {SHARED: small}, OUTSIDE),
        Trial(4, 2, {SHARED: large}, {"embedding": 2.0, "keeping": 4.0, "scores": 3.0}),
    )
    assert stages == {
        "embedding": 2 + (15 - 6) * 0.5,
        "keeping": (4 + (15 - 6) * 1) * 3 / 2,  # after the embedding and after each layer
        "reading": 2 * 2,
        "forward": 2 * (4 + 6 * 1 + 2 * 0.5 * 5 / 2),  # a window fitted on: 1 s; measured on: 0.25 s, in both models
        "fitting": 2 * (6 + 6 * 1 + 20),
        "measuring": 2 * 3 * (8 + 5) / (4 + 2),
        "refitting": 2 * (8 + 6 * 2),
        "writing": 2 * 2,
        "scores": 3.0,  # one batch of 32 windows
    }


def test_layers_count_by_their_map_and_what_came_before(tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint())
    layers = {SHARED: took(fitting=5, refitting=7), DENSE: took(refitting=1)}
    for query, refit, refitting in (
        ("0=dense,1=key-shared", True, 7),
        ("0=key-shared,1=dense", True, 7 + 1),
        ("0=key-shared,1=dense", False, 0),
    ):
        trial = Trial(10, 5, layers, OUTSIDE)
        stages = scaled(planned(source, query, refit=refit), trial, trial)
        assert (stages["fitting"], stages["refitting"]) == (5, refitting)


def test_a_trial_of_everything_is_what_it_took(tiny_checkpoint):
    """Also where a clock has run unevenly: fewer windows are not taken to need more."""
    work = planned(open_checkpoint(tiny_checkpoint()))
    layer = took(reading=1, forward=5, fitting=8, measuring=3, refitting=2, writing=2, inside=(1, 2, 2))
    slow = {stage: 2 * seconds for stage, seconds in layer.items()}
    stages = scaled(work, Trial(3, 5, {SHARED: slow}, OUTSIDE), Trial(10, 5, {SHARED: layer}, OUTSIDE))
    assert stages == {stage: 2 * layer[stage] for stage in layer if stage in stages} | OUTSIDE | {"keeping": 2 * 3 / 2}


def test_a_forecast_adds_its_stages(tiny_checkpoint, capsys, scratch):
    source = open_checkpoint(tiny_checkpoint("gpt2"))
    found = forecast(source, tuple(parse_recipe("select", source.dims)), **QUICK, dtype="BF16")
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()), abs=0.2)
    assert found["probe_seconds"] > 0
    assert "fitting a little of the first layer" in capsys.readouterr().err
    assert list(scratch.iterdir()) == []


def test_a_layer_too_large_to_try_out_has_no_time(tiny_checkpoint, capsys, monkeypatch):
    source = open_checkpoint(tiny_checkpoint())
    monkeypatch.setattr(forecast_module, "MOST_WEIGHTS", 100)
    found = forecast(source, **QUICK)
    assert found["seconds"] is found["stages"] is found["probe_seconds"] is None
    assert "takes minutes to try out on a processor" in capsys.readouterr().err


def test_what_a_trial_runs_into_is_told(tiny_checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    found = forecast(open_checkpoint(tiny_checkpoint()), **QUICK)
    assert found["seconds"] is None
    assert found["peak_memory_bytes"] > 0
    assert "no time is told: trying out the first layer failed ([Errno 2]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("of 1 GiB"), MemoryError("of 1 GiB"), QectomyError("of 1 GiB")]
)
def test_a_trial_that_finds_no_memory_leaves_the_rest(error, tiny_checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(seconds, "try_out", lambda *arguments: (_ for _ in ()).throw(error))
    found = forecast(open_checkpoint(tiny_checkpoint()), **QUICK)
    assert found["seconds"] is None
    assert found["disk_bytes"] > 0
    said = capsys.readouterr().err
    assert "the first layer failed (of 1 GiB). The conversion may meet that, too; the trial's files lie where" in said
