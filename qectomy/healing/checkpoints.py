"""The checkpoints of a healing run, which are whole or not counted.

    OUT.healing/checkpoints/checkpoint-N/   what Trainer saves, and complete.json, written last

A process can be killed at any moment, and disks damage files. A checkpoint counts if complete.json lies in it, every
file has the sha256 that it names, and the best checkpoint until then counts too; the one before it is kept as well.
"""

import re
import shutil
from pathlib import Path

from qectomy.checkpoint.checkpoint import sha256
from qectomy.errors import QectomyError, note
from qectomy.runs.records import read_record, sync, write_json
from qectomy.runs.run_dir import RunDir

COMPLETE = "complete.json"


class Checkpoints:
    """Those of one run, in a folder of its own."""

    def __init__(self, run: RunDir):
        self.run, self.path = run, run.path / "checkpoints"

    def last(self) -> Path | None:
        """Return the latest checkpoint to go on from; remove what a killed process left half written, or is damaged."""
        found = list(self.path.glob("checkpoint-*"))
        whole = [folder for folder in found if is_complete(folder)]
        last = max((folder for folder in whole if best_of(folder) in (None, *whole)), key=step_of, default=None)
        if damaged := [folder.name for folder in found if folder not in whole and (folder / COMPLETE).is_file()]:
            back = f"going on from {last.name}" if last else "training anew"
            note(f"{' and '.join(damaged)} in {self.run.path} was damaged on the disk: {back}")
        kept = [folder for folder in whole if last is not None and step_of(folder) <= step_of(last)]
        self.keep_only(*kept)
        return last

    def keep_latest(self, new: Path) -> None:
        """Remove all but a new checkpoint, the one before, to go back to, and the best one until each of them."""
        earlier = (folder for folder in self.path.glob("checkpoint-*") if step_of(folder) < step_of(new))
        two = new, max((folder for folder in earlier if (folder / COMPLETE).is_file()), key=step_of, default=None)
        self.keep_only(*two, *(best_of(folder) for folder in two if folder is not None))

    def keep_only(self, *kept: Path | None) -> None:
        """Remove the other checkpoints; each loses its mark first, so that half of one never counts."""
        names = {folder.name for folder in kept if folder is not None}
        for folder in self.path.glob("checkpoint-*"):
            if folder.name not in names:
                (folder / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


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
