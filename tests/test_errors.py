"""What messages make of the errors of libraries, and what is noted once."""

import pytest
from transformers import LlamaConfig

from qectomy.errors import note, reason_of


def test_the_first_line_is_the_reason():
    assert reason_of(ValueError("too small\nwhile reading\nthat file")) == "too small"
    assert reason_of(ValueError("")) == "ValueError"
    assert reason_of(ValueError("x" * 300), 100) == "x" * 100


def test_a_line_that_only_announces_is_followed_by_what_it_announces():
    with pytest.raises(Exception, match="validate_architecture") as caught:
        LlamaConfig(hidden_size=128, num_attention_heads=3)
    assert str(caught.value).splitlines()[0].endswith(":")  # else this tests nothing
    said = reason_of(caught.value)
    assert said.endswith("The hidden size (128) is not a multiple of the number of attention heads (3).")
    assert "\n" not in said


def test_of_a_long_list_the_beginning_and_the_end_are_shown():
    lines = ["Cannot make a tokenizer from one of:", *(f"({i}) a thing of some kind or other," for i in range(20))]
    said = reason_of(ValueError("\n".join([*lines, "Install the library."])), 120)
    assert said.startswith("Cannot make a tokenizer from one of: (0) a thing")
    assert said.endswith(" ... Install the library.")
    assert len(said) <= 120


def test_too_deep_is_said_in_words():
    assert reason_of(RecursionError("maximum recursion depth exceeded")) == "it is nested too deeply"


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_a_note_is_told_once_and_by_the_first_process(rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    for _ in range(2):
        note("one\x1bthing")
    assert capsys.readouterr().err == "note: one␛thing\n" * lines
