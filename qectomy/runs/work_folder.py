"""The folder in which an output is made: it survives whatever ends the run, and becomes the output by a rename.

    OUT.converting/
      lock, run.json   who works here, and what the run was told (locked_folder.py)
      journal          one line a step that is done (journal.py)
      result/          what becomes OUT
      scratch/         the run's own

A run that a signal, a full disk or a failing one ends goes on from its last step. One that was refused, for the text or
the weights that it was given, would be again: it leaves nothing behind, unless all its weights were written by then.
"""

import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qectomy import __version__
from qectomy.errors import OutputError, QectomyError, Stopped, Untrusted, note, resumable
from qectomy.runs.journal import Journal
from qectomy.runs.locked_folder import LOCK, RECORD, GoOn, LockedFolder
from qectomy.runs.output import cause, check_absent, interruptible, make_parents, move, remove_empty

JOURNAL = "journal"
RESULT, SCRATCH = "result", "scratch"
MARK = "qectomy"  # in the fingerprint of every run, and the versions of these
PACKAGES = ("torch", "transformers")


class WorkFolder(LockedFolder):
    """The folder of one run that makes an output: `start` it, fill `result` step by step, `publish` it."""

    suffix = "converting"
    doing = "works"
    anew = "start anew with --clean"
    before_record = frozenset({JOURNAL, RESULT, SCRATCH})
    versions = frozenset({MARK, *PACKAGES})
    removed_last = (RECORD, JOURNAL, LOCK)  # the journal knows whether the output is in its place

    def __init__(self, out: Path):
        super().__init__(out)
        self.result, self.scratch = self.path / RESULT, self.path / SCRATCH
        self.journal = Journal(self.path / JOURNAL)
        self.whole = False  # whether every tensor is written: what fails after that costs none of them

    def start(self, fingerprint: dict[str, Any], resume: GoOn) -> bool:
        """Hold the folder, new or, with `resume`, as it was left; return whether a run is resumed."""
        told = {
            MARK: __version__,
            **{name: importlib.metadata.version(name) for name in PACKAGES},
            **fingerprint,
        }
        resumed = super().start(told, resume)
        self.scratch.mkdir(exist_ok=True)
        self.journal = Journal(self.path / JOURNAL)  # as whoever held the folder before has left it
        return resumed

    def prepare(self) -> None:
        """Let nothing of an earlier run be there."""
        self.clear()
        self.begin()

    def begin(self) -> None:
        """Forget every step, and what was made of the result."""
        shutil.rmtree(self.result, ignore_errors=True)
        self.result.mkdir()
        self.journal.path.unlink(missing_ok=True)
        self.journal = Journal(self.journal.path)

    def clean(self) -> None:
        """Remove what an earlier run left. Raises QectomyError if another process works here, or no run ever did."""
        if not self.path.exists():
            return
        self.take()
        if (self.path / RECORD).exists():
            told = self.record().get("fingerprint")
            if not isinstance(told, dict) or MARK not in told:
                raise QectomyError(
                    f"{self.path} is no run's folder: its {RECORD} is not qectomy's; it was left as it is"
                )
        self.remove()

    def publish(self, report: dict[str, Any]) -> None:
        """Bring the result to the disk and let it appear as the output, whole; remove the rest."""
        self.journal.append(report=report, inode=self.result.stat().st_ino)
        move(self.result, self.out)
        self.remove()

    @property
    def report(self) -> dict[str, Any] | None:
        """What the run was about to return when it let the output appear; None before that."""
        last = self.journal.entries[-1] if self.journal.entries else {}
        report = last.get("report")
        return report if isinstance(report, dict) else None

    @property
    def is_rest(self) -> bool:
        """Whether the output is in its place, and this is what its run had not removed yet when it was stopped."""
        if self.result.exists() or not self.path.is_dir() or not self.out.is_dir():
            return False
        if self.journal.entries:
            return self.report is not None and self.out.stat().st_ino == self.journal.entries[-1].get("inode")
        if {path.name for path in self.path.iterdir()} - {RECORD, LOCK, SCRATCH}:
            return False
        # The journal is gone too. A rename sets the output's ctime, and every removal after it the folder's mtime; an
        # output that came after a run had been refused, or had only begun, is younger than the folder.
        return self.out.stat().st_ctime_ns <= self.path.stat().st_mtime_ns


def finished(
    out: Path,
    told_by_output: Callable[[], dict[str, Any]],
    fingerprint: Callable[[], dict[str, Any]] | None = None,
) -> dict[str, Any] | None:
    """Return the report of a run that was stopped when its output was in its place already, and tidy up; else None.

    `told_by_output` makes the report from the output where the folder has lost it. Raises QectomyError where
    `fingerprint`, which is asked for only then, differs from what the run was told and the folder still knows.
    """
    folder = WorkFolder(out)
    if not folder.is_rest:
        return None
    if fingerprint is not None and (folder.path / RECORD).exists():
        folder.check_same(fingerprint())
    report = told_by_output() if folder.report is None else folder.report
    folder.clean()
    folder.release()
    return report


def without_report(out: Path) -> dict[str, Any]:
    """Return what can be said of an output whose run's report is lost, and which does not tell it itself."""
    return {"out": str(out), "lost": "it was whole already; what its own run was told and reported is lost"}


def check_free(out: Path) -> None:
    """Raise OutputError unless `out` can be made, as `check_absent` does; remove what its own run left beside it."""
    try:
        check_absent(out)
    except OutputError:
        with suppress(QectomyError, OSError):  # the refusal is what has to be said
            finished(out, dict)
        raise


@contextmanager
def work_folder(
    out: Path, fingerprint: dict[str, Any], *, resume: GoOn = False, clean: bool = False
) -> Iterator[WorkFolder]:
    """Yield the folder of a run, new or, with `resume`, as it was left; `clean` removes one that is there.

    The block ends by `publish`. Signals that end a process are treated as Ctrl-C. Raises OutputError where the output
    exists or cannot be written, QectomyError where another run is there, and Stopped for what can be resumed.
    """
    check_free(out)
    made = make_parents(out.absolute().parent)
    folder = WorkFolder(out)
    try:
        with interruptible(), _explained(folder):
            if clean:
                folder.clean()
            if not folder.start(fingerprint, resume) and resume:
                note(f"{folder.path} holds nothing to resume; starting anew")
            with _kept_or_removed(folder):
                yield folder
    finally:
        folder.release()
        remove_empty(made)


@contextmanager
def _kept_or_removed(folder: WorkFolder) -> Iterator[None]:
    """Remove the folder of a run that was refused before its weights were written, or has no step to go on from."""
    try:
        yield
    except BaseException as error:
        refused = isinstance(error, QectomyError) and not isinstance(error, OutputError | Stopped)
        if (refused and not folder.whole) or not (folder.journal.entries or folder.must_go_on):
            folder.remove()
        raise


@contextmanager
def _explained(folder: WorkFolder) -> Iterator[None]:
    """Say of an error of the system, or an interruption, what it left and how to go on."""
    try:
        yield
    except OSError as error:
        raise _ended(folder, OutputError, f"{folder.out} could not be written: {cause(error)}") from error
    except Untrusted as error:
        raise Untrusted(str(error) if folder.must_go_on else f"{error}: {folder.anew}") from error
    except QectomyError as error:
        if not isinstance(error, OutputError | Stopped) and not folder.whole:
            raise
        raise _ended(folder, type(error), str(error).rstrip(".")) from error
    except KeyboardInterrupt as error:
        if not folder.journal.entries:
            raise
        raise _ended(folder, Stopped, "interrupted") from error


def _ended(folder: WorkFolder, kind: type[QectomyError], why: str) -> QectomyError:
    """Return the error of a run that ended early, which says what lies on the disk and whether to go on from it.

    A result that was refused would be again: what was done is there, but nothing passes by itself.
    """
    if not folder.path.exists():
        left = f"{folder.out} is whole." if folder.out.exists() else "Nothing was left behind."
        return kind(f"{why}. {left}")
    error = kind(f"{why}. {folder.path} holds what was done: go on with --resume, or {folder.anew}.")
    return resumable(error) if issubclass(kind, OutputError | Stopped) else error
