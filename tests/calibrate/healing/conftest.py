"""Fitted checkpoints to heal, made once a session. No test writes into them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conversions import convert_tiny
from healings import Pair


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
