"""Which part of a text healing measures on, where no other text was given for it."""

import json

import pytest
from tiny_models import RAVEN, tiny_tokenizer

from qectomy.healing.data import text_from
from qectomy.text import documents as documents_module
from qectomy.text.documents import JOIN, Documents

LINES = "".join(f"{number} {word}\n" for number, word in enumerate(RAVEN.split() * 8))


@pytest.fixture
def write(tmp_path):
    """Return a function (content, name) -> path of a new file, as a string; records become JSON lines."""

    def make(content, name="text.txt"):
        if not isinstance(content, str):
            content = "".join(json.dumps({"text": text}) + "\n" for text in content)
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return make


def ids_of(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_the_start_has_the_tokens_that_were_asked_for(write, monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE", 50)
    monkeypatch.setattr(documents_module, "CHARACTERS", 50)
    path = write(LINES)
    found, there = text_from(tiny_tokenizer(), Documents(path), 0, 100)
    assert LINES.startswith(found.text)
    assert len(found.text) < len(LINES) // 2
    assert ids_of(found.text)[:100] == ids_of(LINES)[:100]
    assert there == 100
    found, there = text_from(tiny_tokenizer(), Documents(path), 0, 10**6)
    assert (found.text, there) == (LINES, len(ids_of(LINES)))


def test_the_start_of_many_documents_is_tokenized_a_few_times(write):
    """Not once a document: each time all that was read so far is tokenized."""
    path, calls = write(["x" * 40] * 3000, "a.jsonl"), []

    def tokenizer(text, **_):
        calls.append(len(text))
        return {"input_ids": list(range(len(text) // 50))}

    found, there = text_from(tokenizer, Documents(path), 0, 2000)
    assert 50 * 2000 < len(found.text) <= 42 * 3000
    assert there == 2000
    assert len(calls) < 20


def test_the_start_of_documents(write, monkeypatch):
    monkeypatch.setattr(documents_module, "CHARACTERS", 50)
    path = write(LINES.split("\n"), "a.jsonl")
    found, _ = text_from(tiny_tokenizer(), Documents(path), 0, 40)
    assert JOIN.join(Documents(path)).startswith(found.text)
    assert len(found.text) < 2000
    assert len(ids_of(found.text)) >= 40
    assert (found.name, len(found.sha256), found.read_as["kind"]) == ("a.jsonl", 64, "JSON lines")


@pytest.mark.parametrize("fast", [True, False])
def test_a_text_from_the_middle(write, fast):
    """Also where a tokenizer cannot say which characters a token is."""
    tokenizer, path = tiny_tokenizer(), write(LINES)
    if not fast:
        plain = tokenizer

        class Slow:
            def __call__(self, text, return_offsets_mapping=False, **options):
                assert not return_offsets_mapping
                return plain(text, **options)

            def decode(self, ids, **options):
                return plain.decode(ids, **options)

        tokenizer = Slow()
    found, there = text_from(tokenizer, Documents(path), 50, 30)
    assert found.text in LINES
    assert ids_of(found.text)[:30] == ids_of(LINES)[50:80]
    assert there == 30
    assert text_from(tokenizer, Documents(path), 10**6, 30)[0].text == ""
