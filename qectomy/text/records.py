"""Records of a text file, JSON or columns, and the field of each that holds its text."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from qectomy.errors import TextError, clean, note, shown
from qectomy.text.chats import ChatWriter, is_chat

CHAT = "messages"
TEXT_FIELDS = ("text", CHAT, "page", "content", "document")
MAX_LINE = 1 << 28  # characters; text8, all of it one line, has 10^8
LOOKED_AT = 64  # texts of a list, before it is known not to be prose
MAX_ENTRY = 1 << 24  # characters of one entry of a JSON list
LINE_ENDINGS = (".jsonl", ".ndjson")  # of files that are refused, not read as prose, where a line is no JSON
JSON_LINES, JSON_LIST = "JSON lines", "JSON list"
NO_SPACE = re.compile(r"\S")
BEGINS_JSON = re.compile(r'\s*(\{\s*"|\[\s*[{"])')
BEGINS_MARKUP = re.compile(r"\s*<(!doctype|html|head|body|\?xml)\b", re.IGNORECASE)
HEADER = re.compile(r'"?\w+"?([,;\t]"?\w+"?)+\s*')
Placed = Iterator[tuple[str, Any]]  # records, each after the words that say where it stands


class Texts:
    """The texts of records: of the field that is named, else of the one that the first record with a text settles.

    A record whose text is in another field than the settled one is told, and so is it where most have none.
    """

    def __init__(self, what: str, field: str | None, tokenizer: Callable[[], Any] | None = None):
        self._what, self.field, self._tokenizer = what, field, tokenizer
        self._writer: ChatWriter | None = None
        self._settled, self._told_other = "", False  # which record settled the field, in words
        self.records = self._without = 0  # that gave a text, and that gave none

    @property
    def read_as(self) -> dict[str, str]:
        """What a report says of how a text was made of a record."""
        field = {} if self.field is None else {"field": clean(self.field)}
        return field | ({} if self._writer is None else {"chat_template_sha256": self._writer.sha256})

    def of(self, record: Any, place: str = "") -> str | None:
        """Return a record's text, None where its field is null. Raises TextError where it has none."""
        where = f"{self._what}{place}"
        if isinstance(record, str) and self.field is None:
            return self._whole(record, where)
        if not isinstance(record, dict):
            raise TextError(f"{where}: {shown(record)} is no record with fields, and no text")
        if self.field is None and (field := text_field(record, where)) is not None:
            self.field, self._settled = field, f", which {place.removeprefix(', ')} settled"
        value: Any = record.get(self.field) if self.field is not None else None
        if self.field in record and (value is None or isinstance(value, str)):
            self._tell_other(record, where)
        if isinstance(value, str):
            return self._whole(value, where)
        if is_chat(value) and self._tokenizer is not None:
            self._writer = self._writer or ChatWriter(self._tokenizer(), where)
            return self._whole(self._writer.written(value, where), where)
        if self.field is None or (value is None and self.field in record):
            self._without += 1
            return None
        raise TextError(
            f"{where}: no text in its field {shown(self.field)}{self._settled}; {_told(record)}; name another: "
            "--field NAME"
        )

    def _tell_other(self, record: dict[str, Any], where: str) -> None:
        """Tell of the first record that alone would be read by another field than the one that a record settled."""
        if self._told_other or not self._settled:
            return
        try:
            field = text_field(record, where)
        except TextError:  # of its fields none is clearly the one
            return
        if field not in (None, self.field):
            note(
                f"{where}: its text is in the field {shown(field)}, and {shown(self.field)} is read of every record"
                f"{self._settled}; {_told(record)}. To have another field read, name it: --field NAME"
            )
            self._told_other = True

    def at_end(self) -> None:
        """Tell where most records gave no text."""
        if self._without > self.records > 0:
            note(
                f"{self._what}: {self._without:,} of {self._without + self.records:,} records were left out, for their "
                f"field {shown(self.field)} is null; to have another field read, name it: --field NAME"
            )

    def _whole(self, text: str, where: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TextError(f"{where}: half of a surrogate pair, which is no character") from error
        self.records += 1
        return text


def text_field(record: dict[str, Any], where: str) -> str | None:
    """Return the field that holds a record's text or chat: a known name, else the only text; None while it is null.

    Raises TextError, naming the fields, where that is not clear.
    """
    texts = [name for name, value in record.items() if isinstance(value, str)]
    texts += [CHAT] if is_chat(record.get(CHAT)) else []
    if known := next((name for name in TEXT_FIELDS if name in texts), None):
        return known
    if any(name in record and record[name] is None for name in TEXT_FIELDS):
        return None
    if len(texts) == 1:
        return texts[0]
    why = "none of its fields is a text" if not texts else "several of its fields are texts"
    raise TextError(f"{where}: {why}, and none is called `text`; {_told(record)}; name the right one: --field NAME")


def _told(record: dict[str, Any]) -> str:
    """Say which fields a record has, and of what kind each is."""
    kinds = {str: "text", int: "number", float: "number", bool: "yes or no", list: "list", dict: "record"}
    kinds[type(None)] = "null"
    fields = [f"{shown(name)} ({kinds.get(type(value), 'other')})" for name, value in list(record.items())[:20]]
    return f"it has {', '.join(fields)}{', ...' if len(record) > 20 else ''}" if fields else "it has no fields"


def json_records(path: Path, pieces: Iterator[str]) -> tuple[str | None, Placed, Iterator[str]]:
    """Return the kind of JSON that a text is, by how it begins, and its records; of any other, its pieces again."""
    first = next(pieces, "")
    begins, kept = first.lstrip()[:1], _Kept(chain([first], pieces))
    if begins == "[":
        entries = list_entries(kept)
        try:
            head = list(islice(entries, 1))
            if ".json" not in path.suffixes and isinstance(next(iter(head), None), str):
                head += islice(entries, LOOKED_AT)  # prose too can begin with quotations in brackets
        except ValueError:
            kept = _Kept(kept.again())
        else:
            kept.forget()
            return JSON_LIST, _entry_records(path, chain(head, entries)), iter(())
    by_ending = path.suffix in LINE_ENDINGS
    if by_ending or (begins == "{" and _is_object(next(filter(str.strip, lines_of(path, kept)), ""))):
        return JSON_LINES, _line_records(path, lines_of(path, kept.again()), by_ending), iter(())
    return None, iter(()), kept.again()


class _Kept:
    """Pieces of a text that are looked at and can be had again."""

    def __init__(self, pieces: Iterator[str]):
        self._pieces, self._seen, self._keeps = pieces, list[str](), True

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            if self._keeps:
                self._seen.append(piece)
            yield piece

    def again(self) -> Iterator[str]:
        return chain(self._seen, self._pieces)

    def forget(self) -> None:
        self._seen, self._keeps = [], False


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def lines_of(path: Path, pieces: Iterable[str]) -> Iterator[str]:
    """Yield the lines of a text, with their ends; str.splitlines would cut at a U+2028 inside a string."""
    held: list[str] = []
    length = 0
    for piece in pieces:
        start = 0
        while end := piece.find("\n", start) + 1:
            yield "".join((*held, piece[start:end]))
            held, length, start = [], 0, end
        held.append(piece[start:])
        length += len(piece) - start
        if length > MAX_LINE:
            raise TextError(f"{path} has a line of more than {MAX_LINE:,} characters; break it, or give another text")
    if length:
        yield "".join(held)


def _line_records(path: Path, lines: Iterable[str], by_ending: bool) -> Placed:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f", line {number}", json.loads(line)
        except (ValueError, RecursionError) as error:
            why = "" if by_ending else "; its first line is a JSON record, so every line has to be one"
            raise TextError(f"{path}, line {number}: not JSON ({error}){why}") from error


def _entry_records(path: Path, entries: Iterator[Any]) -> Placed:
    number = 0
    try:
        for number, entry in enumerate(entries, 1):
            yield f", entry {number}", entry
    except ValueError as error:
        raise TextError(f"{path}, entry {number + 1}: not JSON ({error})") from error


def list_entries(pieces: Iterable[str]) -> Iterator[Any]:
    """Yield the records and texts of a JSON list, one in memory at a time. Raises ValueError where it is none."""
    text = _Ahead(iter(pieces))
    text.take("[")
    more = text.next() != "]" or text.separator()
    while more:
        if text.next() not in ('"', "{"):
            raise ValueError(f"{shown(text.next())} begins neither a record nor a text")
        value = text.entry()
        if isinstance(value, dict):
            yield value
        more = text.separator()
        if isinstance(value, str):  # not before it is seen to end as an entry does
            yield value


class _Ahead:
    """Text that comes in pieces, read on as far as what is asked for needs."""

    def __init__(self, pieces: Iterator[str]):
        self._pieces, self._text, self._at, self._decoder = pieces, "", 0, json.JSONDecoder()

    def next(self) -> str:
        """Return the next character that is no space; "" at the end."""
        while True:
            found = NO_SPACE.search(self._text, self._at)
            self._at = found.start() if found else len(self._text)
            if found or not self._grow(1):
                return self._text[self._at : self._at + 1]

    def take(self, character: str) -> None:
        if self.next() != character:
            raise ValueError(f"{shown(self.next())} stands where {shown(character)} is due")
        self._at += 1

    def separator(self) -> bool:
        """Pass the comma before another entry, or, returning False, the end of the list and of the text."""
        if self.next() == ",":
            self._at += 1
            return True
        if self.next() != "]":
            raise ValueError(f"{shown(self.next())} stands where a comma or the list's end is due")
        self._at += 1
        if self.next():
            raise ValueError(f"{shown(self.next())} follows after the list's end")
        return False

    def entry(self) -> Any:
        while True:
            try:
                value, self._at = self._decoder.raw_decode(self._text, self._at)
                return value
            except RecursionError as error:
                raise ValueError("it is nested too deeply") from error
            except ValueError as error:
                there = len(self._text) - self._at
                if there > MAX_ENTRY:
                    raise ValueError(f"{error}, in {there:,} characters") from error
                if not self._grow(max(1, there)):
                    raise

    def _grow(self, characters: int) -> bool:
        """Read on by so many characters or more, and let go what was read; False at the end."""
        held, length = [self._text[self._at :]], 0
        while length < characters and (piece := next(self._pieces, None)) is not None:
            held.append(piece)
            length += len(piece)
        self._text, self._at = "".join(held), 0
        return length > 0


def looks_like(path: Path, head: str) -> str | None:
    """Say as what a text was probably meant that is read as prose, by how it begins and ends; None: as that."""
    lines = [line for line in head.splitlines() if line.strip()][:2]
    if path.suffix == ".json" or BEGINS_JSON.match(head):
        return "JSON"
    if path.suffix in (".html", ".htm", ".xml") or BEGINS_MARKUP.match(head):
        return "HTML or XML"
    separator = next((mark for mark in ",;\t" if lines and mark in lines[0]), "")
    columns = len(lines) == 2 and separator and 0 < lines[0].count(separator) <= lines[1].count(separator)
    if path.suffix in (".csv", ".tsv") or (columns and HEADER.fullmatch(lines[0])):
        return "CSV"
    return None
