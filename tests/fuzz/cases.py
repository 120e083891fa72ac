"""A case: the files of a hostile folder. A reader: what makes cases for it, and what reads them."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mutations import Dice

from qectomy.errors import QectomyError

SECRET = b"a private file that lies outside every folder that is read\n"
LONGEST = 30_000  # characters of a message


@dataclass(frozen=True)
class Link:
    """A symbolic link; OUTSIDE in its target is the folder around the hostile one."""

    to: str


@dataclass(frozen=True)
class Hole:
    """A file of so many zeros, which takes no room."""

    size: int


class Pipe:
    """A named pipe that nobody writes to: opening it waits for ever."""


class Folder:
    """An empty folder in a file's place."""


Content = bytes | Link | Hole | Pipe | Folder
Case = dict[str, Content]


@dataclass(frozen=True)
class Reader:
    """One reader of outside files. `read` raises QectomyError for what it refuses, and anything else is a fault."""

    name: str
    make: Callable[[Dice], Case]
    read: Callable[[Path], None]
    raw: Callable[[bytes], Case] | None = None  # for a fuzzer that brings its own bytes


def lay(case: Case, folder: Path) -> None:
    """Let a folder hold a case and nothing else."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in case.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, Link):
            path.symlink_to(content.to.replace("OUTSIDE", str(folder.parent)))
        elif isinstance(content, Hole):
            with path.open("wb") as file:
                file.truncate(content.size)
        elif isinstance(content, Pipe):
            os.mkfifo(path)
        else:
            path.mkdir()


def odd_file(dice: Dice) -> Content:
    """What may stand in a file's place."""
    links = ("OUTSIDE/secret", "/dev/zero", "/etc/passwd", "nowhere", "config.json", "OUTSIDE/model.safetensors", "..")
    content: Content = Link(dice.choice(links))
    if dice.randrange(3) == 0:
        content = dice.choice((Pipe(), Folder(), Hole(0), Hole(30_000_000), Hole(10**11), b"", b"\x80\x81"))
    return content


def outcome(reader: Reader, case: Case, folder: Path) -> str:
    """Return `accepted`, or the kind of the one error; raise AssertionError where a file outside is touched."""
    lay(case, folder)
    around = surroundings(folder)
    try:
        reader.read(folder)
        told = "accepted"
    except QectomyError as error:
        told, message = type(error).__name__, str(error)
    else:
        message = told
    assert 5 < len(message) < LONGEST, f"{told} says {message[:200]!r}"
    assert surroundings(folder) == around, "a file outside the folder was made or changed"
    return told


def surroundings(folder: Path) -> dict[str, tuple[int, int]]:
    """What lies beside a folder: names, sizes and times."""
    found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder.parent)}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items() if name != folder.name}


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a folder, as a case."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
