"""The processes that make one output: what they add up, what they tell each other, and how they end.

Every process calls the methods of its `ProcessGroup` in the same order. A process that fails says why where all can
read it and closes its connections, so that the others, which wait for it or soon will, raise what it has said. A
process that is killed or interrupted says nothing: its connections close, and the others raise `Stopped`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from qectomy.distributed.launch import launch

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any  # one process alone, which prints a plan, has no need of torch

T = TypeVar("T")


class ProcessGroup:
    """One process alone: there is nothing to add, to hear or to wait for. Several are a `LaunchedGroup`."""

    world_size, rank = 1, 0

    def __init__(self, device: str):
        self.device = device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_(self, *tensors: Tensor) -> None:
        """Put in the place of each tensor its sum over all processes; shapes and types are the same in all."""

    def broadcast_(self, *tensors: Tensor) -> None:
        """Put in the place of each tensor the main process's."""

    def on_main(self, act: Callable[[], T]) -> T:
        """Return what `act` returns in the main process, to all; only that one runs it."""
        return act()

    def all_gather(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        return [value]

    def barrier(self) -> None:
        """Wait for all processes to be here."""

    @contextmanager
    def collective(self) -> Iterator[None]:
        """On exit all processes are here; if one has failed, every other one raises its error, or its own."""
        yield


def join(device: str) -> ProcessGroup:
    """Return this process among those that torchrun started, or alone. Raises QectomyError as `launch` does."""
    if launch().count == 1:
        return ProcessGroup(device)
    from qectomy.distributed.launched_group import LaunchedGroup

    return LaunchedGroup(device)
