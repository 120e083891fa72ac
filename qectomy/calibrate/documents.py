"""The documents of a text, one at a time, so that a text of any length is read in the memory of one of them."""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qectomy.errors import TextError, reason_of, shown

FILE_ENDINGS = (".txt", ".jsonl", ".ndjson", ".json", ".md", ".parquet")  # of a name mistyped, not of a dataset's
TEXT_FIELDS = ("text", "page", "content", "document")
MAX_LINE = 1 << 28  # bytes; text8, all of it one line, has 10^8
PIECE = 1 << 20  # characters of a plain text that are taken as one document, up to the next end of a line


def documents(name: str) -> Iterator[str]:
    """Yield the documents of a text file, a .jsonl or .parquet file, or a dataset, in their order.

    A plain text comes in pieces that end with a line and are to be joined by nothing; documents of the other kinds are
    joined by a blank line. Raises TextError naming what cannot be read.
    """
    path = Path(name)
    if not os.path.exists(name):  # unlike Path's own, false for a name too long to be one
        yield from dataset_documents(name)
    elif path.suffix in (".jsonl", ".ndjson"):
        with _opened(path) as file:
            yield from jsonl_documents(path, _decoded(path, file))
    elif path.suffix == ".parquet":
        yield from parquet_documents(path)
    else:
        with _opened(path) as file:
            yield from grouped(_decoded(path, file), PIECE)


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


def is_plain(name: str) -> bool:
    """Whether a text is one document, that `documents` cuts into pieces."""
    return os.path.exists(name) and Path(name).suffix not in (".jsonl", ".ndjson", ".parquet")


def jsonl_documents(path: Path, lines: Iterable[str]) -> Iterator[str]:
    """Yield the text of each line's record."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{path}, line {number}: not JSON ({error})") from error
        field = next((f for f in TEXT_FIELDS if isinstance(record, dict) and isinstance(record.get(f), str)), None)
        if field is None:
            raise TextError(f"{path}, line {number}: no text in any of the fields {', '.join(TEXT_FIELDS)}")
        try:
            record[field].encode()
        except UnicodeEncodeError as error:
            raise TextError(f"{path}, line {number}: half of a surrogate pair, which is no character") from error
        yield record[field]


def parquet_documents(path: Path) -> Iterator[str]:
    """Yield the text column of a parquet file, some rows in memory at a time."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            field = _text_field(str(path), file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                yield from (entry for entry in batch.column(0).to_pylist() if isinstance(entry, str))
    except (ArrowException, OSError, ValueError, KeyError, IndexError, RecursionError) as error:
        raise TextError(f"{path} cannot be read: {reason_of(error)}") from error


def dataset_documents(name: str) -> Iterator[str]:
    """Yield a dataset's text, streamed: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (split `train` by default)."""
    if name.endswith(FILE_ENDINGS):
        raise TextError(f"no file {name!r}, and no dataset of that name could be read: its ending is a file's")
    repo, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    field = None
    try:
        from datasets import load_dataset

        for row in load_dataset(repo, config or None, split=split or "train", streaming=True):
            field = field or _text_field(f"dataset {name!r}", list(row))
            if isinstance(row[field], str):
                yield row[field]
    except TextError:
        raise
    except Exception as error:  # no such file, no such dataset, no network: one message covers them
        raise TextError(f"no file {name!r}, and no dataset of that name could be read: {reason_of(error)}") from error


def _text_field(what: str, columns: list[str]) -> str:
    field = next((f for f in TEXT_FIELDS if f in columns), None)
    if field is None:
        raise TextError(f"{what} has no column {', '.join(TEXT_FIELDS)}; it has {shown(columns)}")
    return field


def _opened(path: Path) -> Any:
    check_ends(path)
    if path.is_dir():
        raise TextError(f"{path} is a folder; give a text file, a .jsonl or .parquet file or a dataset's name")
    try:
        return path.open("rb")
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error


def check_ends(path: Path) -> None:
    """Raise TextError for a device: a file ends, and so does a pipe."""
    if path.is_char_device() or path.is_block_device():
        raise TextError(f"{path} is a device, not a text")


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield the lines of an opened UTF-8 file; no byte of a longer character is a line's end, so lines decode alone."""
    done = 0
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise TextError(f"{path} has a line of more than {MAX_LINE:,} bytes; break it, or give another text")
        mark = len(codecs.BOM_UTF8) if done == 0 and line.startswith(codecs.BOM_UTF8) else 0
        try:
            yield line[mark:].decode()
        except UnicodeDecodeError as error:
            raise TextError(f"{path} is not UTF-8 text (byte {done + mark + error.start} does not decode)") from error
        done += len(line)
