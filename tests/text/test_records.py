"""Records are read as records whatever a file is called, by the field that holds the text, and prose is left prose."""

import copy
import hashlib
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer

from qectomy import errors
from qectomy.errors import TextError
from qectomy.record.texts import ReadAs, TextProtocol
from qectomy.report.text_words import read_as_words
from qectomy.text import columns as columns_module
from qectomy.text import documents as documents_module
from qectomy.text import records as records_module
from qectomy.text.documents import JOIN, Documents, Reading, own_hash
from qectomy.text.records import list_entries
from qectomy.text.text import read_source

C4 = [{"text": f"page {i} of\nthe web", "timestamp": "2019", "url": f"https://example.org/{i}"} for i in range(40)]
TEXTS = [record["text"] for record in C4]
NAMES = ["a.json", "a.jsonl", "a.ndjson", "a.txt", "a"]


@pytest.fixture
def notes(monkeypatch):
    """What is told on stderr, each once."""
    told = []
    for module in (documents_module, records_module, columns_module):
        monkeypatch.setattr(module, "note", lambda text: told.append(errors.clean(text)))
    return told


def as_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


# By content


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "content",
    [as_lines(C4), as_lines(C4).replace("\n", "\r\n"), "\n\n" + as_lines(C4), "\ufeff" + as_lines(C4)[:-1]],
    ids=["lines", "windows", "blank", "marked"],
)
def test_json_lines_by_any_name(write, notes, name, content):
    found = read_source(write(content, name))
    assert found.text == JOIN.join(TEXTS)
    assert found.read_as == {"kind": "JSON lines", "records": 40, "field": "text"}
    assert not notes


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_list_by_any_name(write, notes, name, indent):
    path = write(json.dumps(C4, indent=indent), name)
    assert read_source(path).text == JOIN.join(TEXTS)
    assert Documents(path).join == JOIN
    strings = read_source(write("\n " + json.dumps(TEXTS, indent=indent) + "\n", name))
    assert strings.text == JOIN.join(TEXTS)
    assert strings.read_as == {"kind": "JSON list", "records": 40}
    assert not notes


@pytest.mark.parametrize("name", ["parquet.txt", "parquet"])
def test_parquet_by_any_name(write, tmp_path, name):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / name)
    assert read_source(str(tmp_path / name)).text == JOIN.join(TEXTS)


@pytest.mark.parametrize(
    "prose",
    [
        "{Enter Hamlet, reading}\nPolonius. What do you read, my lord?\n",
        '["Call me Ishmael," he said]\nSome years ago\n',
        '["Hello", he said]\nand left.\n',
        '["Hello", "Hello!", they said]\n',
        "[Illustration: a raven]\nOnce upon a midnight dreary,\n",
        "Title, a poem\nOnce upon, a midnight\n",
        "[]\nThe empty brackets mean nothing.\n",
    ],
)
def test_prose_stays_prose(write, notes, prose):
    found = read_source(write(prose, "a.txt"))
    assert found.text == prose
    assert found.read_as == {"kind": "plain text"} | ({"looks_like": "JSON"} if prose.startswith('["') else {})
    assert len(notes) == prose.startswith('["')


@pytest.mark.parametrize(
    "name, content, likely",
    [
        ("a.json", '{\n  "text": "over several lines"\n}\n', "JSON"),
        ("a.txt", '{"text": broken}\n', "JSON"),
        ("a.json", '["one"] and more\n', "JSON"),
        ("a.txt", "id,text,label\n1,one two,yes\n2,three,no\n", "CSV"),
        ("a.csv", "A heading\nof one column\n", "CSV"),
        ("a.tsv", "id\ttext\n1\tone\n", "CSV"),
        ("a.txt", "<!DOCTYPE html>\n<html><p>text</p></html>", "HTML or XML"),
        ("a.html", "<p>text</p>", "HTML or XML"),
        ("a", '<?xml version="1.0"?><a>text</a>', "HTML or XML"),
    ],
)
def test_what_looks_like_records_and_is_read_as_prose_is_said(write, notes, name, content, likely):
    path = write(content, name)
    found = read_source(path)
    assert found.text == content
    assert found.read_as == {"kind": "plain text", "looks_like": likely}
    protocol = TextProtocol.model_construct(text_read_as=ReadAs(**found.read_as))
    assert read_as_words(protocol) == f"read as prose, though it looks like {likely}"
    (told,) = notes
    assert told.startswith(f"{path} looks like {likely} and is read as prose, with all its marks; as records are read")


def test_a_broken_line_after_records_is_an_error_that_says_why(write):
    with pytest.raises(TextError, match=r"a\.txt, line 3: not JSON \(.*\); its first line is a JSON record, so every"):
        read_source(write('{"text": "one"}\n\nprose\n', "a.txt"))


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"text": "one"}, {"text": "two"', r"a\.json, entry 2: not JSON \(.*delimiter"),
        (
            '[{"text": "one"}, {"text": "two"}, 3]',
            r"a\.json, entry 3: not JSON \('3' begins neither a record nor a text",
        ),
        (
            '[{"text": "one"} {"text": "two"}]',
            r"entry 2: not JSON \('\{' stands where a comma or the list's end is due",
        ),
        ('[{"text": "one"}, {"a": 1, "b": "\\ud83d"}]', r"entry 2: no text in its field 'text'"),
        ('[{"text": "one"}] and more', r"entry 2: not JSON \('a' follows after the list's end"),
        ('["one", "\\ud83d"]', r"entry 2: half of a surrogate pair"),
        ('[{"text": "one"}, ["two"]]', r"entry 2: not JSON"),
        ('[{"text": "one"}, "two"]', r"a\.json, entry 2: 'two' is no record with fields"),
        ("[]", r"holds no text"),
    ],
)
def test_a_damaged_list_names_the_entry(write, monkeypatch, content, message):
    monkeypatch.setattr(documents_module, "BYTES_A_READ", 18)  # what follows the first entry is not yet read
    with pytest.raises(TextError, match=message):
        read_source(write(content, "a.json"))


JSON = st.recursive(st.text(max_size=5) | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3))
RECORD = st.text(max_size=9) | st.dictionaries(st.text(max_size=3), JSON, max_size=3)


@given(entries=st.lists(RECORD, max_size=6), size=st.integers(1, 40), indent=st.none() | st.integers(0, 2))
def test_a_list_in_pieces_is_the_list(entries, size, indent):
    text = " " + json.dumps(entries, indent=indent) + "\n"
    pieces = [text[at : at + size] for at in range(0, len(text), size)]
    assert list(list_entries(pieces)) == entries


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entries=st.lists(RECORD, min_size=1, max_size=6), at=st.integers(0, 10**6))
def test_a_list_that_is_cut_short_is_no_list(entries, at):
    text = json.dumps(entries)
    with pytest.raises(ValueError, match=r"."):
        list(list_entries([text[: at % len(text)]]))


def test_an_entry_without_an_end_is_given_up(write, monkeypatch, notes):
    monkeypatch.setattr(records_module, "MAX_ENTRY", 1000)
    read = []

    def pieces():
        for number in range(100):
            read.append(number)
            yield ('["' if number == 0 else "") + "x" * 100

    with pytest.raises(ValueError, match=r"Unterminated string .*, in [\d,]+ characters"):
        list(list_entries(pieces()))
    assert len(read) < 40


# The field


def test_the_field_with_the_text(write):
    def texts(*records, field=None):
        return list(Documents(write(as_lines(records), "a.json"), Reading(field=field)))

    assert texts({"title": "t", "text": "a"}, {"text": "b"}) == ["a", "b"]
    assert texts({"title": "t", "page": "a"}, {"page": "b", "text": "c"}) == ["a", "b"]  # settled by the first record
    assert texts({"id": 1, "body": "a"}, {"body": "b", "title": "t"}) == ["a", "b"]
    assert texts({"text": None, "title": "t"}, {"text": "b"}) == ["b"]
    assert texts({"title": "t", "text": "a"}, {"title": "u"}, field="title") == ["t", "u"]


def test_a_record_whose_text_is_in_another_field_is_told(write, notes):
    """The first record settles the field, and need not be like the others."""

    def texts(*records, field=None):
        return list(Documents(write(as_lines(records), "a.json"), Reading(field=field)))

    assert texts({"title": "t"}, {"title": "u", "text": "b"}, {"title": "v", "text": "c"}) == ["t", "u", "v"]
    (told,) = notes
    assert told.endswith(
        "a.json, line 2: its text is in the field 'text', and 'title' is read of every record, which line 1 settled; "
        "it has 'title' (text), 'text' (text). To have another field read, name it: --field NAME"
    )
    notes.clear()
    assert texts({"content": "a", "text": None}, *[{"content": None, "text": "b"}] * 3) == ["a"]
    assert "line 2: its text is in the field 'text', and 'content' is read" in notes[0]
    assert notes[1].endswith(
        "a.json: 3 of 4 records were left out, for their field 'content' is null; to have another field read, name it: "
        "--field NAME"
    )
    assert len(notes) == 2
    notes.clear()
    assert texts({"title": "t", "n": 1}, {"title": "u", "n": None}, {"title": "v", "text": None}) == ["t", "u", "v"]
    assert texts({"title": "t"}, {"title": "u", "text": "b"}, field="title") == ["t", "u"]
    assert not notes
    with pytest.raises(TextError, match=r"line 2: no text in its field 'title', which line 1 settled; it has 'name'"):
        texts({"title": "t"}, {"name": "u"})


def test_the_record_of_a_dataset_is_named(monkeypatch, notes):
    rows = [{"title": "t"}, {"title": "u", "text": "b"}]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    assert list(Documents("some/data")) == ["t", "u"]
    assert notes[0].startswith("dataset 'some/data', row 2: its text is in the field 'text', and 'title' is read")
    assert ", which row 1 settled" in notes[0]


@pytest.mark.parametrize(
    "record, field, message",
    [
        (
            {"title": "t", "body": "b", "n": 1, "ok": True, "tags": [], "by": {}, "x": None},
            None,
            r"a\.json, line 1: several of its fields are texts, and none is called `text`; it has 'title' \(text\), "
            r"'body' \(text\), 'n' \(number\), 'ok' \(yes or no\), 'tags' \(list\), 'by' \(record\), 'x' \(null\); "
            r"name the right one: --field NAME",
        ),
        ({"n": 1}, None, r"none of its fields is a text"),
        ({}, None, r"it has no fields"),
        ({"text": "a"}, "body", r"line 1: no text in its field 'body'; it has 'text' \(text\); name another: --field"),
        ({"body": 3}, "body", r"no text in its field 'body'"),
    ],
)
def test_a_field_that_is_not_clear_is_asked_for(write, record, field, message):
    with pytest.raises(TextError, match=message):
        list(Documents(write(as_lines([record]), "a.json"), Reading(field=field)))


def test_the_field_of_a_table(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"title": ["t"], "body": ["b"], "n": [1]}), path)
    with pytest.raises(TextError, match=r"a\.parquet: several of its fields are texts, .*; it has 'title' \(text\)"):
        read_source(str(path))
    assert read_source(str(path), Reading(field="body")).text == "b"
    with pytest.raises(TextError, match=r"has no column 'text', which --field names; it has \['title', 'body', 'n'\]"):
        read_source(str(path), Reading(field="text"))
    with pytest.raises(TextError, match=r"a\.parquet, row 1: no text in its field 'n'"):
        read_source(str(path), Reading(field="n"))


def test_a_plain_text_has_no_field(write, notes):
    path = write("Nevermore.\n")
    assert read_source(path, Reading(field="body")).text == "Nevermore.\n"
    assert notes == [f"{path} is plain text: --field body does not concern it"]


# Chats


CHATS = [
    [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": f"Nobody {i}."}] for i in range(3)
]
TEMPLATE = "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}{% endfor %}"
WRITTEN = [f"<user>Who is there?<assistant>Nobody {i}." for i in range(3)]


def chat_tokenizer(template=TEMPLATE):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def test_chats_are_written_by_the_models_own_template(write, tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = write(as_lines({"prompt": "Who", "id": "x", "messages": chat} for chat in CHATS), "a.json")
    parquet.write_table(pyarrow.table({"prompt": ["Who"] * 3, "messages": CHATS}), tmp_path / "a.parquet")
    for name in (path, str(tmp_path / "a.parquet")):
        loaded = []
        found = read_source(name, Reading(tokenizer=lambda loaded=loaded: loaded.append(1) or chat_tokenizer()))
        assert found.text == JOIN.join(WRITTEN)
        digest = hashlib.sha256(json.dumps(TEMPLATE).encode()).hexdigest()
        assert found.read_as.items() > {"records": 3, "field": "messages", "chat_template_sha256": digest}.items()
        assert loaded == [1]
    other = write(as_lines({"talk": chat} for chat in CHATS), "b.json")
    assert list(Documents(other, Reading(field="talk", tokenizer=chat_tokenizer))) == WRITTEN
    assert read_source(path, Reading(field="prompt")).text == JOIN.join(["Who"] * 3)


@pytest.mark.parametrize(
    "template, chat, message",
    [
        (
            None,
            CHATS[0],
            r"a\.json, line 1 holds a chat, and this model's tokenizer has no chat template .*--field",
        ),
        (TEMPLATE, [{"role": "user", "content": None}], r"line 1: a turn of the chat is not a `role` and a `content`"),
        (TEMPLATE, [{"role": "user"}], r"line 1: a turn of the chat is not"),
        (
            "{{ raise_exception('no such role') }}",
            CHATS[0],
            r"line 1: the model's chat template .*no such role",
        ),
        (TEMPLATE, [], r"none of its fields is a text"),
    ],
)
def test_a_chat_that_cannot_be_written(write, template, chat, message):
    path = write(as_lines([{"messages": chat}]), "a.json")
    with pytest.raises(TextError, match=message):
        read_source(path, Reading(tokenizer=lambda: chat_tokenizer(template)))


# Saved datasets


def save(folder, **columns):
    from datasets import Dataset

    Dataset.from_dict(columns).save_to_disk(folder, num_shards=2)
    return folder


def test_a_saved_dataset(tmp_path):
    folder = save(tmp_path / "saved", id=list(range(40)), text=TEXTS, title=["t"] * 40)
    found = read_source(str(folder))
    assert found.text == JOIN.join(TEXTS)
    assert (found.name, found.read_as) == ("saved", {"kind": "saved dataset", "records": 40, "field": "text"})
    assert found.sha256 == own_hash(str(folder)) == read_source(str(folder), Reading(field="title")).sha256
    assert found.sha256 != own_hash(str(save(tmp_path / "other", id=list(range(40)), text=TEXTS[::-1])))
    chats = save(tmp_path / "chats", messages=CHATS)
    assert list(Documents(str(chats), Reading(tokenizer=chat_tokenizer))) == WRITTEN


def test_the_splits_of_a_saved_dataset(tmp_path, notes):
    from datasets import Dataset, DatasetDict

    parts = {name: Dataset.from_dict({"text": [name]}) for name in ("train", "test")}
    for names in (("train", "test"), ("test",)):
        DatasetDict({name: parts[name] for name in names}).save_to_disk(tmp_path / "-".join(names))
    assert read_source(str(tmp_path / "train-test")).text == "train"
    folder = tmp_path / "train-test"
    assert set(notes) == {f"{folder} holds the splits ['train', 'test'], and train is read; another: {folder}/test"}
    notes.clear()
    assert read_source(str(tmp_path / "train-test/test")).text == read_source(str(tmp_path / "test")).text == "test"
    assert not notes
    (tmp_path / "train-test/dataset_dict.json").write_text('{"splits": ["test", "../test"]}')
    assert read_source(str(tmp_path / "train-test")).text == "test"
    (tmp_path / "train-test/valid").mkdir()
    (tmp_path / "train-test/dataset_dict.json").write_text('{"splits": ["test", "valid"]}')
    with pytest.raises(TextError, match=r"holds several splits, \['test', 'valid'\]; give one, as \S+train-test/test"):
        read_source(str(tmp_path / "train-test"))


@pytest.mark.parametrize(
    "state, message",
    [
        ("{", r"state\.json cannot be read"),
        ("[]", r"holds no JSON object"),
        ('{"_data_files": []}', r"names no files of rows"),
        ('{"_data_files": [{"filename": "../outside"}]}', r"or not only such as lie beside it: \['\.\./outside'\]"),
        ('{"_data_files": [{"filename": 3}]}', r"names no files of rows"),
        ('{"_data_files": [{"filename": "link"}]}', r"or not only such as lie beside it"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', r"gone\.arrow is missing"),
        ('{"_data_files": [{"filename": "state.json"}]}', r"saved cannot be read"),
        (
            '{"_data_files": [{"filename": "a"}], "_indices_data_files": [{"filename": "b"}]}',
            r"a selection of",
        ),
    ],
)
def test_a_damaged_saved_dataset(tmp_path, state, message):
    folder = save(tmp_path / "saved", text=TEXTS)
    (tmp_path / "outside").write_text("private")
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "state.json").write_text(state)
    with pytest.raises(TextError, match=message):
        read_source(str(folder))
