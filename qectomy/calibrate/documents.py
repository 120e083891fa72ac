"""The documents of a text, one at a time, so that a text of any length is read in the memory of one of them."""

import codecs
import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qectomy.calibrate.records import Placed, Texts, json_records, lines_of, looks_like, text_field
from qectomy.errors import TextError, note, reason_of, shown

JOIN = "\n\n"
FILE_ENDINGS = (".txt", ".jsonl", ".ndjson", ".json", ".md", ".parquet")  # of a name mistyped, not of a dataset's
PIECE = 1 << 20  # characters of a plain text that are taken as one document, up to the next end of a line
BYTES_A_READ = 1 << 18
ROWS_A_READ = 256
PARQUET = b"PAR1"  # its first bytes
PLAIN = "plain text"
KINDS = "a text file, a .jsonl or .parquet file or a dataset's name"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records are read. `field`: the one with the text; None: `text`, else what `records.text_field` finds."""

    field: str | None = None


class Documents:
    """The documents of a text file, plain, JSON or parquet by its content, or of a dataset, in their order, once.

    A plain text comes in pieces that end with a line; `join` is what stands between two documents. It and `read_as`,
    what a report says of it, are known from the first document on. Raises TextError naming what cannot be read.
    """

    def __init__(self, name: str, reading: Reading | None = None):
        self.name, self._path, self._reading = name, Path(name), reading or Reading()
        self.is_file = os.path.exists(name)  # unlike Path's own, false for a name too long to be one
        self.read_as: dict[str, Any] = {}
        self._digest, self._at_end = hashlib.sha256(), False

    @property
    def join(self) -> str:
        return "" if self.read_as.get("kind") == PLAIN else JOIN

    @property
    def sha256(self) -> str:
        """Of a file's bytes; of a dataset, of the text that was read, joined."""
        if self.is_file and not self._at_end:
            with _Hashed(self._path) as raw, io.BufferedReader(raw, BYTES_A_READ) as file:
                while file.read(BYTES_A_READ):
                    pass
                self._digest, self._at_end = raw.digest, True
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        if not self.is_file:
            for number, document in enumerate(self._dataset()):
                self._digest.update(((JOIN if number else "") + document).encode())
                yield document
        elif self._path.suffix == ".parquet":
            yield from self._parquet()
        else:
            yield from self._file()

    def _file(self) -> Iterator[str]:
        """Yield the documents of a file that is known by its content."""
        with _Hashed(self._path) as raw, io.BufferedReader(raw, BYTES_A_READ) as file:
            if _peeked(self._path, file) == PARQUET:
                yield from self._parquet()
                return
            kind, records, pieces = json_records(self._path, _decoded(self._path, file))
            if kind is not None:
                yield from self._texts(kind, str(self._path), records)
            else:
                yield from self._plain(pieces)
            self._digest, self._at_end = raw.digest, True

    def _texts(self, kind: str, what: str, records: Placed, field: str | None = None) -> Iterator[str]:
        """Yield the texts of records, each given with its place in the whole."""
        texts = Texts(what, field or self._reading.field)
        for place, record in records:
            if (text := texts.of(record, place)) is not None:
                self.read_as = {"kind": kind, "records": texts.records}
                self.read_as |= {} if texts.field is None else {"field": texts.field}
                yield text

    def _plain(self, pieces: Iterator[str]) -> Iterator[str]:
        self.read_as = {"kind": PLAIN}
        head = next(pieces, "")
        if likely := looks_like(self._path, head):
            note(
                f"{self._path} looks like {likely} and is read as prose, with all its marks; as records are read JSON "
                "objects, one a line, a JSON list of them, and .parquet files"
            )
        if self._reading.field is not None:
            note(f"{self._path} is plain text: --field {self._reading.field} does not concern it")
        yield from grouped(lines_of(self._path, chain([head], pieces)), PIECE)

    def _parquet(self) -> Iterator[str]:
        """Yield the text column of a parquet file, some rows in memory at a time."""
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        try:
            with ParquetFile(self._path) as file:
                field = _column(str(self._path), file.schema_arrow, self._reading.field)
                batches = file.iter_batches(batch_size=ROWS_A_READ, columns=[field] if field else [])
                yield from self._texts("parquet", str(self._path), _rows(batches, field), field)
        except (ArrowException, OSError, ValueError, KeyError, IndexError, RecursionError) as error:
            raise TextError(f"{self._path} cannot be read: {reason_of(error)}") from error

    def _dataset(self) -> Iterator[str]:
        """Yield a dataset's text, streamed: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (split `train` by default)."""
        name = self.name
        if name.endswith(FILE_ENDINGS):
            raise TextError(f"no file {name!r}, and no dataset of that name could be read: its ending is a file's")
        repo, _, rest = name.partition(":")
        config, _, split = rest.partition(":")
        try:
            from datasets import load_dataset

            rows = load_dataset(repo, config or None, split=split or "train", streaming=True)
            yield from self._texts("dataset", f"dataset {name!r}", (("", row) for row in rows))
        except TextError:
            raise
        except Exception as error:  # no such file, no such dataset, no network: one message covers them
            raise TextError(
                f"no file {name!r}, and no dataset of that name could be read: {reason_of(error)}"
            ) from error


def grouped(pieces: Iterable[str], characters: int) -> Iterator[str]:
    """Join short strings to some of `characters` or more, and a last one of what is left."""
    held: list[str] = []
    length = 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length >= characters:
            yield "".join(held)
            held, length = [], 0
    if held:
        yield "".join(held)


def _column(what: str, schema: Any, field: str | None) -> str | None:
    """Return the column of a table that holds its text; None where all of it is null."""
    if field is None:
        return text_field({column.name: _stand_in(column.type) for column in schema}, what)
    if field not in schema.names:
        raise TextError(f"{what} has no column {shown(field)}, which --field names; it has {shown(schema.names)}")
    return field


def _stand_in(kind: Any) -> Any:
    """A value such as a column of this type holds, as far as that says whether it is text."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return "" if types.is_string(kind) or types.is_large_string(kind) else None if types.is_null(kind) else ...


def _rows(batches: Iterable[Any], field: str | None) -> Placed:
    number = 0
    for batch in batches if field else ():
        for value in batch.column(0).to_pylist():
            number += 1
            yield f", row {number}", {field: value}


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed as they are read. Raises TextError for what is no file that ends."""

    def __init__(self, path: Path):
        check_ends(path)
        if path.is_dir():
            raise TextError(f"{path} is a folder; give {KINDS}")
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise TextError(f"{path} cannot be read: {error.strerror}") from error
        self.digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer) or 0
        self.digest.update(memoryview(buffer)[:count])
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def check_ends(path: Path) -> None:
    """Raise TextError for a device: a file ends, and so does a pipe."""
    if path.is_char_device() or path.is_block_device():
        raise TextError(f"{path} is a device, not a text")


def _peeked(path: Path, file: Any) -> bytes:
    """Return the first four bytes of a file, and leave them to be read."""
    try:
        return file.peek(4)[:4]
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(path: Path, file: io.BufferedIOBase) -> Iterator[str]:
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
