"""What a run's minutes are spent on: timing, steps and validations; and what scoring takes besides."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qectomy.distributed.process_group import ProcessGroup
from qectomy.healing.models import Distillation
from qectomy.healing.plan import STEPS, at_a_time, batches
from qectomy.healing.settings import HealSettings
from qectomy.runs.run_dir import RunDir

TIMING_SHARE, VALIDATION_SHARE = 0.05, 0.15  # of the minutes, at most
MARGIN = 0.9  # of the minutes are planned for: checkpoints are written, and steps are not all equally fast
LEAST_VALIDATION = 2048  # tokens: from there on validations become fewer before they become shorter
PART = 8  # an eighth of the weights is updated, to time that


@dataclass(frozen=True)
class Budget:
    """A run's tokens, None for one reading of the text, and its validations: `evaluations` after the one at the start.

    The rest is None where nothing was timed; `enough_minutes` also where the minutes give STEPS steps: else it is how
    many would.
    """

    tokens: int | None
    evaluations: int
    validation_tokens: int
    tokens_a_second: float | None = None  # trained on, over all processes
    timing_seconds: float | None = None
    enough_minutes: int | None = None


def budget_of(
    folder: RunDir, settings: HealSettings, model: Any, criterion: Distillation, processes: ProcessGroup
) -> Budget:
    """Return what a run spends on what, kept in its folder: one that is resumed keeps its own.

    With `minutes`, batches are timed first, in the run's own time; the processes are taken to be equally fast.
    """
    if (kept := folder.record().get("budget")) is not None:
        return Budget(**kept)
    budget = Budget(settings.tokens, settings.evaluations, settings.validation_tokens)
    if settings.minutes is not None:
        begun = _now(processes.device)
        rate, update = _speed(settings, model, criterion, processes)
        timing = _now(processes.device) - begun
        budget = _in_time(settings, processes, rate, update, timing)
        folder.note(seconds=round(timing, 3))
    folder.note(budget=asdict(budget))
    return budget


def _in_time(settings: HealSettings, processes: ProcessGroup, rate: float, update: float, timing: float) -> Budget:
    """Return what the minutes are enough for, at `rate` tokens a second and `update` seconds a step besides."""
    assert settings.minutes is not None
    left = max(0.0, 60 * settings.minutes * MARGIN - timing)
    evaluations, validated = _validations(settings, 2 * rate * VALIDATION_SHARE * left)
    for_steps = left - (evaluations + 1) * validated / rate / 2  # a forward of two costs half of what a step does

    tokens = max(settings.context, int(rate * for_steps))
    while tokens > settings.context and tokens / rate + update * _steps(settings, tokens, processes) > for_steps:
        tokens = max(settings.context, tokens * 99 // 100)
    told, enough = settings.tokens, None
    micro, accumulation = batches(settings, STEPS, processes)
    step = micro * accumulation * processes.world_size * settings.context  # the least that one takes
    if tokens < STEPS * step and (told is None or tokens < told):
        whole = STEPS * (step / rate + update) / (1 - VALIDATION_SHARE) + timing
        enough = math.ceil(whole / MARGIN / 60)
    return Budget(tokens if told is None else min(tokens, told), evaluations, validated, rate, timing, enough)


def _validations(settings: HealSettings, affordable: float) -> tuple[int, int]:
    """Return (validations after the first, tokens of each) of so many affordable tokens, at most those asked for."""
    least = min(settings.validation_tokens, LEAST_VALIDATION)
    evaluations = max(1, min(settings.evaluations, int(affordable / least) - 1))
    tokens = min(settings.validation_tokens, int(affordable / (evaluations + 1)))
    return evaluations, max(settings.context, tokens)


def _steps(settings: HealSettings, tokens: int, processes: ProcessGroup) -> int:
    windows = tokens // settings.context
    micro, accumulation = batches(settings, windows, processes)
    return windows // (micro * accumulation * processes.world_size)


def spending(settings: HealSettings, budget: Budget, steps: int, tokens_a_step: int, scored: int) -> list[str]:
    """Say what the minutes are spent on, what comes besides, and whether that is enough; `scored`: tokens measured on.

    Scoring is three forwards, of original, fitted and healed model; a step, two of them and a backward, takes four.
    """
    assert settings.minutes is not None
    assert budget.tokens_a_second is not None
    rate, context = budget.tokens_a_second, settings.context
    validated = max(context, budget.validation_tokens // context * context)
    validations, scoring = (budget.evaluations + 1) * validated / rate / 2, (3 * scored + validated) / rate / 4
    told = [
        f"--minutes {settings.minutes:g} at {rate:,.0f} tokens/s: {budget.timing_seconds:.0f} s of timing, "
        f"{steps:,} step{'s' * (steps != 1)} of {tokens_a_step:,} tokens, {budget.evaluations + 1} validations on "
        f"{validated:,} tokens ({validations:.0f} s); plus about {scoring:.0f} s for scoring before and after, "
        f"on {scored:,} tokens (--eval-tokens), besides loading and checking what is written"
    ]
    if budget.enough_minutes is not None:
        told.append(too_few(settings.minutes, budget.enough_minutes, steps))
    return told


def too_few(minutes: float, enough: int, steps: int) -> str:
    """Say that the minutes give fewer steps than a run is planned to have, and how many would do."""
    return (
        f"--minutes {minutes:g} gives {steps} step{'s' * (steps != 1)} on this machine, and a run is better planned "
        f"with {STEPS}: --minutes {enough} would give about that many"
    )


def _speed(settings: HealSettings, model: Any, criterion: Distillation, processes: ProcessGroup) -> tuple[float, float]:
    """Return (tokens a second of all processes, seconds that the optimizer takes a step); no weight is changed."""
    rate = _tokens_a_second(settings, model, criterion, processes) * processes.world_size
    # Several processes may share out the optimizer's state, of which one holds no whole.
    return rate, _seconds_of_an_update(model, processes.device) if processes.world_size == 1 else 0.0


def _tokens_a_second(settings: HealSettings, model: Any, criterion: Distillation, processes: ProcessGroup) -> float:
    """Return this process's speed, forwards and backwards, on random tokens.

    Batches grow from one window, the least that a step takes, until they are a run's or the next would take more than
    timing's share of the minutes. The first is timed again, for it takes what a process does once, unless it alone was
    too long; so is the last. What is compiled is so for its shape: only a run's own batch counts.
    """
    assert settings.minutes is not None
    model.to(processes.device).train()
    most = at_a_time(settings, processes)
    sizes = [2**power for power in range(most.bit_length()) if 2**power < most] + [most]
    sizes = [most, most] if settings.compile else [sizes[0], *sizes, most]
    starts_slowly = settings.compile or torch.device(processes.device).type != "cpu"
    generator = torch.Generator().manual_seed(0)
    begun, rate = _now(processes.device), 0.0
    for place, windows in enumerate(sizes):
        since = _now(processes.device)
        tokens = torch.randint(model.config.vocab_size, (windows, settings.context), generator=generator)
        tokens = tokens.to(processes.device)
        foretold = since - begun + tokens.numel() / rate if rate else 0.0
        if foretold > 60 * settings.minutes * TIMING_SHARE and not (place == 1 and starts_slowly):
            break
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=settings.compute_dtype == "bfloat16"):
            model(input_ids=tokens, teacher_states=criterion.teach(tokens))["loss"].backward()
        rate = tokens.numel() / (_now(processes.device) - since)
        model.zero_grad()
    return rate


def _seconds_of_an_update(model: Any, device: str) -> float:
    """Return the time of clipping and AdamW, by that of a part of the weights, at a rate of 0 on gradients of 0.

    The first step allocates, and is not it.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, some = sum(parameter.numel() for parameter in trained), list[torch.nn.Parameter]()
    while sum(parameter.numel() for parameter in some) < total / PART:
        some.append(trained[len(some)])
        some[-1].grad = torch.zeros_like(some[-1])
    optimizer = torch.optim.AdamW(some, lr=0.0, weight_decay=0.0, fused=True)
    since = 0.0
    for _ in range(2):
        since = _now(device)
        torch.nn.utils.clip_grad_norm_(some, 1.0)
        optimizer.step()
    took = _now(device) - since
    model.zero_grad()
    return took * total / sum(parameter.numel() for parameter in some)


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
