"""How long a run is: tokens, steps, and how many windows a device runs at a time."""

import math
from dataclasses import asdict, dataclass, replace

import torch

from qectomy.distributed.process_group import ProcessGroup
from qectomy.errors import QectomyError
from qectomy.healing.settings import HealSettings
from qectomy.runs.run_dir import RunDir
from qectomy.text.packing import Packed, PackedWindows

TOKENS_AT_A_TIME = {"cpu": 4096, "cuda": 16_384}
MOST_TOKENS_A_STEP = 16_384  # where none are given, and ...
STEPS = 100  # ... a run is to have so many steps at least


@dataclass(frozen=True)
class Plan:
    """A run's length. A step takes `windows_a_step` windows over all devices."""

    steps: int
    micro_batch: int  # windows a device runs at a time
    accumulation: int  # how often before a step
    windows_a_step: int
    tokens_a_step: int


def make_plan(
    folder: RunDir, settings: HealSettings, tokens: int | None, packed: Packed, processes: ProcessGroup
) -> Plan:
    """Return the plan of a run of so many tokens, kept in its folder: one that is resumed keeps its own."""
    kept = folder.record().get("plan")
    if kept is not None:
        plan = Plan(**kept)
        count = plan.windows_a_step // plan.micro_batch // plan.accumulation
        if count != processes.world_size:
            raise QectomyError(
                f"{folder.path} holds a run of {count} process(es); go on with as many, not {processes.world_size}"
            )
        a_step = plan.windows_a_step // count
        if settings.micro_batch is not None:  # another number of windows at a time makes the same steps
            micro = max(n for n in range(1, min(settings.micro_batch, a_step) + 1) if a_step % n == 0)
            return replace(plan, micro_batch=micro, accumulation=a_step // micro)
        return plan
    there = PackedWindows(packed.train, settings.context).stored
    windows = there if tokens is None else max(1, tokens // settings.context)
    micro, accumulation = batches(settings, windows, processes)
    step = micro * accumulation * processes.world_size
    # A given number of tokens is not exceeded, but one reading takes every window.
    steps = math.ceil(windows / step) if tokens is None else max(1, windows // step)
    plan = Plan(steps, micro, accumulation, step, step * settings.context)
    folder.note(plan=asdict(plan))
    return plan


def batches(settings: HealSettings, windows: int, processes: ProcessGroup) -> tuple[int, int]:
    """Return (windows a device runs at a time, how often before a step) of a run of so many windows."""
    tokens = settings.batch_tokens or min(MOST_TOKENS_A_STEP, windows * settings.context // STEPS)
    a_step = max(1, round(tokens / settings.context / processes.world_size))  # of one device
    most = at_a_time(settings, processes)
    accumulation = math.ceil(a_step / most)
    return math.ceil(a_step / accumulation), accumulation


def at_a_time(settings: HealSettings, processes: ProcessGroup) -> int:
    """Return how many windows a device runs at a time at most."""
    kind = torch.device(processes.device).type
    return settings.micro_batch or max(1, TOKENS_AT_A_TIME.get(kind, TOKENS_AT_A_TIME["cpu"]) // settings.context)
