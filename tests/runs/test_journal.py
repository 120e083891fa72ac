"""The journal: what was added is there again, and what was torn or changed ends what counts."""

import hashlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qectomy.runs.journal import Journal

STEPS = [{"n": 1, "text": "naïve\n"}, {"n": 2, "numbers": [0.1, 1e-300, -3]}, {"n": 3, "deep": {"a": {"b": None}}}]


@pytest.fixture
def written(tmp_path):
    journal = Journal(tmp_path / "journal")
    for step in STEPS:
        journal.append(**step)
    return journal.path


def entries(path, data):
    path.write_bytes(data)
    return Journal(path).entries


def test_what_was_added_is_there_again(written, tmp_path):
    assert Journal(written).entries == STEPS
    assert Journal(tmp_path / "none").entries == []


def test_it_is_torn_at_every_byte(written):
    data = written.read_bytes()
    lines = data.splitlines(keepends=True)
    ends = [sum(map(len, lines[:count])) for count in range(4)]
    for length in range(len(data)):
        whole = STEPS[: sum(end <= length for end in ends[1:])]
        for tail in (b"", bytes(1), bytes(4096), b"\r", b"\n" if length + 1 not in ends else b""):
            assert entries(written, data[:length] + tail) == whole, (length, tail)


@given(where=st.integers(0, 10_000), mask=st.integers(1, 255))
def test_a_changed_byte_ends_it_there(tmp_path_factory, where, mask):
    path = tmp_path_factory.mktemp("journal") / "journal"
    journal = Journal(path)
    for step in STEPS:
        journal.append(**step)
    data = bytearray(path.read_bytes())
    where %= len(data)
    data[where] ^= mask
    assert entries(path, bytes(data)) == STEPS[: path.read_bytes()[:where].count(b"\n")]


def test_lines_count_in_their_order_alone(written):
    a, b, c = written.read_bytes().splitlines(keepends=True)
    assert entries(written, b + c) == []
    assert entries(written, a + c) == STEPS[:1]
    assert entries(written, a + a + b) == STEPS[:1]
    assert entries(written, a + b + c + c) == STEPS


def test_after_a_torn_line_it_goes_on_with_a_whole_one(written):
    os.truncate(written, written.stat().st_size - 7)
    journal = Journal(written)
    journal.append(**STEPS[2])
    assert Journal(written).entries == STEPS == journal.entries


def test_steps_can_be_cut(written):
    journal = Journal(written)
    journal.cut(1)
    assert journal.entries == STEPS[:1]
    journal.append(n=9)
    assert Journal(written).entries == [STEPS[0], {"n": 9}] == journal.entries
    journal.cut(0)
    journal.append(n=8)
    assert Journal(written).entries == [{"n": 8}]


def test_a_line_is_on_the_disk_when_append_returns(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def sync(descriptor):
        synced.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_size))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    journal = Journal(tmp_path / "journal")
    journal.append(n=1)
    size = journal.path.stat().st_size
    journal.append(n=2)
    names = [name for name, _ in synced]
    assert names == ["journal", tmp_path.name, "journal"]  # the new file's name too, once
    assert [synced[0][1], synced[2][1]] == [size, journal.path.stat().st_size]


@pytest.mark.parametrize("text", [b"[1]", b"{", b"null", b"[" * 100_000])
def test_a_line_with_a_right_digest_and_no_object(text, tmp_path):
    line = hashlib.sha256(b" " + text).hexdigest().encode() + b" " + text + b"\n"
    assert entries(tmp_path / "journal", line) == []
