"""Bytes and words behind tokens: whatever the tokenizer, they add up to those of the text."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import RAVEN, tiny_tokenizer

from qectomy.text.text_spans import PIECE, spans_of

TEXTS = [RAVEN, "烏鴉說：永不再。" * 9, "🐦‍⬛é ß\n\n  end  ", " a b  c\t d\n", ""]


def encoded(text, fast):
    found = tiny_tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], [stop for _, stop in found["offset_mapping"]] if fast else None


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("fast", [True, False])
def test_all_tokens_are_the_whole_text(text, fast):
    ids, ends = encoded(text, fast)
    spans = spans_of(tiny_tokenizer(), text, ids, ends)
    assert spans.n_bytes(0, len(ids)) == len(text.encode())
    assert spans.n_words(0, len(ids)) == len(text.split())


@given(st.text(max_size=90), st.booleans(), st.data())
def test_parts_add_up(text, fast, data):
    ids, ends = encoded(text, fast)
    spans = spans_of(tiny_tokenizer(), text, ids, ends)
    cut = data.draw(st.integers(0, len(ids)))
    for count in (spans.n_bytes, spans.n_words):
        assert count(0, cut) + count(cut, len(ids)) == count(0, len(ids))
        assert count(0, cut) >= 0
    if fast:
        assert spans.n_bytes(0, len(ids)) <= len(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("fast", [True, False])
def test_a_part_in_plain_text(fast):
    """Byte-level tokens of plain ASCII: each has as many bytes as its token has characters."""
    tokenizer = tiny_tokenizer()
    ids, ends = encoded(RAVEN, fast)
    assert len(ids) > 3 * PIECE
    spans = spans_of(tokenizer, RAVEN, ids, ends)
    for start, stop in ((0, 1), (3, 40), (PIECE - 1, PIECE + 2), (5, len(ids))):
        part = tokenizer.decode(ids[start:stop])
        assert spans.n_bytes(start, stop) == len(part.encode())
        before = tokenizer.decode(ids[:start])
        begins = [m.start() for m in re.finditer(r"\S+", before + part)]
        assert spans.n_words(start, stop) == sum(begin >= len(before) for begin in begins)
