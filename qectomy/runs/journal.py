"""A journal of steps that are done: one line a step, on the disk before the next step begins.

Each line is the sha256 of the line before it and of its own JSON, then the JSON. A line that was torn by a kill or a
power cut, or changed later, ends what is read; so does every line after it. The digests guard against accidents: who
writes to the folder can compute them too, so what an entry says is checked by whoever goes on from it.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qectomy.checkpoint.headers import parse_json, read_regular
from qectomy.runs.records import sync

DIGEST = 64  # characters of a sha256
MAX_BYTES = 100_000_000  # 10,000 layers of a conversion have 40 MB


class Journal:
    """The steps of one run in a file; `entries` are those that can be trusted, `damaged` the number of lines after."""

    def __init__(self, path: Path):
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._marks = [(0, "")]  # where each entry's line ends in the file, and its digest; first, before all of them
        lines = _content(path).splitlines(keepends=True)
        for line in lines:
            entry = _read(line, self._marks[-1][1])
            if entry is None:
                break
            self._added(entry, line)
        self.damaged = len(lines) - len(self.entries)

    def append(self, **entry: Any) -> None:
        """Add a step; when this returns neither a kill nor a power cut loses it."""
        end, before = self._marks[-1]
        text = json.dumps(entry, separators=(",", ":")).encode()
        line = _digest(before, text) + b" " + text + b"\n"
        is_new = not self.path.exists()
        with self.path.open("ab") as file:
            file.truncate(end)  # a torn line, or steps that were cut
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            sync(self.path.parent)
        self._added(json.loads(text), line)

    def cut(self, count: int) -> None:
        """Forget all but the first `count` steps."""
        del self.entries[count:], self._marks[count + 1 :]

    def _added(self, entry: dict[str, Any], line: bytes) -> None:
        self.entries.append(entry)
        self._marks.append((self._marks[-1][0] + len(line), line[:DIGEST].decode()))


def _content(path: Path) -> bytes:
    """Return what a journal holds: nothing where it is none, or beyond any run's."""
    try:
        return (None if path.is_symlink() else read_regular(path, MAX_BYTES)) or b""
    except OSError:
        return b""


def _digest(before: str, text: bytes) -> bytes:
    return hashlib.sha256(before.encode() + b" " + text).hexdigest().encode()


def _read(line: bytes, before: str) -> dict[str, Any] | None:
    """Return a line's entry; None for a line that is torn, changed or out of its place."""
    digest, _, text = line.partition(b" ")
    if not line.endswith(b"\n") or digest != _digest(before, text[:-1]):
        return None
    try:
        entry = parse_json(text)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
