"""Several processes that make one output: sums over all of them, and one end for all of them.

Every process calls the methods of `Together` in the same order. Each call begins by asking whether anyone has failed,
and one that has answers, whatever the others are about to do. So none waits for one that is gone, and all raise what
the first of those that failed has to say. A process that is killed or interrupted says nothing: its connections close,
and the others raise `Stopped`.
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


class Together:
    """One process alone: there is nothing to add, to hear or to wait for. Several are `Launched`."""

    count, rank = 1, 0

    def __init__(self, device: str):
        self.device = device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum_(self, *tensors: Tensor) -> None:
        """Put in the place of each tensor its sum over all processes; shapes and types are the same in all."""

    def take_first_(self, *tensors: Tensor) -> None:
        """Put in the place of each tensor the first process's."""

    def first_alone(self, act: Callable[[], T]) -> T:
        """Return what `act` returns in the first process, to all; only that one runs it."""
        return act()

    def gather(self, value: T) -> list[T]:
        """Return every process's value, the first one's first."""
        return [value]

    def meet(self) -> None:
        """Wait for all processes to be here."""

    @contextmanager
    def one_end(self) -> Iterator[None]:
        """Leave the block when all do: with the error of the first process that has one, in all of them."""
        yield

    def wait_for_first(self) -> None:
        """After an end of all, return when the first process is gone: a launcher ends all as soon as one has failed."""

    def leave(self) -> None:
        """Part from the others."""


def join(device: str) -> Together:
    """Return this process among those that torchrun started, or alone. Raises QectomyError as `launch` does."""
    if launch().count == 1:
        return Together(device)
    from qectomy.distributed.launched import Launched

    return Launched(device)
