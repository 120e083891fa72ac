"""Text files become token windows: what is read, what is refused, and how windows are cut."""

import json
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import RAVEN, VOCAB_SIZE, bos_tokenizer, tiny_tokenizer

from qectomy.errors import CheckpointError, TextError
from qectomy.text.documents import JOIN
from qectomy.text.text import Source, bos_of, load_tokenizer, read_source
from qectomy.text.windows import Opening, TokenStream, cut, first_tokens, make_windows


def lines(*records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def ids_of(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def windows(*texts, tokenizer=None, context=16, tokens=None, vocab_size=VOCAB_SIZE, skip=None):
    sources = [Source(f"text{i}", f"hash{i}", text) for i, text in enumerate(texts)]
    return make_windows(
        tokenizer or tiny_tokenizer(), sources, context=context, tokens=tokens, vocab_size=vocab_size, skip=skip
    )


# Reading


def test_utf8_with_and_without_a_byte_order_mark(write):
    plain = read_source(write("Nevermore — ñandú 烏\r\n"))
    marked = read_source(write("\ufeffNevermore — ñandú 烏\r\n", "marked.txt"))
    assert plain.text == marked.text == "Nevermore — ñandú 烏\r\n"
    assert plain.name == "text.txt"  # no folder of the user's in a report
    assert plain.sha256 != marked.sha256
    assert len(plain.sha256) == 64


def test_jsonl_lines_end_at_newlines_alone(write):
    """JSON lets U+2028, U+2029 and U+0085 stand raw in a string; str.splitlines would cut there."""
    text = "quoth\u2028the\u2029raven\u0085nevermore"
    assert read_source(write(lines({"text": text}, {"text": "more"}), "a.jsonl")).text == text + JOIN + "more"
    assert read_source(write('{"text": "one"}\r\n{"text": "two"}\r\n', "b.jsonl")).text == "one" + JOIN + "two"


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "good"}\n{"text": bad}\n', r"line 2: not JSON"),
        ('{"text": "good"}\n\n\n{"other": "x", "text": 3}', r"line 4: no text in its field 'text'"),
        ("[" * 100_000, r"line 1: not JSON"),
        ('{"text": "\\ud83d"}', r"line 1: .*surrogate"),
        ('{"text": " "}\n{"text": ""}', r"holds no text"),
        ("", r"holds no text"),
    ],
)
def test_bad_jsonl_names_the_line(write, content, message):
    with pytest.raises(TextError, match=message):
        read_source(write(content, "bad.jsonl"))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"fine until \xe9 here", r"text\.txt is not UTF-8 text \(byte 11 "),
        ("utf-16".encode("utf-16"), r"not UTF-8"),
        (b"", r"holds no text"),
        (b" \n\t\n", r"holds no text"),
        (b"\xef\xbb\xbf", r"holds no text"),
    ],
)
def test_unusable_files(write, content, message):
    with pytest.raises(TextError, match=message):
        read_source(write(content))


def test_a_folder_is_not_a_text(tmp_path):
    with pytest.raises(TextError, match=r"is a folder; give a text file"):
        read_source(str(tmp_path))


@pytest.mark.parametrize("name", ["nosuchfile.txt", "no/such:config:train", "word " * 200, "nul\0byte"])
def test_a_missing_file_without_network(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TextError, match=r"no file .*, and no dataset of that name could be read") as caught:
        read_source(name)
    assert len(str(caught.value).splitlines()) == 1


def test_datasets_by_name_config_and_split(monkeypatch):
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((*arguments, options))
        return [{"id": 1, "page": "one"}, {"id": 2, "page": None}, {"id": 3, "page": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    names = ["some/data", "some/data:config", "some/data:config:test", "some/data::test"]
    sources = [read_source(name) for name in names]
    assert [source.text for source in sources] == ["one" + JOIN + "two"] * 4
    assert [source.name for source in sources] == names
    assert calls == [
        ("some/data", None, {"split": "train", "streaming": True}),
        ("some/data", "config", {"split": "train", "streaming": True}),
        ("some/data", "config", {"split": "test", "streaming": True}),
        ("some/data", None, {"split": "test", "streaming": True}),
    ]


def test_a_dataset_without_text(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"id": "1", "label": "a"}])
    with pytest.raises(TextError, match=r"several of its fields are texts, .*; it has 'id' \(text\), 'label' \(text\)"):
        read_source("some/data")


@pytest.mark.parametrize("name", ["mistyped.txt", "some/where.jsonl"])
def test_a_file_that_is_mistyped_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(TextError, match=f"no file '{name}', and no dataset of that name"):
        read_source(name)


def test_a_gpt2_without_its_tokenizer_files(tiny_copy):
    """transformers makes an empty tokenizer for it, which would give a text of no tokens."""
    folder = tiny_copy("gpt2")
    assert load_tokenizer(folder)("a")["input_ids"]
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer that can be loaded: files are missing"):
        load_tokenizer(folder)


def test_no_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)


# Windows


@given(
    text=st.text(alphabet="abc é烏.\n", min_size=1, max_size=400), repeat=st.integers(1, 60), count=st.integers(1, 700)
)
def test_first_tokens_are_those_of_the_whole_text(text, repeat, count):
    text = text * repeat
    whole = tiny_tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)
    for wanted, held in ((count, text), (None, text), (count, Opening(text.splitlines(keepends=True)))):
        found = first_tokens(tiny_tokenizer(), held, wanted, places=True)
        assert found.ids == whole["input_ids"][:wanted]
        assert found.places == whole["offset_mapping"][:wanted]
    assert first_tokens(tiny_tokenizer(), text, count).places is None


@given(n=st.integers(0, 200), width=st.integers(1, 40), step=st.none() | st.integers(1, 40), rest=st.booleans())
def test_every_token_is_new_to_one_window(n, width, step, rest):
    step = min(step or width, width)
    spans = cut(n, width, step, rest=rest)
    new = [at for start, stop, seen in spans for at in range(start + seen, stop)]
    assert new == list(range(len(new)))
    assert len(new) == n if rest else 0 <= n - len(new) < (step if spans else width)
    assert all(stop - start == width for start, stop, _ in spans[: None if n >= width else 0])
    assert [start for start, _, _ in spans[:-1]] == [step * i for i in range(len(spans) - 1)]


@pytest.mark.parametrize("size", [1, 7, 5000])
def test_a_stream_gives_each_token_of_its_pieces_once(size):
    pieces = [RAVEN[at : at + size] for at in range(0, len(RAVEN), size)]
    stream = TokenStream(tiny_tokenizer(), pieces)
    taken = [stream.take(count).tolist() for count in (0, 5, 300, 10**6, 3)]
    assert [len(part) for part in taken[:3]] == [0, 5, 300]
    assert list(chain(*taken)) == list(chain(*map(ids_of, pieces)))
    assert stream.taken == sum(map(len, taken))


def test_windows_do_not_overlap():
    made = windows(RAVEN, context=16)
    ids = ids_of(RAVEN)
    assert made.tokens.shape == (len(ids) // 16, 16)
    assert made.tokens.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert not made.bos


def test_tokens_are_shared_among_the_texts():
    texts = [RAVEN * 3, RAVEN.upper() * 3, RAVEN.swapcase() * 3]
    made = windows(*texts, context=16, tokens=16 * 10 + 7)
    counts = [source["tokens"] // 16 for source in made.sources]
    assert sum(counts) == len(made.tokens) == 10
    assert max(counts) - min(counts) <= 1
    at = 0
    for text, count in zip(texts, counts, strict=True):
        assert made.tokens[at : at + count].flatten().tolist() == ids_of(text)[: count * 16]
        at += count
    assert [source["file"] for source in made.sources] == ["text0", "text1", "text2"]


def test_more_texts_than_windows():
    made = windows(RAVEN, RAVEN, RAVEN, context=16, tokens=32)
    assert len(made.tokens) == 2
    assert len(made.sources) == 2
    assert len(windows(RAVEN, context=16, tokens=3).tokens) == 1


def test_every_window_starts_with_bos_where_the_tokenizer_adds_it():
    tokenizer = bos_tokenizer()
    assert bos_of(tokenizer) == tokenizer.bos_token_id
    assert bos_of(tiny_tokenizer()) is None
    made = windows(RAVEN, tokenizer=tokenizer, context=16)
    assert made.bos
    assert made.tokens.shape[1] == 16
    assert (made.tokens[:, 0] == tokenizer.bos_token_id).all()
    ids = ids_of(RAVEN)
    assert made.tokens[:, 1:].flatten().tolist() == ids[: len(ids) // 15 * 15]


def test_skipped_tokens_are_left_out():
    made = windows(RAVEN, RAVEN, context=16, tokens=64, skip={"hash1": 21})
    ids = ids_of(RAVEN)
    assert made.tokens[:2].flatten().tolist() == ids[:32]
    assert made.tokens[2:].flatten().tolist() == ids[21 : 21 + 32]
    assert [source["first_token"] for source in made.sources] == [0, 21]


def test_text_shorter_than_a_window():
    with pytest.raises(TextError, match=r"text1 has \d+ tokens, fewer than one window of 64; .*smaller --context"):
        windows(RAVEN, "Nevermore.", context=64)
    with pytest.raises(
        TextError,
        match=r"has \d+ tokens; less the first \d+, which are kept for evaluation, that is fewer than",
    ):
        windows(RAVEN, context=16, skip={"hash0": len(ids_of(RAVEN)) - 5})
    with pytest.raises(TextError, match=r"a context of 2 tokens leaves nothing to predict"):
        windows(RAVEN, tokenizer=bos_tokenizer(), context=2)


def test_token_ids_beyond_the_vocabulary():
    largest = max(ids_of(RAVEN))
    assert windows(RAVEN, vocab_size=largest + 1).tokens.max() == largest
    with pytest.raises(CheckpointError, match=rf"token id \d+, but the model's embedding has {largest} rows"):
        windows(RAVEN, vocab_size=largest)


def test_windows_are_int64_and_deterministic():
    first, second = windows(RAVEN, tokens=64), windows(RAVEN, tokens=64)
    assert first.tokens.dtype == torch.int64
    assert torch.equal(first.tokens, second.tokens)
