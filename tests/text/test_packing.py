"""Text in windows on disk, against a text that is tokenized at once and cut; and the order they are read in."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import RAVEN, VOCAB_SIZE, bos_tokenizer, tiny_tokenizer

from qectomy.checkpoint.checkpoint import sha256
from qectomy.errors import CheckpointError, QectomyError, TextError
from qectomy.runs.records import read_record, write_record
from qectomy.text import documents as documents_module
from qectomy.text import packing
from qectomy.text.documents import JOIN
from qectomy.text.overlap import FittedSpans, Sketch
from qectomy.text.packing import Packed, PackedWindows, Reserved, Shuffled, pack

C = 16
LINES = "".join(f"{number} {word}\n" for number, word in enumerate(RAVEN.split() * 8))  # no blank line


@pytest.fixture
def write(tmp_path):
    """Return a function (content, name) -> path of a new file, as a string; records become JSON lines."""

    def make(content, name="text.txt"):
        if not isinstance(content, str):
            content = "".join(json.dumps({"text": text}) + "\n" for text in content)
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        return str(path)

    return make


@pytest.fixture
def packed(tmp_path):
    """Return a function (names…, options) -> (training windows, validation windows, report), as they lie on disk."""

    def make(*names, tokenizer=None, **options):
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        folder.mkdir()
        told = {"context": C, "tokens": 10**9, "validation_tokens": 3 * C, "vocab_size": VOCAB_SIZE} | options
        found = pack(tokenizer or tiny_tokenizer(), list(names), folder, **told)
        assert Packed.kept(folder) == found
        read = [np.fromfile(path, "<u4").reshape(-1, C) for path in (found.train, found.validation)]
        return (*(part.tolist() for part in read), found.report)

    return make


def ids_of(text):
    return tiny_tokenizer()(text, add_special_tokens=False)["input_ids"]


def cut(ids, width=C):
    return [ids[start : start + width] for start in range(0, len(ids) - width + 1, width)]


# What is packed


@pytest.mark.parametrize("skip", [0, 21])
def test_windows_are_those_of_the_whole_text(write, packed, skip):
    path = write(LINES)
    train, validation, report = packed(path, reserved={path: Reserved(stop=skip)})
    windows = cut(ids_of(LINES)[skip:])
    assert validation == windows[:3]
    assert train == windows[3:]
    assert report == [
        {
            "text": "text.txt",
            "sha256": sha256(Path(path)),
            "read_as": {"kind": "plain text"},
            "left_out": [0, skip],
            "validation_tokens": 3 * C,
            "tokens": len(train) * C,
        }
    ]


def test_documents_are_joined_by_a_blank_line(write, packed):
    texts = [*RAVEN.split("\n\n"), LINES]
    train, validation, _ = packed(write(texts, "a.jsonl"))
    assert validation + train == cut(ids_of(JOIN.join(texts)))


def test_a_plain_text_is_joined_by_nothing(write, packed, monkeypatch):
    monkeypatch.setattr(documents_module, "PIECE", 40)
    train, validation, _ = packed(write(LINES))
    assert validation + train == cut(ids_of(LINES))


@pytest.mark.parametrize("characters", [1, 37, 500])
def test_a_long_text_is_tokenized_a_piece_at_a_time(write, packed, monkeypatch, characters):
    """Windows go on over the borders of pieces, and no token is lost there."""
    monkeypatch.setattr(documents_module, "CHARACTERS", characters)
    monkeypatch.setattr(packing, "BLOCK", 5)
    monkeypatch.setattr(documents_module, "PIECE", 1)
    calls = []

    class Watched:
        bos_token_id = None

        def __call__(self, text, **options):
            calls.append(text)
            return tiny_tokenizer()(text, **options)

    train, validation, _ = packed(write(LINES), tokenizer=Watched())
    assert validation + train == cut(ids_of(LINES))
    assert "".join(calls) == LINES
    assert len(calls) > 2
    assert max(map(len, calls)) < characters + 30
    assert all(len(text) >= characters for text in calls[:-1])


def test_no_more_of_a_text_is_read_than_is_wanted(monkeypatch, packed):
    taken = []

    def rows():
        for number in range(10**6):
            taken.append(number)
            yield {"text": f"{number} nevermore"}

    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows())
    monkeypatch.setattr(documents_module, "CHARACTERS", 100)
    train, validation, report = packed("some/data", tokens=20 * C)
    assert (len(train), len(validation)) == (20, 3)
    assert len(taken) < 200
    assert report[0]["text"] == "some/data"
    assert len(report[0]["sha256"]) == 64


def test_a_datasets_hash_is_that_of_what_was_read(monkeypatch, packed):
    hashes = []
    for word in ("nevermore", "nevermore", "evermore"):
        rows = [{"text": f"{number} {word}"} for number in range(99)]
        monkeypatch.setattr("datasets.load_dataset", lambda *_, rows=rows, **__: iter(rows))
        hashes.append(packed("some/data")[2][0]["sha256"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_long_text_is_packed_in_little_memory(write, tmp_path):
    path = write(("nevermore " * 27 + "\n") * 40_000)  # 11 MB
    (tmp_path / "run").mkdir()

    class Letters:
        """A tokenizer that takes no time."""

        bos_token_id = None

        def __call__(self, text, **_):
            return {"input_ids": np.frombuffer(text.encode("latin-1"), np.uint8)}

    told = {"context": C, "tokens": 10**9, "validation_tokens": C, "vocab_size": VOCAB_SIZE}
    tracemalloc.start()
    found = pack(Letters(), [path], tmp_path / "run", **told)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.train.stat().st_size > 43_000_000
    assert peak < 20_000_000


def test_no_validation_window_was_fitted_on(write, packed):
    """Those fitted on are trained on last, and only where the rest is too short."""
    path, windows = write(LINES), cut(ids_of(LINES))
    reserved = {path: Reserved(start=0, stop=2 * C, fitted=12 * C)}
    train, validation, report = packed(path, tokens=20 * C, reserved=reserved)
    assert validation == windows[12:15]
    assert train == windows[15:35]
    train, validation, report = packed(path, reserved=reserved)
    assert validation == windows[12:15]
    assert train == windows[15:] + windows[2:12]
    assert report[0]["left_out"] == [0, 2 * C]


def test_measured_on_behind_what_was_fitted(write, packed):
    path, windows = write(LINES), cut(ids_of(LINES))
    reserved = {path: Reserved(start=4 * C, stop=6 * C, fitted=4 * C)}
    train, validation, report = packed(path, reserved=reserved)
    assert validation == windows[6:9]
    assert train == windows[9:] + windows[:4]
    assert report[0]["left_out"] == [4 * C, 6 * C]


def test_a_text_that_was_all_fitted_on_is_validated_on_its_end(write, packed):
    path, windows = write(LINES), cut(ids_of(LINES))
    train, validation, _ = packed(path, reserved={path: Reserved(fitted=10**6)}, validation_tokens=3 * C)
    assert validation == windows[:-4:-1]
    assert sorted(train + validation) == sorted(windows)


# Several texts


def test_texts_share_evenly(write, packed):
    texts = [LINES, LINES.upper(), LINES.swapcase()]
    names = [write(text, f"{number}.txt") for number, text in enumerate(texts)]
    train, validation, report = packed(*names, tokens=30 * C + 5, validation_tokens=6 * C)
    windows = [cut(ids_of(text)) for text in texts]
    assert validation == [window for own in windows for window in own[:2]]
    assert train == [window for own in windows for window in own[2:12]]
    assert [entry["tokens"] for entry in report] == [10 * C] * 3
    assert [entry["validation_tokens"] for entry in report] == [2 * C] * 3
    assert [entry["text"] for entry in report] == ["0.txt", "1.txt", "2.txt"]


def test_only_the_text_that_is_evaluated_on_is_skipped(write, packed):
    names = [write(LINES, "0.txt"), write(LINES.upper(), "1.txt")]
    _, validation, report = packed(
        *names, tokens=40 * C, validation_tokens=2 * C, reserved={names[1]: Reserved(stop=19)}
    )
    assert validation == [ids_of(LINES)[:C], ids_of(LINES.upper())[19 : 19 + C]]
    assert [entry["left_out"] for entry in report] == [[0, 0], [0, 19]]


def test_each_text_gives_at_least_one_window_to_both(write, packed):
    names = [write(LINES, f"{number}.txt") for number in range(3)]
    train, validation, _ = packed(*names, tokens=C, validation_tokens=1)
    assert (len(train), len(validation)) == (3, 3)


def test_of_a_short_text_an_eighth_is_for_validation(write, packed):
    ids = ids_of(LINES)
    short = tiny_tokenizer().decode(ids[: 24 * C + 3])
    train, validation, _ = packed(write(short), validation_tokens=10**6)
    assert (len(validation), len(train)) == (3, 21)
    assert validation + train == cut(ids_of(short))


def test_progress_counts_the_texts(write, packed):
    calls, names = [], [write(LINES, "a.txt"), write(LINES, "b.txt")]
    packed(*names, tokens=20 * C, progress=lambda *call: calls.append(call))
    assert calls == [(1, 2, f"160 tokens of {names[0]}"), (2, 2, f"160 tokens of {names[1]}")]


# BOS


def test_every_window_starts_with_bos_where_the_tokenizer_adds_it(write, packed):
    train, validation, report = packed(write(LINES), tokenizer=bos_tokenizer(), tokens=50 * C)
    windows = cut(ids_of(LINES), C - 1)
    assert validation == [[0, *window] for window in windows[:3]]
    assert train == [[0, *window] for window in windows[3:53]]
    assert report[0]["tokens"] == 50 * C


# What cannot be packed


def test_a_text_that_is_too_short_says_what_helps(write, packed):
    word = tiny_tokenizer().decode(ids_of(LINES)[: 2 * C - 1])
    count = len(ids_of(word))
    path = write(word)
    with pytest.raises(TextError) as caught:
        packed(path)
    assert str(caught.value) == (
        f"{path} has {count} tokens, fewer than the two windows of 16 that training and validation need; give more "
        "text or a smaller --context"
    )
    with pytest.raises(TextError) as caught:
        packed(path, reserved={path: Reserved(stop=7)})
    assert str(caught.value) == (
        f"{path} has {count} tokens; less 7, which are kept for evaluation, that is fewer than the two "
        "windows of 16 that training and validation need; give more text, an --eval-text, fewer --eval-tokens or a "
        "smaller --context"
    )
    packed(write(tiny_tokenizer().decode(ids_of(LINES)[: 2 * C]), "enough.txt"))
    with pytest.raises(TextError, match="fewer than the two windows of 15"):
        packed(write("nevermore", "bos.txt"), tokenizer=bos_tokenizer())
    with pytest.raises(TextError, match="has 0 tokens"):
        packed(write("", "empty.txt"))


def test_an_unfinished_packing_does_not_count(write, tmp_path):
    (tmp_path / "run").mkdir()
    names = [write(LINES), write("short", "short.txt")]
    with pytest.raises(TextError):
        pack(
            tiny_tokenizer(), names, tmp_path / "run", context=C, tokens=999, validation_tokens=C, vocab_size=VOCAB_SIZE
        )
    assert Packed.kept(tmp_path / "run") is None


def test_a_packing_that_was_damaged_is_made_again_and_must_come_to_the_same(write, tmp_path):
    (tmp_path / "run").mkdir()
    told = dict(context=C, tokens=10**9, validation_tokens=C, vocab_size=VOCAB_SIZE)
    path = write(LINES)
    found = pack(tiny_tokenizer(), [path], tmp_path / "run", **told)
    before = found.train.read_bytes()
    for damaged in (b"", before[:-1] + b"x"):
        found.train.write_bytes(damaged)
        assert Packed.kept(tmp_path / "run") is None
        assert pack(tiny_tokenizer(), [path], tmp_path / "run", **told) == Packed.kept(tmp_path / "run") == found
        assert found.train.read_bytes() == before
    record = read_record(tmp_path / "run/data.json")
    write_record(tmp_path / "run/data.json", {**record, "spans": {"as": "another version sketched them"}})
    assert pack(tiny_tokenizer(), [path], tmp_path / "run", **told) == found
    write(LINES[::-1])
    with pytest.raises(QectomyError, match=r"text.txt: packed again, this is not the text that the run in .*run began"):
        pack(tiny_tokenizer(), [path], tmp_path / "run", **told)
    assert Packed.kept(tmp_path / "run") is None


def test_token_ids_beyond_the_embedding(write, packed):
    largest = max(ids_of(LINES))
    path = write(LINES)
    assert max(map(max, packed(path, vocab_size=largest + 1)[0])) == largest
    with pytest.raises(
        CheckpointError, match=rf"token id \d+, but the model's embedding has {largest} rows; tokenizer"
    ):
        packed(path, vocab_size=largest)


# Reading


def test_windows_are_read_by_number(tmp_path):
    path = tmp_path / "windows.bin"
    np.arange(6 * C, dtype="<u4").tofile(path)
    windows = PackedWindows(path, C)
    assert len(windows) == windows.stored == 6
    for number in (5, 0, 3):
        found = windows[number]["input_ids"]
        assert found.dtype == torch.int64
        assert found.tolist() == list(range(number * C, number * C + C))
    order = Shuffled(6, 3)
    shuffled = PackedWindows(path, C, order, 40)
    assert len(shuffled) == 40
    assert [int(shuffled[i]["input_ids"][0]) // C for i in range(40)] == [order[i] for i in range(40)]


def test_every_reading_is_a_permutation_of_its_own():
    order = [Shuffled(50, 7)[i] for i in range(150)]
    readings = [order[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(reading) == list(range(50)) for reading in readings)
    assert len({tuple(reading) for reading in [*readings, range(50)]}) == 4
    assert [Shuffled(50, 8)[i] for i in range(50)] != readings[0]


def test_the_order_does_not_hang_on_the_way_it_is_asked_for():
    """A run that is resumed begins in the middle, in a new process."""
    order = Shuffled(50, 7)
    whole = [order[i] for i in range(150)]
    assert [order[i] for i in (149, 3, 77, 3)] == [whole[i] for i in (149, 3, 77, 3)]
    fresh = Shuffled(50, 7)
    assert [fresh[i] for i in range(90, 150)] == whole[90:]


@pytest.mark.parametrize("fitted", [0, 10**6])
def test_what_is_trained_on_is_compared_with_the_measured_text(write, tmp_path, fitted):
    """The validation windows, which only choose the best step, are told apart; a run that goes on knows it all.

    So it is where all of the text was fitted on, which is packed from its end.
    """
    dice = np.random.default_rng(0)
    words = ["".join(dice.choice(list("abcdefghij"), 3)) for _ in range(1200)]
    path, options = (
        write(" ".join(words)),
        dict(context=C, tokens=10**9, validation_tokens=3 * C, vocab_size=VOCAB_SIZE),
    )
    measured = {
        "trained on": words[300:900],
        "validated on": words[-48:-8] if fitted else words[:40],
        "other": words[::-1],
    }
    options["validation_tokens"], shares, validated = 12 * C, {}, {}
    for name, part in measured.items():
        folder = tmp_path / name
        folder.mkdir()
        seen = FittedSpans(" ".join(part), Sketch())
        found = pack(tiny_tokenizer(), [path], folder, **options, reserved={path: Reserved(fitted=fitted)}, spans=seen)
        assert Packed.kept(folder).spans == found.spans
        shares[name] = found.spans["overlap"]["share"]
        validated[name] = found.spans["overlap"]["validation_share"]
    assert shares["trained on"] > 0.9
    assert validated["validated on"] > 0.9
    assert shares["validated on"] == shares["other"] == validated["trained on"] == validated["other"] == 0
    write_record(folder / "data.json", {"texts": [], "files": found.digests()})  # as before spans were looked for
    assert Packed.kept(folder).spans == {}
