"""Two processes on the CPU heal as one does."""

import json
import subprocess
import sys

import pytest
from healings import STEP, heal_tiny, options, trained_alike
from safetensors.torch import load_file

SETTINGS = {"tokens": 4 * STEP, "evaluations": 2}  # five validation windows: one process has one more


@pytest.fixture(scope="module")
def both(pair, raven, tmp_path_factory):
    """The folder with the outputs of one and of two processes, and what the two printed."""
    found, place = pair(), tmp_path_factory.mktemp("processes")
    heal_tiny(found, place / "one", raven, **SETTINGS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qectomy"]
    command += ["heal", found.reduced, "--teacher", found.original, "--out", place / "two", *options(raven, **SETTINGS)]
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, done.stdout


def healing(place, name):
    return json.loads((place / name / "qectomy.json").read_text())["healing"]


def test_two_processes_heal_as_one(both):
    place, printed = both
    one, two = healing(place, "one"), healing(place, "two")
    assert json.loads(printed)["healing"] == two  # once
    assert (two["processes"], two["micro_batch"], two["accumulation"]) == (2, 2, 1)
    for name in ("tokens", "steps", "tokens_a_step", "texts", "best_step"):
        assert two[name] == one[name], name
    for ours, theirs in zip(two["validation"]["curve"], one["validation"]["curve"], strict=True):
        for name in set(theirs) - {"validation_loss"}:
            assert ours[name] == (None if theirs[name] is None else pytest.approx(theirs[name], rel=1e-5)), name
    for kind in ("original", "fitted", "healed"):
        assert two["perplexity"][kind] == pytest.approx(one["perplexity"][kind], rel=1e-5)
    ours, theirs = (load_file(place / name / "model.safetensors") for name in ("two", "one"))
    assert trained_alike(ours, theirs, steps=4)
    assert sorted(path.name for path in place.iterdir()) == ["one", "two"]


def test_the_validation_loss_is_that_of_one_process(both):
    curves = [healing(both[0], name)["validation"]["curve"] for name in ("two", "one")]
    for ours, theirs in zip(*curves, strict=True):
        assert ours["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-5)
