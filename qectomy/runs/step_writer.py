"""Write the shards of an output step by step, so that no step is lost that was kept."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.shards import MAX_SHARD_BYTES, ShardWriter, TensorSpec, damaged
from qectomy.errors import Stopped, Untrusted, note
from qectomy.progress import Progress
from qectomy.runs.input_hashes import FileWatch
from qectomy.runs.records import sync
from qectomy.runs.run_dir import RunDir

Holds = Callable[[int, dict[str, Any]], bool]


class StepWriter(ShardWriter):
    """A ShardWriter into a run's result. `keep` ends a step; `steps` are those of an earlier process.

    A step of the journal counts as long as its tensors, and those of all steps before, lie on the disk as they were
    written, as `whole(its number, its entry)` says that it has all that its run noted, and as `holds(how many steps,
    the last one's entry)` says so of what else the run needs to go on from.
    What cannot be trusted is made anew, which a note tells; `lost` is the number of such steps whose entries are sound.
    """

    def __init__(
        self,
        run: RunDir,
        tensors: dict[str, TensorSpec],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        holds: Holds = lambda count, entry: True,
        whole: Holds = lambda number, entry: True,
    ):
        self._run = run
        entries, there = run.journal.entries, len(run.journal.entries) + run.journal.damaged
        known = itertools.takewhile(lambda step: _is_step(step[1], tensors) and whole(*step), enumerate(entries))
        sound = _sound(run.result, [entry for _, entry in known], tensors, max_shard_bytes)
        # What a step needs is there until the next one but one is kept.
        counts = (count for count in (len(sound), len(sound) - 1) if count > 0 and holds(count, sound[count - 1]))
        self.steps = sound[: next(counts, 0)]
        self.lost = len(entries) - len(self.steps)
        if again := there - len(self.steps):
            back = f"going back to step {len(self.steps)}" if self.steps else "starting anew"
            more = f"; {again} steps are made again" if again > 1 else ""
            number = min(len(sound) + 1, there)
            note(f"step {number} of {there} in {run.path} was damaged on the disk: {back}{more}")
        written = {name: digest for step in self.steps for name, digest in step["tensors"].items()}
        if self.steps:
            run.journal.cut(len(self.steps))
        else:
            run.check_may_begin()
            run.begin()
        super().__init__(run.result, tensors, max_shard_bytes, written if self.steps else None)
        self._before, self._kept = frozenset(written), len(written)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write a tensor's rows as ShardWriter does. Raises Untrusted for one that an earlier process' steps hold."""
        if name in self._before:
            raise Untrusted(f"the journal holds {name} in a step that does not make it, so no step can be trusted")
        super().write_rows(name, start, rows)

    def finish(self) -> None:
        """End as ShardWriter does. Raises Untrusted for a tensor that should be in a step that the journal holds."""
        if missing := [name for name in self._tensors if self.steps and name not in self.digests]:
            raise Untrusted(f"the journal lacks {missing[0]} in a step that makes it, so no step can be trusted")
        super().finish()
        self._run.whole = True

    def keep(self, **more: Any) -> None:
        """Bring the step's tensors to the disk, then its entry: their digests, and what `more` says."""
        self.sync()
        if not self._run.journal.entries:
            sync(self._run.result)  # the shards' names
        new = dict(list(self.digests.items())[self._kept :])
        self._run.journal.append(tensors=new, **more)
        self._kept = len(self.digests)


def write_steps(
    run: RunDir,
    tensors: dict[str, TensorSpec],
    steps: Sequence[Callable[[ShardWriter], None]],
    unchanged: FileWatch,
    progress: Progress | None = None,
    doing: str = "",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, str]:
    """Write an output's tensors step by step, going on from those of an earlier process; return their sha256."""
    with StepWriter(run, tensors, max_shard_bytes) as writer:
        for number in range(len(writer.steps), len(steps)):
            steps[number](writer)
            unchanged.check()
            writer.keep()
            if progress:
                progress(number + 1, len(steps), doing)
        writer.finish()
    check_shards(run.result, tensors, writer.digests, max_shard_bytes)
    return writer.digests


def check_shards(
    folder: Path, tensors: dict[str, TensorSpec], digests: dict[str, str], max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Raise Stopped naming a tensor that the disk does not give back as it was written."""
    for name in damaged(folder, tensors, digests, max_shard_bytes):
        raise Stopped(f"tensor {name} is not on the disk as it was written: the disk, or the memory, cannot be trusted")


def _is_step(entry: dict[str, Any], tensors: dict[str, TensorSpec]) -> bool:
    digests = entry.get("tensors")
    if not isinstance(digests, dict) or not all(isinstance(digest, str) for digest in digests.values()):
        return False
    return digests.keys() <= tensors.keys()


def _sound(
    folder: Path, known: list[dict[str, Any]], tensors: dict[str, TensorSpec], max_shard_bytes: int
) -> list[dict[str, Any]]:
    """Return the first steps of which all tensors lie on the disk as they were written."""
    digests = {name: digest for step in known for name, digest in step["tensors"].items()}
    bad = set(damaged(folder, tensors, digests, max_shard_bytes))
    return list(itertools.takewhile(lambda step: bad.isdisjoint(step["tensors"]), known))
