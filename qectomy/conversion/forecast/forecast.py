"""What a conversion will need of this machine, before it begins: memory, disk and time."""

import sys
import time
from typing import Any

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.conversion.forecast import commands, memory
from qectomy.conversion.forecast.disk import companion_bytes, disk_bytes
from qectomy.conversion.forecast.seconds import stage_seconds
from qectomy.conversion.forecast.work import Work, plan_work
from qectomy.errors import note
from qectomy.models.query_maps import QueryMapSpec

FITTED = QueryMapSpec("key-shared")  # the map that stands for a fitted conversion where none is named
NOTE = "timing this machine, up to ten seconds; --no-probe leaves it out"


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
    seconds, and torch is not loaded.
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
        note(NOTE)
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
    """Return the seconds of each stage, all of them, and those that it took to find out."""
    begun, new = time.perf_counter(), "torch" not in sys.modules
    from qectomy.conversion.fitted import check_device
    from qectomy.conversion.forecast.probe import probe

    imports = time.perf_counter() - begun if new else None
    speeds = probe(source, work, check_device(device))
    stages = stage_seconds(source, work, speeds, dtype, imports)
    return {
        "seconds": round(sum(stages.values()), 1),
        "stages": {stage: round(seconds, 2) for stage, seconds in stages.items()},
        "probe_seconds": round(speeds.seconds, 2),
    }
