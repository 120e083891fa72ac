"""The bytes of a text file: hashed as they are read, unpacked where they are compressed, decoded piece by piece."""

import codecs
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qectomy.errors import TextError, reason_of

BYTES_A_READ = 1 << 18
GZIP = b"\x1f\x8b"  # the first bytes
ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # of a frame, or of one to be skipped (RFC 8878, 3.1)
MAX_TIMES = 200  # longer than the compressed file: no text is, ...
FREE_BYTES = 1 << 26  # ... but a short one over and over may be
KINDS = "a text file, JSON or .parquet, a folder that save_to_disk of `datasets` wrote, or a dataset's name"


class Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read. Raises TextError for what is no file that ends."""

    def __init__(self, path: Path):
        check_ends(path)
        if path.is_dir():
            raise TextError(f"{path} is a folder; give {KINDS}")
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror}") from error
        self.digest, self.count = hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        self.count += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def check_ends(path: Path) -> None:
    """Raise TextError for a device: a file ends, and so does a pipe."""
    if path.is_char_device() or path.is_block_device():
        raise TextError(f"{path} is a device, not a text")


def peeked(path: Path, file: Any) -> bytes:
    """Return the first four bytes of a file, and leave them to be read."""
    try:
        return file.peek(4)[:4]
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error


class _Unpacked(io.RawIOBase):
    """What a compressed file holds. Raises TextError where it is damaged, or unfolds to what no text does."""

    def __init__(self, path: Path, packed: Hashed, stream: Any):
        self._path, self._packed, self._stream, self._count = path, packed, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        from pyarrow import ArrowException

        try:
            data = self._stream.read(len(buffer))
        except (OSError, EOFError, zlib.error, ArrowException) as error:
            raise TextError(f"{self._path} cannot be unpacked: {reason_of(error)}") from error
        self._count += len(data)
        if self._count > FREE_BYTES and self._count > MAX_TIMES * self._packed.count:
            raise TextError(f"{self._path} unfolds to more than {MAX_TIMES} times its size, as no text does")
        buffer[: len(data)] = data
        return len(data)


def unpacked(path: Path, raw: Hashed, file: Any) -> io.BufferedReader:
    """Return a file as it is, or what it holds where it is gzip's or zstandard's, by its first bytes."""
    head = peeked(path, file)
    if head[:2] == GZIP:
        return io.BufferedReader(_Unpacked(path, raw, gzip.GzipFile(fileobj=file)), BYTES_A_READ)
    if ZSTD.match(head):
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
        return io.BufferedReader(_Unpacked(path, raw, stream), BYTES_A_READ)
    return file


def decoded(path: Path, file: io.BufferedIOBase) -> Iterator[str]:
    """Yield an opened UTF-8 file in pieces, without the mark that it may begin with."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    while True:
        try:
            data = file.read(BYTES_A_READ)
            pending = len(decoder.getstate()[0])
            piece = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            place = done - pending + error.start
            raise TextError(f"{path} is not UTF-8 text (byte {place} does not decode)") from error
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror}") from error
        yield piece.removeprefix("\ufeff") if done == 0 else piece
        done += len(data)
        if not data:
            return
