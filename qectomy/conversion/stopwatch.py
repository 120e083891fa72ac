"""Where the time of a conversion goes, over all processes that worked on it."""

import time
from dataclasses import dataclass, field

from qectomy.checkpoint.memory import release_freed


@dataclass
class Stopwatch:
    """Seconds by stage. Where one ends, what it freed goes back to the system, so that peaks do not add up."""

    seconds: dict[str, float] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)
    earlier: float = 0.0  # seconds of processes that were stopped

    @property
    def total(self) -> float:
        return self.earlier + time.perf_counter() - self.begun

    def go_on_from(self, seconds: dict[str, float], total: float) -> None:
        """Count what an earlier process took of the work that is not done again."""
        self.seconds = {
            stage: self.seconds.get(stage, 0.0) + seconds.get(stage, 0.0) for stage in self.seconds | seconds
        }
        self.earlier = total

    def add(self, stage: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - since
        release_freed()
        return now
