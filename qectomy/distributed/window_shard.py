"""Which windows of a run lie in this process, and what is said of all of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qectomy.distributed.process_group import ProcessGroup
from qectomy.errors import QectomyError


@dataclass(frozen=True)
class WindowShard:
    """The runs [start, stop) of a run's fitted and of its evaluation windows that this process holds.

    They are numbered over all processes. Sizes differ by one at most; where there are fewer evaluation windows than
    processes, the last ones hold none.
    """

    processes: ProcessGroup
    n_fitted: int  # over all processes
    n_held: int

    @property
    def fitted(self) -> range:
        return self._own(self.n_fitted)

    @property
    def held(self) -> range:
        return self._own(self.n_held)

    def _own(self, total: int) -> range:
        count, rank = self.processes.world_size, self.processes.rank
        start, stop = (-(-total * first // count) for first in (rank, rank + 1))
        return range(start, stop)

    def fitted_here(self, windows: Sequence[int]) -> list[tuple[int, int]]:
        """Return (place in the list, place in this process) of those fitted windows of a list that lie here."""
        own = self.fitted
        return [(place, window - own.start) for place, window in enumerate(windows) if window in own]

    def number(self, place: int) -> int:
        """Return which window of the run, fitted ones first, is the one at a place in this process."""
        fitted, held = self.fitted, self.held
        if place < len(fitted):
            return fitted.start + place
        return self.n_fitted + held.start + place - len(fitted)

    def sum_numbers(self, *numbers: int | float) -> list[float]:
        """Return the sum over all processes of each number, float64."""
        sums = torch.tensor(numbers, dtype=torch.float64)
        self.processes.all_reduce_(sums)
        return list(sums.tolist())


def whole(n_fitted: int, n_held: int = 0) -> WindowShard:
    """Return the share of one process: all windows."""
    return WindowShard(ProcessGroup("cpu"), n_fitted, n_held)


def shard_windows(processes: ProcessGroup, n_fitted: int, n_held: int) -> WindowShard:
    """Return the share of each process. Raises QectomyError where one would hold no window to fit on."""
    if processes.world_size > n_fitted:
        raise QectomyError(
            f"{processes.world_size} processes, but only {n_fitted} window(s) to fit on, and each needs one: start no "
            "more than that, or give more --tokens"
        )
    return WindowShard(processes, n_fitted, n_held)
