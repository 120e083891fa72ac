"""The folder beside an output in which it is made: it survives whatever ends the run, and becomes the output.

    OUT.converting/          (of `heal`: OUT.healing/)
      lock                   held by the one process that works here; the lock dies with its owner
      run.json               what the run was told, and what it notes
      journal                one line a step that is done (journal.py)
      result/                what becomes OUT, by a rename
      scratch/               the run's own
    OUT/qectomy-run.json     what the run that made OUT was told

Every run has a result from its start: a folder without one beside an OUT is the rest of a run that is done.
"""

import importlib.metadata
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from qectomy import __version__
from qectomy.errors import OutputError, QectomyError, Untrusted, note
from qectomy.runs.journal import Journal
from qectomy.runs.output import check_absent, move
from qectomy.runs.records import DRAFT, differences, read_record, write_record

CONVERTING, HEALING = "converting", "healing"  # what the folder is called after OUT
LOCK, RECORD, JOURNAL, RESULT, SCRATCH = "lock", "run.json", "journal", "result", "scratch"
TOLD = "qectomy-run.json"  # in an output
WEIGHTS = "weights"  # there: the bytes of each file of weights
ANEW = "start anew with --clean"
MADE_BY = "made by"  # in every record
VERSIONS = ("qectomy", "torch", "transformers")  # in the fingerprint of what goes on to the same bytes alone

GoOn = bool | Literal["only"]  # with a run that is there: refuse it; go on with it, or begin one; go on, never begin


class RunDir:
    """The folder of one run: `start` it, fill `result`, `publish` it."""

    def __init__(self, out: Path, kind: str = CONVERTING):
        self.out = out.absolute()
        self.path = self.out.with_name(f"{self.out.name}.{kind}")
        self.result, self.scratch = self.path / RESULT, self.path / SCRATCH
        self.journal = Journal(self.path / JOURNAL)
        self.must_go_on = False  # a run that is there, and what it has done
        self.whole = False  # whether every tensor is written: what fails after that costs none of them
        self._lock = FileLock(self.path / LOCK, timeout=0.1)  # it tries again where the file goes meanwhile

    # Who may enter

    def start(self, fingerprint: dict[str, Any], resume: GoOn) -> bool:
        """Hold the folder, new or, with `resume`, as it was left; return whether a run is resumed.

        Raises QectomyError when a run is there and `resume` is not asked for, when it was another run, and when another
        process holds it; where none is and `resume` is "only".
        """
        self.must_go_on = resume == "only"
        if self.must_go_on:
            self.check_there()
        self.take()
        try:
            resumed = self._enter(json.loads(json.dumps(fingerprint)), resume)
            for folder in (self.result, self.scratch):
                folder.mkdir(exist_ok=True)
            self.journal = Journal(self.path / JOURNAL)  # as whoever held the folder before has left it
        except BaseException:
            self.release()
            raise
        return resumed

    def _enter(self, fingerprint: dict[str, Any], resume: GoOn) -> bool:
        if not (self.path / RECORD).exists():
            try:
                self._clear(LOCK)
                write_record(self.path / RECORD, {MADE_BY: f"qectomy {__version__}", "fingerprint": fingerprint})
            except OSError:
                self.remove()
                raise
            return False
        if not resume:
            raise QectomyError(f"{self.path} holds a run that was not finished: go on with --resume, or {ANEW}")
        if differing := differences(self.fingerprint, fingerprint):
            raise QectomyError(
                f"{self.path} holds another run: {'; '.join(differing)}. Give what that run was given, or another --out"
            )
        return True

    def take(self) -> None:
        """Hold the folder, made if need be, until `release`, or until this process is gone.

        Raises QectomyError if another process does, or if the folder is no run's.
        """
        self.release()  # what was held may have been removed since
        while not self._lock.is_locked:
            self._check_ours()
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise QectomyError(f"{self.path} is in use: another process works there") from error
            except FileNotFoundError:  # its owner removed the folder between the two calls
                continue

    def release(self) -> None:
        """Let other processes go on with the run."""
        self._lock.release(force=True)

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
        # what a run makes before its record, or has not removed yet after it
        others = {path.name for path in self.path.iterdir()} - {LOCK, RECORD + DRAFT, JOURNAL, RESULT, SCRATCH}
        if others:
            raise QectomyError(f"{self.path} is no run's folder (it holds {min(others)}); give another --out")

    # What it holds

    def record(self) -> dict[str, Any]:
        """Return what run.json says."""
        return read_record(self.path / RECORD)

    def note(self, **values: Any) -> None:
        """Keep values in run.json."""
        write_record(self.path / RECORD, self.record() | values)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the run was told."""
        told = self.record().get("fingerprint")
        return told if isinstance(told, dict) else {}

    def nbytes(self) -> int:
        """Return what the run, and its output if that is there, take of the disk; files may have holes."""
        files = (path for folder in (self.path, self.out) for path in folder.rglob("*") if path.is_file())
        return sum(512 * path.stat().st_blocks for path in files)

    def begin(self) -> None:
        """Forget every step, and what was made of the result."""
        shutil.rmtree(self.result, ignore_errors=True)
        self.result.mkdir()
        self.journal.path.unlink(missing_ok=True)
        self.journal = Journal(self.journal.path)

    # How it ends

    def publish(self) -> None:
        """Bring the result to the disk and let it appear as the output, whole; remove the rest."""
        write_record(self.result / TOLD, self.fingerprint | {WEIGHTS: _weights(self.result)})
        move(self.result, self.out)
        self.remove()

    def clean(self) -> None:
        """Remove what an earlier run left. Raises QectomyError if another process works here, or no run ever did."""
        if not self.path.exists():
            return
        there = (self.path / RECORD).exists()
        if there and MADE_BY not in self.record() and "qectomy" not in self.fingerprint:  # the mark of older versions
            raise QectomyError(f"{self.path} is no run's folder: its {RECORD} is not qectomy's; it was left as it is")
        self.take()
        self.remove()

    def remove(self) -> None:
        """Remove the folder, its marks last: one that is half removed is still known as a run's.

        Nobody else can enter before the lock is gone, and then nothing is removed that another run has put there.
        """
        with suppress(OSError):
            shutil.rmtree(self.result, ignore_errors=True)
            self._clear(RECORD, LOCK)
            for name in (RECORD, LOCK):
                (self.path / name).unlink(missing_ok=True)
            self.path.rmdir()

    def _clear(self, *kept: str) -> None:
        """Remove all but these."""
        for path in self.path.iterdir():
            if path.name not in kept:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

    def remove_rest(self) -> None:
        """Remove what the run that made the output had not removed yet when it was stopped: it has no result.

        A run that is not finished has one from its start.
        """
        if self.out.is_dir() and self.path.is_dir() and not self.result.exists():
            with suppress(QectomyError, OSError):  # another run's, or a folder of someone else
                self.clean()
            self.release()


def check_out(out: Path, resume: GoOn, kind: str = CONVERTING) -> None:
    """Refuse an output that cannot be made, or that there is nothing to go on with.

    With `resume` one that a run has made may be in its place already. What its run left beside an output is removed.
    """
    if resume and (out / TOLD).is_file():
        return
    folder = RunDir(out, kind)
    try:
        check_absent(out)
    except OutputError:
        folder.remove_rest()
        raise
    if resume == "only":
        folder.check_there()


def finished(out: Path, told: dict[str, Any], kind: str = CONVERTING) -> bool:
    """Return whether the output is there, made by a run that was told this; what that has left beside it is removed.

    Raises QectomyError, naming what differs, where another run has made it.
    """
    if not (out / TOLD).is_file():
        return False
    before = {name: value for name, value in read_record(out / TOLD).items() if name not in VERSIONS}
    weights, there = before.pop(WEIGHTS, {}), _weights(out)
    if lost := sorted(name for name, size in weights.items() if there.get(name) != size):
        raise OutputError(
            f"{out} was made by a run that finished, and {lost[0]} is not there as it was written: it was removed, or "
            "a copy was cut short. Remove the folder and begin anew, or copy it once more"
        )
    if differing := differences(before, json.loads(json.dumps(told))):
        raise QectomyError(
            f"{out} is whole, and another run made it: {'; '.join(differing)}. Give what that run was given, or "
            "another --out"
        )
    note(f"{out} is whole, and this run made it: there was nothing left to do")
    RunDir(out, kind).remove_rest()
    return True


def _weights(folder: Path) -> dict[str, int]:
    """Return {file name: bytes} of the weights in a folder."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


def versions() -> dict[str, str]:
    """Return what a run that has to go on to the same bytes is told of the software."""
    return {name: __version__ if name == "qectomy" else importlib.metadata.version(name) for name in VERSIONS}


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
