"""The first steps of each Adam, timed: what tells how long all of them will take."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from statistics import median

import torch


@dataclass
class FewSteps:
    """The first few steps of every Adam, timed, and how long all of the steps would have taken."""

    most: int  # steps of each Adam
    taken: float = 0.0  # seconds of those that were taken
    whole: float = 0.0  # and of all

    def of(self, steps: int) -> Iterator[int]:
        """Yield the first few of so many steps. The first warms up; the middle of the others stands for the rest."""
        seconds: list[float] = []
        for step in range(min(steps, self.most)):
            since = time.perf_counter()
            yield step
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - since)
        self.taken += sum(seconds)
        self.whole += sum(seconds) + (steps - len(seconds)) * median(seconds[1:] or seconds)


_few: ContextVar[FewSteps | None] = ContextVar("few", default=None)


@contextmanager
def few_steps(most: int) -> Iterator[FewSteps]:
    """Let every Adam inside the block take its first few steps alone, and yield what they took."""
    few = FewSteps(most)
    before = _few.set(few)
    try:
        yield few
    finally:
        _few.reset(before)


def steps_of(steps: int) -> Iterable[int]:
    """Return the numbers of the steps that an Adam takes of so many: all of them, but inside `few_steps`."""
    few = _few.get()
    return few.of(steps) if few else range(steps)
