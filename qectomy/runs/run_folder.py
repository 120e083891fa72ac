"""The folder of a healing run: what it was told, its data, and checkpoints that are whole or not counted.

    OUT.healing/
      run.json              fingerprint of the run, and its plan: steps, windows a device runs at a time
      train.bin, validation.bin, data.json
      result/               what becomes OUT, once training is done
      checkpoints/checkpoint-N/   what Trainer saves, and complete.json, written last

A process can be killed at any moment, and disks damage files. A checkpoint counts if complete.json lies in it, every
file has the sha256 that it names, and the best checkpoint until then counts too; the one before it is kept as well.
"""

import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from qectomy.checkpoint.checkpoint import sha256
from qectomy.errors import OutputError, QectomyError, note
from qectomy.runs.locked_folder import LOCK, RECORD, LockedFolder, read_record, sync, write_json
from qectomy.runs.output import check_absent

COMPLETE = "complete.json"
RESULT = "result"  # in run.json: the inode of the folder that becomes OUT


class RunFolder(LockedFolder):
    """The folder of one healing run, made beside the output."""

    suffix = "healing"
    doing = "heals"
    anew = "remove it to start anew"
    before_record = frozenset({"checkpoints"})

    def __init__(self, out: Path):
        super().__init__(out)
        self.checkpoints, self.result = self.path / "checkpoints", self.path / "result"

    def prepare(self) -> None:
        """Make the folder of the checkpoints."""
        self.checkpoints.mkdir(exist_ok=True)

    @property
    def is_rest(self) -> bool:
        """Whether the output is in its place, and this is what its run had not removed yet when it was stopped."""
        if self.result.exists() or not self.path.is_dir() or not self.out.is_dir():
            return False
        if (self.path / RECORD).exists():
            return self.out.stat().st_ino == self.record().get(RESULT)
        # A rename sets the output's ctime, and every removal after it the folder's mtime.
        left = {path.name for path in self.path.iterdir()}
        return left <= {LOCK} and self.out.stat().st_ctime_ns <= self.path.stat().st_mtime_ns

    def will_publish(self, result: Path) -> None:
        """Note which folder is about to become the output."""
        self.note(**{RESULT: result.stat().st_ino})

    def finished(self, fingerprint: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return the report of a run that was stopped when its output was in its place already, and tidy up; else None.

        Raises QectomyError where another run made it.
        """
        if not self.is_rest:
            return None
        if (self.path / RECORD).exists():
            self.check_same(fingerprint())
        report = read_record(self.out / "qectomy.json")
        self.tidy()
        return report

    def tidy(self) -> None:
        """Remove the rest of a run that is done."""
        self.take()
        self.remove()
        self.release()

    def last_checkpoint(self) -> Path | None:
        """Return the latest checkpoint to go on from; remove what a killed process left half written, or is damaged."""
        found = list(self.checkpoints.glob("checkpoint-*"))
        whole = [folder for folder in found if is_complete(folder)]
        last = max((folder for folder in whole if best_of(folder) in (None, *whole)), key=step_of, default=None)
        if damaged := [folder.name for folder in found if folder not in whole and (folder / COMPLETE).is_file()]:
            back = f"going on from {last.name}" if last else "training anew"
            note(f"{' and '.join(damaged)} in {self.path} was damaged on the disk: {back}")
        kept = [folder for folder in whole if last is not None and step_of(folder) <= step_of(last)]
        self.keep_only(*kept)
        return last

    def keep_latest(self, new: Path) -> None:
        """Remove all but a new checkpoint, the one before, to go back to, and the best one until each of them."""
        earlier = (folder for folder in self.checkpoints.glob("checkpoint-*") if step_of(folder) < step_of(new))
        two = new, max((folder for folder in earlier if (folder / COMPLETE).is_file()), key=step_of, default=None)
        self.keep_only(*two, *(best_of(folder) for folder in two if folder is not None))

    def keep_only(self, *kept: Path | None) -> None:
        """Remove the other checkpoints; each loses its mark first, so that half of one never counts."""
        names = {folder.name for folder in kept if folder is not None}
        for folder in self.checkpoints.glob("checkpoint-*"):
            if folder.name not in names:
                (folder / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def check_unhealed(out: Path) -> None:
    """Raise OutputError unless `out` can be made, as `check_absent` does; remove what its own run left beside it."""
    try:
        check_absent(out)
    except OutputError:
        with suppress(QectomyError, OSError):  # the refusal is what has to be said
            if (folder := RunFolder(out)).is_rest:
                folder.tidy()
        raise


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else -1


def best_of(folder: Path) -> Path | None:
    """Return the best checkpoint of a run when a whole one was saved; None where nothing had been validated."""
    state = folder / "trainer_state.json"
    step = read_record(state).get("best_global_step") if state.is_file() else None
    return folder.with_name(f"checkpoint-{step}") if step else None


def mark_complete(folder: Path) -> None:
    """Bring a checkpoint's files to the disk, then name them and their sha256 in complete.json."""
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE):
        sync(path)
        digests[str(path.relative_to(folder))] = sha256(path)
    write_json(folder / COMPLETE, digests)


def is_complete(folder: Path) -> bool:
    """Say whether complete.json lies in a checkpoint and every file is there as it says."""
    try:
        digests = read_record(folder / COMPLETE)
        files = {folder / name: digest for name, digest in digests.items()}
        return bool(files) and all(path.is_file() and sha256(path) == digest for path, digest in files.items())
    except (QectomyError, OSError):
        return False
