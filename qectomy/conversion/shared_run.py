"""A run of several processes in one folder: the first one holds it and writes, each has its own hidden states there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qectomy.calibrate.hidden_states import Streams
from qectomy.checkpoint.shards import TensorSpec
from qectomy.conversion.pass_steps import is_whole
from qectomy.distributed.process_group import ProcessGroup
from qectomy.errors import QectomyError
from qectomy.runs.produce import run_dir
from qectomy.runs.records import differences
from qectomy.runs.run_dir import GoOn, RunDir
from qectomy.runs.step_writer import StepWriter


@contextmanager
def shared_folder(
    processes: ProcessGroup, out: Path, fingerprint: dict[str, Any], *, resume: GoOn, clean: bool
) -> Iterator[RunDir]:
    """Yield the folder of a run to all processes; only the first one holds it, and says what is left of it at the end.

    Raises QectomyError where a process does not see the folder.
    """
    if processes.is_main:
        with run_dir(out, fingerprint, resume=resume, clean=clean) as work, processes.collective():
            processes.barrier()
            _check_seen(processes, work)
            yield work
    else:
        with processes.collective():
            processes.barrier()
            work = RunDir(out)
            _check_seen(processes, work)
            yield work


def _check_seen(processes: ProcessGroup, work: RunDir) -> None:
    """Raise QectomyError, naming it, for a process that does not find the first one's folder in its place."""
    seen = processes.all_gather(work.record() if work.path.is_dir() else None)
    for rank, record in enumerate(seen):
        if record != seen[0]:
            raise QectomyError(
                f"process {rank} does not see {work.path}: all processes need one folder; put --out on a disk that all "
                "hosts see"
            )


def check_alike(processes: ProcessGroup, fingerprint: dict[str, Any]) -> None:
    """Raise QectomyError, naming it, for a process that was told something else than the first one."""
    told = processes.all_gather(fingerprint)
    for rank, other in enumerate(told):
        if differing := differences(told[0], other):
            raise QectomyError(f"process {rank} works on something else than process 0: {'; '.join(differing)}")


def own_scratch(work: RunDir, processes: ProcessGroup) -> Path:
    """Return the folder, made if need be, of a process's hidden states."""
    folder = work.scratch / f"process-{processes.rank}" if processes.rank else work.scratch
    folder.mkdir(exist_ok=True)
    return folder


class SharedWriter:
    """A StepWriter in the first process, and in the others what knows the same steps and writes nothing.

    A step of an earlier run counts where every process still has the states that follow it.
    """

    def __init__(self, processes: ProcessGroup, work: RunDir, specs: dict[str, TensorSpec], streams: Streams):
        self.processes, self._streams = processes, streams
        self._writer: StepWriter | None = None
        if processes.is_main:
            self._writer = StepWriter(work, specs, holds=self._holds, whole=is_whole)
        with ExitStack() as opened:
            if self._writer:
                opened.enter_context(self._writer)
            while (layer := self._asked(None)) is not None:
                processes.all_gather(streams.checksums_on_disk(layer))
            self.steps: list[dict[str, Any]] = processes.on_main(self._known)
            opened.pop_all()  # whoever has this closes it

    def _known(self) -> list[dict[str, Any]]:
        assert self._writer is not None
        return self._writer.steps

    def _holds(self, count: int, entry: dict[str, Any]) -> bool:
        """Whether all processes have the states after so many steps; the others answer in their `__init__`."""
        layer = self._asked(count - 1)
        assert layer is not None
        return self.processes.all_gather(self._streams.checksums_on_disk(layer)) == entry.get("states")

    def _asked(self, layer: int | None) -> int | None:
        """Return the layer before which the first process wants to know the states; None: it wants no more."""
        return self.processes.on_main(lambda: layer)

    @property
    def writes(self) -> bool:
        return self._writer is not None

    @property
    def digests(self) -> dict[str, str]:
        return self._writer.digests if self._writer else {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        if self._writer:
            self._writer.write(name, tensor)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        if self._writer:
            self._writer.write_rows(name, start, rows)

    def keep(self, **more: Any) -> None:
        """End a step in all processes: none writes over what the step before needs until this one is kept."""
        if self._writer:
            self._writer.keep(**more)
        self.processes.barrier()

    def finish(self) -> None:
        """Finish the shards; when this returns every process may read them."""
        if self._writer:
            self._writer.finish()
        self.processes.barrier()

    def __enter__(self) -> "SharedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            self._writer.__exit__(kind, error, trace)
