"""The folder of a healing run: what it was told, its data, and checkpoints that are whole or not counted.

    OUT.healing/
      run.json              fingerprint of the run, and its plan: steps, windows a device runs at a time
      train.bin, validation.bin, data.json
      checkpoints/checkpoint-N/   what Trainer saves, and complete.json, written last

A process can be killed at any moment. A checkpoint counts once complete.json lies in it and every file that it names
has the size it names; nothing of an older one is removed before.
"""

import fcntl
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, TextIO

from qectomy.errors import QectomyError

COMPLETE = "complete.json"
LOCK = "lock"


class RunFolder:
    """The folder of one run, made beside the output."""

    def __init__(self, out: Path):
        out = out.absolute()
        self.path = out.with_name(f"{out.name}.healing")
        self.checkpoints = self.path / "checkpoints"
        self._lock: TextIO | None = None

    def start(self, fingerprint: dict[str, Any], resume: bool) -> bool:
        """Make the folder, or with `resume` enter it again; return whether a run is resumed.

        Raises QectomyError when a run is there and `resume` is not asked for, or when it was another run.
        """
        record = self.path / "run.json"
        if not record.exists():
            found = {path.name for path in self.path.iterdir()} if self.path.exists() else set()
            if others := found - {"checkpoints", "run.json.draft", LOCK}:
                raise QectomyError(f"{self.path} is no run's folder (it holds {min(others)}); give another --out")
            self.path.mkdir(parents=True, exist_ok=True)
            self._take()
            self.checkpoints.mkdir(exist_ok=True)
            write_json(record, {"fingerprint": fingerprint})
            return False
        if not resume:
            raise QectomyError(
                f"{self.path} holds a run that was not finished: go on with --resume, or remove it to start anew"
            )
        self._take()
        before = self.record()["fingerprint"]
        if differing := differences(before, json.loads(json.dumps(fingerprint))):
            raise QectomyError(
                f"{self.path} holds another run: {'; '.join(differing)}. Give what that run was given, or another --out"
            )
        return True

    def _take(self) -> None:
        """Hold the folder until `release`, or until this process is gone. Raises QectomyError if another one does."""
        self._lock = (self.path / LOCK).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise QectomyError(f"{self.path} is in use: another process heals there") from error

    def release(self) -> None:
        """Let other processes go on with the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def nbytes(self) -> int:
        """Return what the folder takes of the disk."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def record(self) -> dict[str, Any]:
        """Return what run.json says."""
        return read_record(self.path / "run.json")

    def note(self, **values: Any) -> None:
        """Keep values in run.json."""
        write_json(self.path / "run.json", self.record() | values)

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

    def remove(self) -> None:
        """Remove the folder: the run is done."""
        shutil.rmtree(self.path, ignore_errors=True)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return in words where two fingerprints differ."""
    names = sorted({*found, *wanted})
    return [
        f"{name} was {found.get(name)}, is {wanted.get(name)}" for name in names if found.get(name) != wanted.get(name)
    ]


def step_of(folder: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(found[1]) if found else -1


def mark_complete(folder: Path) -> None:
    """Bring a checkpoint's files to the disk, then name them and their sizes in complete.json."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != COMPLETE):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_json(folder / COMPLETE, sizes)


def is_complete(folder: Path) -> bool:
    """Say whether complete.json lies in a checkpoint and every file is there as it says."""
    mark = folder / COMPLETE
    if not mark.is_file():
        return False
    sizes = read_record(mark)
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run's folder. Raises QectomyError for one that was damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QectomyError(f"{path} cannot be read ({error}); remove the folder to start anew") from error
    if not isinstance(found, dict):
        raise QectomyError(f"{path} is not what a run writes; remove the folder to start anew")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that it is there whole or not at all."""
    draft = path.with_name(path.name + ".draft")
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
