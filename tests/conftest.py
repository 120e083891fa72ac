"""Shared fixtures: tiny checkpoints, made once a session. No test writes into a folder it is given."""

import os

# A tiny model gains nothing from threads, and no test reaches the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Without a launcher the first process has the store of all, and torch warns at length when it is gone.
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversions import convert_tiny
from healings import Pair
from hypothesis import settings
from tiny_models import RAVEN, save_reduced, save_tiny

from qectomy import errors

torch.set_num_threads(1)
settings.register_profile("qectomy", deadline=None, max_examples=50)
settings.load_profile("qectomy")


# Folders and files here whose tests fit, train, start processes or draw: `make check` leaves them out.
SLOW = (
    *("conversion", "eval", "fuzz", "modeling", "serving", "test_api.py", "test_cli.py", "test_samples.py"),
    "commands/test_cli_texts.py",
    *(f"calibrate/test_{name}.py" for name in ("layer_fit", "maps", "maps_without_rope", "refine")),
    *(f"checkpoint/test_{name}.py" for name in ("damaged_json", "hub_headers", "nanogpt_relatives")),
    *("healing/test_heal.py", "healing/test_long_windows.py"),
    *(f"healing/test_{name}.py" for name in ("budget", "cli_heal", "crash_safety", "curve", "models")),
    *(f"healing/test_{name}.py" for name in ("self_generated", "two_processes")),
    *(f"report/test_{name}.py" for name in ("mixed_recipes", "model_card", "model_card_snippet", "page")),
    *(f"report/test_{name}.py" for name in ("page_browser", "page_writing", "report", "side_by_side")),
    *(f"surgery/test_{name}.py" for name in ("exact_norms", "exact_property", "exact_theorems")),
    *(f"surgery/test_{name}.py" for name in ("fold_norms", "materialize")),
)
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what SLOW names."""
    slow = [HERE / name for name in SLOW]
    assert all(path.exists() for path in slow), "SLOW names what is not there"
    for item in items:
        if any(path in (item.path, *item.path.parents) for path in slow):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def nothing_noted_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A note is told once a process, and a test is to hear its own."""
    monkeypatch.setattr(errors, "_NOTED", set())


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (name="llama", **config overrides) -> folder of a scrambled stock checkpoint.

    Names are the keys of tiny_models.SHAPES. The same arguments give the same folder: copy it to change it.
    """
    made: dict[str, Path] = {}

    def make(name: str = "llama", **overrides: object) -> Path:
        key = repr((name, sorted(overrides.items())))
        if key not in made:
            made[key] = save_tiny(tmp_path_factory.mktemp(name), name, **overrides)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_reduced(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function (recipe, name="llama", **overrides) -> folder of a reduced checkpoint.

    Its query maps are random, and it has as many layers as the recipe names.
    """
    made: dict[str, Path] = {}

    def make(recipe: tuple[str, ...], name: str = "llama", **overrides: object) -> Path:
        key = repr((recipe, name, sorted(overrides.items())))
        if key not in made:
            source = tiny_checkpoint(name, num_hidden_layers=len(recipe), **overrides)
            made[key] = save_reduced(tmp_path_factory.mktemp("reduced") / name, source, recipe)
        return made[key]

    return make


@pytest.fixture
def tiny_copy(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function like tiny_checkpoint whose folder is the test's own, to damage at will."""

    def make(name: str = "llama", **overrides: object) -> Path:
        return Path(shutil.copytree(tiny_checkpoint(name, **overrides), tmp_path / f"copy-of-{name}"))

    return make


@pytest.fixture(scope="session")
def raven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of about 800 words: a short poem, over and over."""
    path = tmp_path_factory.mktemp("text") / "raven.txt"
    path.write_text("\n".join([RAVEN] * 6), encoding="utf-8")
    return path


@pytest.fixture
def write(tmp_path):
    """Return a function (content, name) -> path of a new file, as a string."""

    def make(content, name="text.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make


@pytest.fixture(scope="session")
def pair(
    tiny_checkpoint: Callable[..., Path], raven: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Pair]:
    """Return a function (name="llama", query="key-shared", **config overrides) -> Pair."""
    made: dict[str, Pair] = {}

    def make(name: str = "llama", query: str = "key-shared", **overrides: object) -> Pair:
        key = repr((name, query, sorted(overrides.items())))
        if key not in made:
            original = tiny_checkpoint(name, **overrides)
            made[key] = Pair(original, tmp_path_factory.mktemp("fitted") / name)
            convert_tiny(original, made[key].reduced, query, raven)
        return made[key]

    return make
