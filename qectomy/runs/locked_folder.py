"""The folder beside an output in which a long run lies until it is done: who holds it, and what it was told.

    OUT.SUFFIX/
      lock       held by the one process that works here; the lock dies with its owner
      run.json   fingerprint of the run, and what it notes

What a kind of run keeps there besides is its own: `healing/run_folder.py`, `runs/work_folder.py`.
"""

import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, TextIO

from qectomy.checkpoint.headers import MAX_JSON_BYTES, parse_json, read_regular
from qectomy.errors import QectomyError, Untrusted, shown

LOCK = "lock"
RECORD = "run.json"
DRAFT = ".draft"
DIGEST = "sha256 of the rest"  # in a record
GoOn = bool | Literal["only"]  # with a run that is there: refuse it; go on with it, or begin one; go on, never begin


class LockedFolder:
    """The folder of one run, made beside the output and held by one process."""

    suffix: ClassVar[str]
    doing: ClassVar[str]  # what another process does there
    anew: ClassVar[str]  # how to start anew
    before_record: ClassVar[frozenset[str]] = frozenset()  # what a run makes before its record is there
    removed_last: ClassVar[tuple[str, ...]] = (RECORD, LOCK)  # in this order
    versions: ClassVar[frozenset[str]] = frozenset()  # what in a fingerprint is no matter once the output is there

    def __init__(self, out: Path):
        self.out = out.absolute()
        self.path = self.out.with_name(f"{self.out.name}.{self.suffix}")
        self._lock: TextIO | None = None
        self.must_go_on = False  # a run that is there, and what it has done

    def start(self, fingerprint: dict[str, Any], resume: GoOn) -> bool:
        """Make the folder, or with `resume` enter it again; return whether a run is resumed.

        Raises QectomyError when a run is there and `resume` is not asked for, when it was another run, and when another
        process holds it; where none is and `resume` is "only".
        """
        self.must_go_on = resume == "only"
        if self.must_go_on:
            self.check_there()
        self.take()
        try:
            return self._enter(fingerprint, resume)
        except BaseException:
            self.release()
            raise

    def _enter(self, fingerprint: dict[str, Any], resume: GoOn) -> bool:
        if not (self.path / RECORD).exists():
            self._found(fingerprint)
            return False
        if not resume:
            raise QectomyError(f"{self.path} holds a run that was not finished: go on with --resume, or {self.anew}")
        before = self.record().get("fingerprint")
        wanted = json.loads(json.dumps(fingerprint))
        if differing := differences(before if isinstance(before, dict) else {}, wanted):
            raise QectomyError(
                f"{self.path} holds another run: {'; '.join(differing)}. Give what that run was given, or another --out"
            )
        return True

    def check_same(self, fingerprint: dict[str, Any]) -> None:
        """Raise QectomyError unless the run that made the output was told the same."""
        told = self.record().get("fingerprint")
        before = told if isinstance(told, dict) else {}
        before = {name: value for name, value in before.items() if name not in self.versions}
        if differing := differences(before, json.loads(json.dumps(fingerprint))):
            raise QectomyError(
                f"{self.out} is whole, and another run made it: {'; '.join(differing)}. Give what that run was given, "
                "or another --out"
            )

    def check_there(self) -> None:
        """Raise Untrusted where there is no run to go on with."""
        if not (self.path / RECORD).exists():
            raise Untrusted(f"{self.path} holds no run to go on with, and --resume-only begins none (--resume would)")

    def check_may_begin(self) -> None:
        """Raise Untrusted where nothing of a run can be gone on from, and it has to be."""
        if self.must_go_on:
            raise Untrusted(
                f"{self.path} holds nothing sound to go on from, and --resume-only does not begin anew (--resume would)"
            )

    def _found(self, fingerprint: dict[str, Any]) -> None:
        """Make what a new run needs; nothing of it stays where that fails."""
        try:
            self.prepare()
            write_record(self.path / RECORD, {"fingerprint": fingerprint})
        except OSError:
            self.remove()
            raise

    def prepare(self) -> None:
        """Make what the folder holds before its record is there."""

    def take(self) -> None:
        """Hold the folder, made if need be, until `release`, or until this process is gone.

        Raises QectomyError if another process does, or if the folder is no run's.
        """
        self.release()
        while True:
            self._check_ours()
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / LOCK).open("a")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                lock.close()
                raise QectomyError(f"{self.path} is in use: another process {self.doing} there") from error
            if _is_open(self.path / LOCK, lock):
                self._lock = lock
                return
            lock.close()  # its owner removed the folder between the two calls

    def _check_ours(self) -> None:
        """Raise QectomyError for a folder that no run made. What is written through a link would land elsewhere."""
        if self.path.is_symlink():
            raise QectomyError(
                f"{self.path} is a link, and what is written there would land elsewhere. If it leads to a run on "
                "another disk, do not remove that: give an --out that lies beside it there"
            )
        if strange := next(_strange(self.path), None):
            raise QectomyError(f"{strange} is a link, or no file: no run makes such a thing; remove it")
        if not self.path.exists() or (self.path / RECORD).exists():
            return
        found = {path.name for path in self.path.iterdir()}
        if others := found - {LOCK, RECORD + DRAFT, *self.before_record}:
            raise QectomyError(f"{self.path} is no run's folder (it holds {min(others)}); give another --out")

    def release(self) -> None:
        """Let other processes go on with the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def nbytes(self) -> int:
        """Return what the folder takes of the disk; files may have holes."""
        return sum(512 * path.stat().st_blocks for path in self.path.rglob("*") if path.is_file())

    def record(self) -> dict[str, Any]:
        """Return what run.json says."""
        return read_record(self.path / RECORD)

    def note(self, **values: Any) -> None:
        """Keep values in run.json."""
        write_record(self.path / RECORD, self.record() | values)

    def clear(self, kept: tuple[str, ...] = (RECORD, LOCK)) -> None:
        """Remove all but these."""
        for path in self.path.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder, its marks last: one that is half removed is still known as a run's.

        Nobody else can enter before the lock is gone, and then nothing is removed that another run has put there.
        """
        with suppress(OSError):
            self.clear(self.removed_last)
            for name in self.removed_last:
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()


def _strange(folder: Path) -> Iterator[Path]:
    """Yield what is neither a folder nor a regular file: the folder itself, or something in it."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        yield folder
        return
    for root, folders, files in os.walk(folder):
        for path in (Path(root, name) for name in (*folders, *files)):
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # another process works here
                continue
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                yield path


def _is_open(path: Path, file: TextIO) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return in words where two fingerprints differ."""
    names = sorted({*found, *wanted})
    return [
        f"{_plain(name)} was {_plain(found.get(name))}, is {_plain(wanted.get(name))}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _plain(value: Any) -> str:
    """A value without quotation marks, if it is a short text that can be printed."""
    return value if isinstance(value, str) and len(value) < 300 and value.isprintable() else shown(value)


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run's folder. Raises QectomyError for one that was damaged."""
    try:
        data = read_regular(path, MAX_JSON_BYTES)
        found = None if data is None else parse_json(data)
    except (OSError, ValueError) as error:
        raise QectomyError(f"{path} cannot be read ({error}); remove the folder to start anew") from error
    if not isinstance(found, dict):
        raise QectomyError(f"{path} is not what a run writes; remove the folder to start anew")
    digest = found.pop(DIGEST, None)
    if digest is not None and digest != _digest(found):
        raise QectomyError(f"{path} was damaged on the disk after it was written; remove the folder to start anew")
    return found


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as `write_json` does, so that `read_record` notices when a byte of it flips."""
    write_json(path, value | {DIGEST: _digest(value)})


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that it is there whole or not at all, a power cut notwithstanding."""
    draft = path.with_name(path.name + DRAFT)
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
