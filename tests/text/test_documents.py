"""Documents one at a time: the same text as the file read whole, and what is refused."""

import json
import tracemalloc
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from qectomy.checkpoint.checkpoint import sha256
from qectomy.errors import TextError
from qectomy.text import documents as documents_module
from qectomy.text.documents import JOIN, Documents
from qectomy.text.text import read_source


@pytest.fixture
def write_parquet(tmp_path):
    """Return a function (name=columns…) -> path of a parquet file, as a string."""

    def make(row_group_size=None, **columns):
        path = tmp_path / "text.parquet"
        parquet.write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
        return str(path)

    return make


# Plain text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    text=st.text(alphabet="ab é烏\U0001f426\u2028\u0085\r\n\ufeff", max_size=120),
    size=st.integers(1, 12),
    bom=st.booleans(),
)
def test_a_plain_text_in_pieces_is_the_whole_text(write, text, size, bom):
    path = write(("\ufeff" if bom else "").encode() + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "PIECE", size)
        pieces = list(Documents(path))
    with open(path, encoding="utf-8-sig", newline="") as file:
        assert "".join(pieces) == file.read()
    assert all(piece.endswith("\n") and len(piece) >= size for piece in pieces[:-1])
    assert all(len(piece.rsplit("\n", 2)[0]) < size for piece in pieces if piece.count("\n") > 1)


def test_a_long_plain_text_comes_in_pieces(write):
    line = "Quoth the Raven — nevermore ñ\r\n"
    path = write(line * 100_000)
    pieces = list(Documents(path))
    assert len(pieces) == -(-len(line) * 100_000 // (1 << 20))
    assert "".join(pieces) == line * 100_000


def test_a_line_longer_than_a_piece_is_not_cut(write, monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE", 10)
    assert list(Documents(write("é" * 35 + "\nab\n"))) == ["é" * 35 + "\n", "ab\n"]


def test_an_empty_file_has_no_document(write):
    assert list(Documents(write(""))) == []


def test_a_text_is_read_in_little_memory(write):
    path = write(("nevermore " * 27 + "\n") * 40_000)  # 11 MB
    tracemalloc.start()
    characters = sum(len(piece) for piece in Documents(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert characters == 271 * 40_000
    assert peak < 8_000_000


@pytest.mark.parametrize(
    "content, place", [(b"fine until \xe9 here", 11), (b"one\ntwo\n\xc3\xa9 then \xff\n", 16), (b"cut off \xe7\x83", 8)]
)
def test_what_is_not_utf8_says_at_which_byte(write, content, place):
    path = write(content)
    for read in (lambda: list(Documents(path)), lambda: read_source(path)):
        with pytest.raises(TextError, match=rf"text\.txt is not UTF-8 text \(byte {place} does not decode\)"):
            read()


def test_a_bad_byte_after_a_byte_order_mark_is_counted_from_the_files_start(write):
    path = write(b"\xef\xbb\xbfab\xe9 c\n")
    for read in (lambda: list(Documents(path)), lambda: read_source(path)):
        with pytest.raises(TextError, match=r"byte 5 does not decode"):
            read()


def test_a_folder_and_a_file_that_cannot_be_opened(write, tmp_path, monkeypatch):
    with pytest.raises(TextError, match=r"is a folder; give a text file, JSON or \.parquet, a folder that save_to"):
        list(Documents(str(tmp_path)))
    path = write("text")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(TextError, match=r"text\.txt cannot be read: Permission denied"):
        list(Documents(path))


# Records: tests/text/test_records.py has more


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_jsonl_streamed_is_jsonl_read_whole(write, name):
    records = [
        {"text": "one\u2028two\u0085", "page": "not this"},
        {"text": "烏\nnevermore"},
        {"id": 3, "text": "three"},
        {"text": None},
        {"text": "four", "n": [{}]},
    ]
    lines = "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records[:2])
    lines += "\n\n" + "\n".join(json.dumps(record) for record in records[2:])
    path = write("\ufeff" + lines, name)
    found = list(Documents(path))
    assert found == ["one\u2028two\u0085", "烏\nnevermore", "three", "four"]
    assert read_source(path).text == JOIN.join(found)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"text": "good"}\n{"text": bad}\n', r"bad\.jsonl, line 2: not JSON \(Expecting value"),
        (
            '{"text": "good"}\n\n\n{"other": "x", "text": 3}',
            r"line 4: no text in its field 'text', which line 1 settled; it has 'other' \(text\), 'text' \(number\); "
            r"name another: --field",
        ),
        ("3", r"line 1: 3 is no record with fields"),
        ("[" * 100_000, r"line 1: not JSON"),
        ('{"text": "\\ud83d"}', r"line 1: half of a surrogate pair"),
        (b'{"text": "fine"}\n{"text": "\xff"}', r"is not UTF-8 text \(byte 27 "),
    ],
)
def test_bad_jsonl_names_the_line(write, content, message):
    with pytest.raises(TextError, match=message):
        list(Documents(write(content, "bad.jsonl")))


def test_documents_before_a_bad_line_come_first(write):
    stream = iter(Documents(write('{"text": "good"}\nbad\n', "bad.jsonl")))
    assert next(stream) == "good"
    with pytest.raises(TextError, match="line 2"):
        next(stream)


# Parquet


def test_parquet_gives_its_text_column(write_parquet):
    texts = [f"document {i} — 烏" for i in range(700)]
    path = write_parquet(row_group_size=300, id=list(range(700)), text=texts)
    assert list(Documents(path)) == texts
    source = read_source(path)
    assert source.text == JOIN.join(texts)
    assert source.name == "text.parquet"
    assert source.sha256 == sha256(Path(path))


def test_parquet_takes_the_first_known_column_and_leaves_empty_rows_out(write_parquet):
    path = write_parquet(document=["not this"] * 3, page=["one", None, "three"])
    assert list(Documents(path)) == ["one", "three"]


def test_a_parquet_file_without_text(write_parquet):
    path = write_parquet(label=[1.5], n=[1])
    for read in (lambda: list(Documents(path)), lambda: read_source(path)):
        with pytest.raises(
            TextError, match=r"text\.parquet: none of its fields is a text, .*; it has 'label' \(other\), 'n' \(other\)"
        ):
            read()


def test_a_parquet_file_of_empty_rows_holds_no_text(write_parquet):
    with pytest.raises(TextError, match=r"text\.parquet holds no text"):
        read_source(write_parquet(text=pyarrow.array([None, " "], pyarrow.string())))


@pytest.mark.parametrize("keep", [0, 3, 100, -40])
def test_a_damaged_parquet_file(write, write_parquet, keep):
    data = Path(write_parquet(text=["nevermore"] * 50)).read_bytes()
    path = write(data[:keep], "bad.parquet")
    with pytest.raises(TextError, match=r"bad\.parquet cannot be read: ") as caught:
        list(Documents(path))
    assert len(str(caught.value).splitlines()) == 1


# Datasets


def test_a_dataset_is_streamed(monkeypatch):
    taken, calls = [], []

    def rows():
        for number in range(1000):
            taken.append(number)
            yield {"id": number, "content": None if number == 1 else f"row {number}"}

    def load_dataset(*arguments, **options):
        calls.append((*arguments, options))
        return rows()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    stream = iter(Documents("some/data:config:test"))
    assert [next(stream) for _ in range(3)] == ["row 0", "row 2", "row 3"]
    assert taken == [0, 1, 2, 3]
    assert calls == [("some/data", "config", {"split": "test", "streaming": True})]


def test_a_dataset_without_text(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"id": 1, "label": 2}])
    with pytest.raises(
        TextError, match=r"dataset 'some/data', row 1: none of its fields .*; it has 'id' \(number\), 'label'"
    ):
        list(Documents("some/data"))


def test_a_dataset_that_breaks_off(monkeypatch):
    def rows():
        yield {"text": "one"}
        raise ConnectionError("the network is gone\nand more")

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    stream = iter(Documents("some/data"))
    assert next(stream) == "one"
    with pytest.raises(TextError, match=r"some/data.* could be read: the network is gone$"):
        next(stream)


def test_an_error_without_words_is_named_by_its_kind(monkeypatch):
    def load_dataset(*_, **__):
        raise TimeoutError

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(TextError, match=r"could be read: TimeoutError$"):
        list(Documents("some/data"))


@pytest.mark.parametrize("name", ["mistyped.txt", "some/where.parquet", "a.jsonl", "notes.md"])
def test_a_file_that_is_mistyped_is_not_looked_for_on_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(TextError, match=rf"no file '{name}', and no dataset of that name .*its ending is a file's"):
        list(Documents(name))
