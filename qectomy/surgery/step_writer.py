"""Write the shards of an output step by step, so that no step is lost that was kept."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qectomy.errors import Stopped
from qectomy.surgery.locked_folder import sync
from qectomy.surgery.source_watch import FileWatch
from qectomy.surgery.work_folder import WorkFolder
from qectomy.surgery.writer import MAX_SHARD_BYTES, ShardWriter, TensorSpec, damaged

Holds = Callable[[int, dict[str, Any]], bool]


class StepWriter(ShardWriter):
    """A ShardWriter into a work folder's result. `keep` ends a step; `steps` are those of an earlier process.

    A step of the journal counts as long as its tensors, and those of all steps before, lie on the disk as they were
    written, and as `holds(how many steps, the last one's entry)` says so of what else the run needs to go on from.
    What cannot be trusted is made anew; `lost` is the number of such steps.
    """

    def __init__(
        self,
        folder: WorkFolder,
        tensors: dict[str, TensorSpec],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        holds: Holds = lambda count, entry: True,
    ):
        self._work = folder
        known = list(itertools.takewhile(lambda entry: _is_step(entry, tensors), folder.journal.entries))
        self.steps = _trusted(folder.result, known, tensors, max_shard_bytes, holds)
        self.lost = len(known) - len(self.steps)
        written = {name: digest for step in self.steps for name, digest in step["tensors"].items()}
        if self.steps:
            folder.journal.cut(len(self.steps))
        else:
            folder.begin()
        super().__init__(folder.result, tensors, max_shard_bytes, written if self.steps else None)
        self._kept = len(written)

    @property
    def loss(self) -> str:
        """What to tell of steps that are lost."""
        return f"{self.lost} step(s) were damaged on the disk: they are made anew"

    def keep(self, **more: Any) -> None:
        """Bring the step's tensors to the disk, then its entry: their digests, and what `more` says."""
        self.sync()
        if not self._work.journal.entries:
            sync(self._work.result)  # the shards' names
        new = dict(list(self.digests.items())[self._kept :])
        self._work.journal.append(tensors=new, **more)
        self._kept = len(self.digests)


def write_steps(
    work: WorkFolder,
    tensors: dict[str, TensorSpec],
    steps: Sequence[Callable[[ShardWriter], None]],
    unchanged: FileWatch,
    progress: Callable[[int, int], None] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write an output's tensors step by step, going on from those of an earlier process; return their sha256.

    The first step is what lies outside the layers; progress counts the others.
    """
    with StepWriter(work, tensors, max_shard_bytes) as writer:
        for number in range(len(writer.steps), len(steps)):
            steps[number](writer)
            unchanged.check()
            writer.keep()
            if progress and number:
                progress(number, len(steps) - 1)
        writer.finish()
    check_shards(work.result, tensors, writer.digests, max_shard_bytes)
    return writer.digests


def check_shards(
    folder: Path, tensors: dict[str, TensorSpec], digests: dict[str, str], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Raise Stopped naming a tensor that the disk does not give back as it was written."""
    for name in damaged(folder, tensors, digests, max_shard_bytes):
        raise Stopped(f"tensor {name} is not on the disk as it was written: the disk, or the memory, cannot be trusted")


def _is_step(entry: dict[str, Any], tensors: dict[str, TensorSpec]) -> bool:
    digests = entry.get("tensors")
    return isinstance(digests, dict) and digests.keys() <= tensors.keys()


def _trusted(
    folder: Path, known: list[dict[str, Any]], tensors: dict[str, TensorSpec], max_shard_bytes: int, holds: Holds
) -> list[dict[str, Any]]:
    """Return the first steps that can be gone on from."""
    digests = {name: digest for step in known for name, digest in step["tensors"].items()}
    bad = set(damaged(folder, tensors, digests, max_shard_bytes))
    sound = list(itertools.takewhile(lambda step: bad.isdisjoint(step["tensors"]), known))
    for count in (len(sound), len(sound) - 1):  # what a step needs is there until the next one but one is written
        if count > 0 and holds(count, sound[count - 1]):
            return sound[:count]
    return []
