"""What a conversion will need of this machine, before it begins: memory, disk and time."""

import sys
import time
from typing import Any

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.headers import TORCH_NAMES
from qectomy.conversion.forecast import commands, memory
from qectomy.conversion.forecast.disk import companion_bytes, disk_bytes
from qectomy.conversion.forecast.work import Work, plan_work
from qectomy.errors import QectomyError, note, reason_of
from qectomy.models.query_maps import DEFAULT, QueryMapSpec

FITTED = QueryMapSpec(DEFAULT)  # the map that stands for a fitted conversion where none is named
NOTE = "fitting a little of the first layer, to tell the time; --no-probe leaves it out"
MOST_WEIGHTS = 100_000_000  # of a layer that a processor tries out: a larger one takes minutes, and all of its memory


def forecast(
    source: Checkpoint,
    recipe: tuple[QueryMapSpec, ...] | None = None,
    *,
    tokens: int,
    eval_tokens: int,
    context: int,
    dtype: str | None = None,
    device: str = "cpu",
    refit: bool = True,
    probe: bool = True,
) -> dict[str, Any]:
    """Return the needs of a conversion: its peak memory and the stage in which that falls, its disk, and its seconds.

    On an accelerator the stages are of its memory. Without `probe`, or where no map can be fitted, there are no
    seconds, and torch is not loaded. Nor are there for layers too large to be tried out, which a note tells.
    """
    chosen = recipe or (FITTED,) * source.dims.n_layers
    on_device = device.partition(":")[0] != "cpu"
    work = plan_work(
        source,
        chosen,
        tokens=tokens,
        eval_tokens=eval_tokens,
        context=context,
        dtype=dtype,
        on_device=on_device,
        refit=refit,
    )
    peak, stage, stages = memory.peak(work)
    needs: dict[str, Any] = {
        "peak_memory_bytes": peak,
        "peak_memory_stage": stage,
        "memory_stages": stages,
        "disk_bytes": disk_bytes(source, work, dtype),
        "seconds": None,
        "stages": None,
        "probe_seconds": None,
    }
    if on_device:
        needs["device_memory_bytes"] = max(memory.held_by_stage(work).values())
        needs["peak_memory_bytes"], needs["peak_memory_stage"] = memory.host_peak(work), "writing"
    if probe and source.dims.stock and not source.reduced:
        needs |= _timed(source, work, dtype, device)
    return needs


def forecast_exact(source: Checkpoint, written: int, dtype: str | None = None) -> dict[str, Any]:
    """Return the needs of an exact conversion that writes so many bytes: its memory and its disk."""
    recipe = (QueryMapSpec("dense"),) * source.dims.n_layers
    work = plan_work(source, recipe, tokens=1, eval_tokens=256, context=256, dtype=dtype)
    peak, stage = commands.largest(commands.exact(work))
    copied = companion_bytes(source)
    return {
        "peak_memory_bytes": peak,
        "peak_memory_stage": stage,
        "disk_bytes": written + copied,
        "seconds": None,
        "stages": None,
    }


def _timed(source: Checkpoint, work: Work, dtype: str | None, device: str) -> dict[str, Any]:
    """Return the seconds of each stage, all of them, and those that it took to find out; nothing where that fails."""
    if work.layer > MOST_WEIGHTS and not work.on_device:
        note(
            f"no time is told: a layer of {work.layer:,} weights takes minutes to try out on a processor. The "
            "conversion's own bar tells it after the first layer"
        )
        return {}
    note(NOTE)
    begun, new = time.perf_counter(), "torch" not in sys.modules
    from torch import OutOfMemoryError

    from qectomy.conversion.fitted import check_device
    from qectomy.conversion.forecast.seconds import stage_seconds
    from qectomy.conversion.settings import ConvertSettings

    imports = time.perf_counter() - begun if new else None
    settings = ConvertSettings(
        context=work.context, dtype=TORCH_NAMES[dtype] if dtype else None, device=check_device(device), refit=work.refit
    )
    try:
        stages = stage_seconds(source, work, settings, imports)
    except (QectomyError, OSError, MemoryError, OutOfMemoryError) as error:
        note(
            f"no time is told: trying out the first layer failed ({reason_of(error)}). The conversion may meet that, "
            "too; the trial's files lie where TMPDIR says, and --no-probe leaves it out"
        )
        return {}
    return {
        "seconds": round(sum(stages.values()), 1),
        "stages": {stage: round(seconds, 2) for stage, seconds in stages.items()},
        "probe_seconds": round(time.perf_counter() - begun - (imports or 0.0), 2),
    }
