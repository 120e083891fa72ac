"""Windows longer than a model was made for: fits and healing keep one rule."""

import pytest
from conversions import convert_tiny
from healings import heal_tiny

from qectomy.errors import TextError

RUNS = ["convert", "heal"]


@pytest.fixture
def windows_of(pair, raven, tmp_path):
    """Return a function (command, family, context, config overrides) that runs it into tmp_path / out."""

    def run(command, name, context, **overrides):
        found = pair(name, **overrides)
        if command == "convert":
            return convert_tiny(found.original, tmp_path / "out", "key-shared", raven, context=context)
        return heal_tiny(found, tmp_path / "out", raven, context=context, tokens=256)

    return run


@pytest.mark.parametrize("command", RUNS)
def test_rope_goes_on_and_a_note_says_so(command, windows_of, capsys):
    capsys.readouterr()
    report = windows_of(command, "llama", 40, max_position_embeddings=32)
    assert capsys.readouterr().err.count("note: --context 40 is longer than the 32 positions that the model was") == 1
    assert report["perplexity"]["protocol"]["context"] == 40


@pytest.mark.parametrize("command", RUNS)
def test_within_them_nothing_is_said(command, windows_of, capsys):
    windows_of(command, "llama", 32, max_position_embeddings=32)
    assert "positions" not in capsys.readouterr().err


@pytest.mark.parametrize("command", RUNS)
def test_a_table_of_positions_ends(command, windows_of, tmp_path):
    with pytest.raises(TextError, match="--context 129 is longer than the model's 128 positions; use 128 or less"):
        windows_of(command, "gpt2", 129)
    assert list(tmp_path.iterdir()) == []
