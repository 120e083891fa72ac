"""The documents of a text, one at a time, so that a text of any length is read in the memory of one of them."""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from qectomy.errors import TextError, nearest, note, reason_of
from qectomy.text.columns import parquet_rows, saved_files, saved_rows
from qectomy.text.records import Placed, Texts, json_records, lines_of, looks_like
from qectomy.text.text_bytes import BYTES_A_READ, Hashed, decoded, peeked, unpacked

CONTEXT = 512  # tokens a window, where the model was made for as many
MIN_CONTEXT = 16
JOIN = "\n\n"
# Of a name mistyped, not of a dataset's.
FILE_ENDINGS = (".txt", ".jsonl", ".ndjson", ".json", ".md", ".parquet", ".gz", ".zst", ".csv", ".html")
PIECE = 1 << 20  # characters of a plain text that are taken as one document, up to the next end of a line
CHARACTERS = 1 << 18  # of any text that are tokenized at a time, where it is not tokenized whole
PARQUET = b"PAR1"  # its first bytes
PLAIN = "plain text"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How records are read. `field`: the one with the text; None: what `records.text_field` finds."""

    field: str | None = None
    tokenizer: Callable[[], Any] | None = None  # the one whose chat template writes chats as text


class Documents:
    """The documents of a text file, plain, JSON or parquet by its content, or of a dataset, in order, once.

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
        """Of a file's bytes, or a saved dataset's; of a dataset elsewhere, of the text that was read, joined."""
        if self._path.is_dir():
            return hashlib.sha256("".join(map(_sha256, saved_files(self._path))).encode()).hexdigest()
        if self.is_file and not self._at_end:
            return _sha256(self._path)
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[str]:
        field = self._reading.field
        if not self.is_file:
            for number, document in enumerate(self._dataset()):
                self._digest.update(((JOIN if number else "") + document).encode())
                yield document
        elif self._path.is_dir():
            with saved_rows(self._path, field) as (column, rows):
                yield from self._texts("saved dataset", str(self._path), rows, column)
        elif self._path.suffix == ".parquet":
            yield from self._parquet()
        else:
            yield from self._file()

    def pieces(self) -> Iterator[str]:
        """Yield the whole text in pieces of some CHARACTERS or more, to be joined by nothing."""
        yield from grouped(((self.join if i else "") + document for i, document in enumerate(self)), CHARACTERS)

    def _file(self) -> Iterator[str]:
        """Yield the documents of a file that is known by its content."""
        with Hashed(self._path) as raw, io.BufferedReader(raw, BYTES_A_READ) as file:
            if peeked(self._path, file) == PARQUET:
                yield from self._parquet()
                return
            kind, records, pieces = json_records(self._path, decoded(self._path, unpacked(self._path, raw, file)))
            if kind is not None:
                yield from self._texts(kind, str(self._path), records)
            else:
                yield from self._plain(pieces)
            self._digest, self._at_end = raw.digest, True

    def _parquet(self) -> Iterator[str]:
        with parquet_rows(self._path, self._reading.field) as (column, rows):
            yield from self._texts("parquet", str(self._path), rows, column)

    def _texts(self, kind: str, what: str, records: Placed, field: str | None = None) -> Iterator[str]:
        """Yield the texts of records, each given with its place in the whole."""
        texts = Texts(what, field or self._reading.field, self._reading.tokenizer)
        for place, record in records:
            if (text := texts.of(record, place)) is not None:
                self.read_as = {"kind": kind, "records": texts.records, **texts.read_as}
                yield text
        texts.at_end()

    def _plain(self, pieces: Iterator[str]) -> Iterator[str]:
        self.read_as = {"kind": PLAIN}
        head = next(pieces, "")
        if likely := looks_like(self._path, head):
            self.read_as["looks_like"] = likely
            note(
                f"{self._path} looks like {likely} and is read as prose, with all its marks; as records are read JSON "
                "objects, one a line, a JSON list of them, and .parquet files"
            )
        if self._reading.field is not None:
            note(f"{self._path} is plain text: --field {self._reading.field} does not concern it")
        yield from grouped(lines_of(self._path, chain([head], pieces)), PIECE)

    def _dataset(self) -> Iterator[str]:
        """Yield a dataset's text, streamed: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT (split `train` by default)."""
        name = self.name
        check_not_mistyped(name)
        repo, _, rest = name.partition(":")
        config, _, split = rest.partition(":")
        try:
            from datasets import load_dataset

            rows = load_dataset(repo, config or None, split=split or "train", streaming=True)
            yield from self._texts(
                "dataset", f"dataset {name!r}", ((f", row {i}", row) for i, row in enumerate(rows, 1))
            )
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


def _sha256(path: Path) -> str:
    with Hashed(path) as raw, io.BufferedReader(raw, BYTES_A_READ) as file:
        while file.read(BYTES_A_READ):
            pass
        return raw.digest.hexdigest()


def check_not_mistyped(name: str) -> None:
    """Raise TextError for what is not there and looks like a path, so that no network is asked for it."""
    near = nearest(name)
    meant = f"; did you mean {near}?" if near else ""
    if name.endswith(FILE_ENDINGS):
        raise TextError(f"no file {name!r}, and no dataset of that name could be read: its ending is a file's{meant}")
    if near or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        meant = meant or ", and its slashes are those of a path"
        raise TextError(f"no file {name!r}{meant} (a dataset of that name on the hub: {name}::train)")


def check_texts(names: Iterable[str | None], field: str | None, tokens: int) -> None:
    """Raise TextError for a text that is mistyped, empty, or has fewer bytes than `tokens`; nothing heavy is loaded.

    What can be read once alone, or only from elsewhere, is left to the one who reads it, and so is the length of chats:
    a model's template makes tokens of its own.
    """
    for name in filter(None, names):
        if not os.path.exists(name):
            if ":" not in name:
                check_not_mistyped(name)
            continue
        if not (os.path.isfile(name) or os.path.isdir(name)):
            continue
        length, documents = 0, Documents(name, Reading(field=field, tokenizer=_Plainly))
        for document in documents:
            length += len(document.strip().encode(errors="replace"))
            if length >= tokens:
                break
        if not length:
            raise TextError(f"{name} holds no text")
        if length < tokens and "chat_template_sha256" not in documents.read_as:
            raise TextError(f"{name} has {length} bytes of text, fewer than one window of {tokens} tokens; give more")


class _Plainly:
    """What writes a chat before there is a tokenizer, to know that it is one."""

    chat_template = "plain"

    def apply_chat_template(self, chat: list[dict[str, str]], **_: Any) -> str:
        return "\n".join(turn["content"] for turn in chat)


def own_hash(name: str) -> str | None:
    """Return the sha256 of a text that is a file or a saved dataset; None for a dataset's name, and for a pipe."""
    return Documents(name).sha256 if os.path.isfile(name) or os.path.isdir(name) else None
