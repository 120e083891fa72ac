"""Compressed texts are read as what they hold, by content, and damaged or hostile ones are refused."""

import gzip
import hashlib
import json
import struct

import pyarrow
import pytest

from qectomy.errors import TextError
from qectomy.text import text_bytes
from qectomy.text.documents import JOIN, Documents
from qectomy.text.text import read_source

LINES = "".join(f"line {i} — nevermore\n" for i in range(5000))
RECORDS = "".join(json.dumps({"text": f"record {i}"}) + "\n" for i in range(500))


def zstd(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.json.zst", "a"])
def test_a_compressed_text_is_read_as_what_it_holds(write, pack, name):
    for content, text in ((LINES, LINES), (RECORDS, JOIN.join(f"record {i}" for i in range(500)))):
        data = pack(content.encode())
        for packed in (data, pack(content[:50].encode()) + pack(content[50:].encode())):  # as concatenated files are
            path = write(packed, name)
            found = read_source(path)
            assert found.text == text
            assert found.sha256 == hashlib.sha256(packed).hexdigest()
            assert Documents(path).sha256 == found.sha256


def skippable(content, kind=0):
    """A frame that decoders pass over (RFC 8878, section 3.1.2): its number, its size, what it holds."""
    return struct.pack("<II", 0x184D2A50 + kind, len(content)) + content


@pytest.mark.parametrize("kind", [0, 15])
@pytest.mark.parametrize("content", [b"", b"an index", b"x" * 300_000])
def test_frames_that_are_to_be_skipped(write, kind, content):
    skipped, halves = skippable(content, kind), (LINES[:700], LINES[700:])
    parts = [zstd(half.encode()) for half in halves]
    for packed in (skipped + parts[0] + parts[1], parts[0] + skipped + parts[1], parts[0] + parts[1] + skipped):
        assert read_source(write(packed, "a.zst")).text == LINES
    assert read_source(write(skipped * 3 + parts[0] + skipped + parts[1] + skipped, "a.zst")).text == LINES


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_a_damaged_compressed_text(write, pack):
    data = pack(LINES.encode())
    middle = len(data) // 2
    changed = data[:middle] + bytes([data[middle] ^ 255]) * 40 + data[middle + 40 :]
    for damaged in (data[:-5], data[:middle], *([changed] if pack is gzip.compress else [])):  # zstd has no checksum
        with pytest.raises(TextError, match=r"a\.gz (cannot be unpacked: |is not UTF-8)") as caught:
            read_source(write(damaged, "a.gz"))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
def test_what_unfolds_without_end_is_given_up(write, pack, monkeypatch):
    monkeypatch.setattr(text_bytes, "FREE_BYTES", 1 << 20)
    read = []
    plain = text_bytes._Unpacked.readinto
    monkeypatch.setattr(text_bytes._Unpacked, "readinto", lambda self, into: read.append(1) or plain(self, into))
    path = write(pack(b"nevermore\n" * 10**7), "a.gz")
    with pytest.raises(TextError, match=r"a\.gz unfolds to more than 200 times its size"):
        read_source(path)
    assert len(read) < 200
