"""No reader of outside files ends in anything but its result or one QectomyError, whatever the files hold.

`benchmarks/fuzz_readers.py` runs the same cases in their ten thousands.
"""

import random
from pathlib import Path

import pytest
from cases import Reader, outcome
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from readers import make_readers

NAMES = (
    "safetensors header",
    "index",
    "config.json",
    "stored recipe",
    "query option",
    "files copied along",
    "journal and run.json",
    "tokenizer",
    "qectomy.json and reports",
    "texts",
    "nanoGPT checkpoint",
)
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
PHASES = [phase for phase in Phase if phase != Phase.explain]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("watched") / "case"


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory, place: Path) -> dict[str, Reader]:
    return {reader.name: reader for reader in make_readers(tmp_path_factory.mktemp("sound"), place)}


def test_every_reader_is_here(readers):
    assert set(readers) == set(NAMES)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, suppress_health_check=CHECKS, phases=PHASES)
@given(dice=st.randoms(use_true_random=False))
def test_hostile_files_are_read_or_refused(readers, place, name, dice):
    outcome(readers[name], readers[name].make(dice), place)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_cases_reach_both_ends(readers, place, name):
    """A reader that refuses everything, or nothing, would make the property above empty."""
    told = {outcome(readers[name], readers[name].make(random.Random(seed)), place) for seed in range(80)}
    assert "accepted" in told
    assert len(told) > 1


def test_the_watch_sees_what_is_written_outside(readers, place):
    def read(folder: Path) -> None:
        (folder.parent / "mark").write_text("run")

    with pytest.raises(AssertionError, match="outside the folder"):
        outcome(Reader("writes", readers["index"].make, read), {"a": b""}, place)
    (place.parent / "mark").unlink()
