"""The folder of a healing run: what it was told, its data, and checkpoints that are whole or not counted.

    OUT.healing/
      run.json              fingerprint of the run, and its plan: steps, windows a device runs at a time
      train.bin, validation.bin, data.json
      result/               what becomes OUT, once training is done
      checkpoints/checkpoint-N/   what Trainer saves, and complete.json, written last

A process can be killed at any moment. A checkpoint counts once complete.json lies in it and every file that it names
has the size it names; nothing of an older one is removed before.
"""

import re
import shutil
from pathlib import Path

from qectomy.surgery.locked_folder import LockedFolder, read_record, sync, write_json

COMPLETE = "complete.json"


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

    def last_checkpoint(self) -> Path | None:
        """Return the latest whole checkpoint; remove what a killed process left half written."""
        whole = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            if is_complete(folder):
                whole.append(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        return max(whole, key=step_of, default=None)

    def keep_only(self, *kept: Path | None) -> None:
        """Remove the other checkpoints; each loses its mark first, so that half of one never counts."""
        names = {folder.name for folder in kept if folder is not None}
        for folder in self.checkpoints.glob("checkpoint-*"):
            if folder.name not in names:
                (folder / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else -1


def mark_complete(folder: Path) -> None:
    """Bring a checkpoint's files to the disk, then name them and their sizes in complete.json."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE):
        sync(path)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_json(folder / COMPLETE, sizes)


def is_complete(folder: Path) -> bool:
    """Say whether complete.json lies in a checkpoint and every file is there as it says."""
    mark = folder / COMPLETE
    if not mark.is_file():
        return False
    sizes = read_record(mark)
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())
