"""Output folders that appear whole or not at all."""

import errno
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qectomy.errors import OutputError
from qectomy.runs.records import sync

ENDING = (signal.SIGTERM, signal.SIGHUP)


def check_absent(out: Path) -> None:
    """Raise OutputError unless `out` can be made: it must not exist and its parent must be a writable folder."""
    try:
        exists = out.exists() or out.is_symlink()
    except OSError as error:
        raise OutputError(f"{str(out)[:100]!r} is not a path that can be made: {error.strerror}") from error
    if exists:
        raise OutputError(f"{out} exists; nothing is overwritten. Give another --out or remove it first.")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{parent} is not a folder that can be written to")


def check_room(out: Path, needed: int) -> None:
    """Raise OutputError if the disk that will hold `out` has fewer than `needed` bytes free."""
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(f"{parent} has {free:,} bytes free; {needed:,} are needed. Nothing was written.")


def move(work: Path, out: Path) -> None:
    """Bring a folder to the disk and let it appear as `out`, by a rename. Raises OutputError if `out` is there."""
    work.chmod(0o755)
    for path in work.rglob("*"):
        sync(path)
    sync(work)
    check_absent(out)
    work.rename(out)
    sync(out.parent)


def cause(error: OSError) -> str:
    """Return what an error of the system means for an output."""
    return {errno.ENOSPC: "the disk is full", errno.EROFS: "the disk is read-only"}.get(
        error.errno or 0, error.strerror or str(error)
    )


def make_parents(parent: Path) -> list[Path]:
    """Make missing parents; return those made, innermost first."""
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        for folder in reversed(missing):
            folder.mkdir()
    except OSError as error:
        raise OutputError(f"{missing[0]} cannot be made: {error.strerror}") from error
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Remove those that hold nothing."""
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


@contextmanager
def interruptible() -> Iterator[None]:
    """Treat the signals that end a process as Ctrl-C while the block runs; one that is ignored (nohup) stays so."""
    before = {number: signal.getsignal(number) for number in ENDING}
    caught = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}
    try:
        for number in caught:
            _handle(number, _interrupt)
        yield
    finally:
        for number, handler in caught.items():
            _handle(number, handler)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _handle(number: int, handler: object) -> None:
    try:
        signal.signal(number, handler)  # type: ignore[arg-type]
    except ValueError:  # not the main thread: signals stay as they are
        return
