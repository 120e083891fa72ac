"""Times pieces of a conversion within a budget of seconds, and what is not timed takes from the rate of one product."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.conversion.forecast.checkpoint_speed import CheckpointSpeed, checkpoint_speed
from qectomy.conversion.forecast.work import Work

PIECE_SECONDS = 0.25  # a piece is timed again while it has taken less in all
REPEATS = 4
SLOWER = 3.0  # than one large product a piece may be, in the same work: what is not timed is taken to be so
PRODUCTS = 768  # side of the matrices by which the rate of products is taken


@dataclass
class Speeds:
    """Seconds of each piece at the model's own sizes, and those of a product, of reading and of hashing."""

    checkpoint: CheckpointSpeed
    product: float  # seconds of one product of two float32 numbers in a large matrix
    pieces: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)  # pieces for which no time was left
    seconds: float = 0.0  # that the probe took


class Timer:
    """Times pieces until the budget is spent."""

    def __init__(self, source: Checkpoint, work: Work, device: str, budget: float, clock: Callable[[], float]):
        self.source, self.work, self.device, self.clock = source, work, torch.device(device), clock
        self.begun, self.budget = clock(), budget
        self.generator = torch.Generator().manual_seed(0)
        speed = checkpoint_speed(source, clock)
        self.speeds = Speeds(speed, self._product())

    def piece(self, name: str, works: Sequence[float], run: Callable[[], object]) -> None:
        """Time one piece; `works` are what it does at the model's sizes and at those of `run`."""

        def once() -> float:
            since = self.clock()
            run()
            self.wait()
            return self.clock() - since

        self.timed(name, works, once)

    def timed(self, name: str, works: Sequence[float], once: Callable[[], float], runs: int = 1) -> None:
        """Keep the middle of the seconds that `once` returns, of work that it does `runs` times each time it is called.

        The first time warms up, unless it was long.
        """
        (full, small), found, begun = works, list[float](), self.clock()
        left = self.budget - (begun - self.begun)
        if small * runs * SLOWER * self.speeds.product > left:
            self.speeds.pieces[name] = full * SLOWER * self.speeds.product
            self.speeds.skipped.append(name)
            return
        while len(found) < REPEATS and (not found or self.clock() - begun < PIECE_SECONDS):
            found.append(once())
        self.speeds.pieces[name] = median(found[1:] or found) * full / small

    def difference(
        self, name: str, works: Sequence[float], run: Callable[[int], object], counts: Sequence[int]
    ) -> None:
        """Time one of the equal steps of which `run` makes as many as it is told, whatever it does besides."""
        few, many = counts

        def once() -> float:
            since = self.clock()
            run(few)
            self.wait()
            between = self.clock()
            run(many)
            self.wait()
            longer = self.clock() - between
            return max(longer - (between - since), longer / 10) / (many - few)

        self.timed(name, works, once, runs=few + many)

    def _product(self) -> float:
        a = torch.ones(PRODUCTS, PRODUCTS, device=self.device)
        found = []
        for _ in range(REPEATS):
            since = self.clock()
            a @ a
            self.wait()
            found.append(self.clock() - since)
        return max(min(found), 1e-9) / PRODUCTS**3

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
