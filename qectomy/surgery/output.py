"""Output folders that appear whole or not at all."""

import errno
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from qectomy.errors import OutputError


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


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a work folder beside `out`; rename it to `out` when the block ends well, else remove it.

    SIGTERM is treated as Ctrl-C while the block runs, so that it cleans up too.
    """
    check_absent(out)
    out = out.absolute()
    made = _make_parents(out.parent)
    before = signal.getsignal(signal.SIGTERM)
    try:
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        try:
            _on_sigterm(_interrupt)
            yield work
            work.chmod(0o755)
            _sync(work)
            check_absent(out)
            work.rename(out)
            _sync(out.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            _on_sigterm(before)
    except OSError as error:
        _remove_empty(made)
        what = {errno.ENOSPC: "the disk is full", errno.EROFS: "the disk is read-only"}.get(
            error.errno or 0, error.strerror or str(error)
        )
        raise OutputError(f"{out} could not be written: {what}. Nothing was left behind.") from error
    except BaseException:
        _remove_empty(made)
        raise


def _make_parents(parent: Path) -> list[Path]:
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


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _on_sigterm(handler: object) -> None:
    try:
        signal.signal(signal.SIGTERM, handler)  # type: ignore[arg-type]
    except ValueError:  # not the main thread: signals stay as they are
        return


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
