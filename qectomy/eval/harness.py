"""Run lm-evaluation-harness on several checkpoints, original and reduced, and put the results side by side."""

import importlib.metadata
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from qectomy.checkpoint.checkpoint import locate
from qectomy.checkpoint.finite import all_finite
from qectomy.errors import NonFiniteError, QectomyError, TextError
from qectomy.eval.harness_tasks import HarnessTasks, describe, quiet_harness
from qectomy.eval.loading import load_model
from qectomy.eval.protocol import positions_of
from qectomy.progress import Progress
from qectomy.record.evaluation import Harness, HarnessRun, Task, TaskValue
from qectomy.text.text import load_tokenizer

MAX_LENGTH = 2048  # tokens; configs promise far more than a task needs, and memory goes with it
BOOTSTRAP_ITERS = 1000  # for standard errors without a formula; lm-eval's own 100,000 take minutes
UNVERSIONED = (None, "N/A", "Yaml")  # what lm-eval says of a task or a group that gives no version


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """How every checkpoint is asked."""

    limit: int | None = None  # only the first documents of each task
    max_length: int | None = None  # tokens; None: MAX_LENGTH, or what every checkpoint was made for if that is less
    batch_size: int = 8
    dtype: str | None = None  # to compute in; None: each checkpoint's own
    device: str = "cpu"


def run_harness(
    checkpoints: Sequence[str],
    tasks: HarnessTasks,
    settings: HarnessSettings | None = None,
    progress: Progress | None = None,
) -> Harness:
    """Return each metric of each task for every checkpoint, with standard errors and the settings behind them.

    One model is in memory at a time, loaded without running code of its folder. Raises NonFiniteError, naming the
    checkpoint and the task, for logits or results that are not finite.
    """
    settings = settings or HarnessSettings()
    max_length = _max_length(checkpoints, settings)
    total = len(checkpoints) * len(tasks.loaded)
    runs: list[dict[str, Any]] = []
    for name in checkpoints:
        done = len(runs) * len(tasks.loaded)

        def report(index: int, task: str, name: str = name, done: int = done) -> None:
            if progress is not None:
                progress(done + index, total, f"{name}: {task}")

        runs.append(_run_checkpoint(name, tasks, settings, max_length, report))
    if progress is not None:
        progress(total, total, "")
    rows: dict[tuple[str, ...], Task] = {}  # a task may be asked for twice: by its name and by its group's
    for asked in tasks.loaded:
        for row in _rows(asked, checkpoints, [run["results"][asked] for run in runs]):
            rows.setdefault((row.task, row.metric, row.filter), row)
    return Harness(
        version=importlib.metadata.version("lm_eval"),
        tasks=list(rows.values()),
        settings=HarnessRun(
            limit=settings.limit,
            max_length=max_length,
            batch_size=settings.batch_size,
            device=settings.device,
            num_fewshot=tasks.num_fewshot,
            bootstrap_iters=BOOTSTRAP_ITERS,
            seeds=_seeds(),
            **{key: [run[key] for run in runs] for key in ("dtype", "truncated", "seconds")},
        ),
    )


def _max_length(checkpoints: Sequence[str], settings: HarnessSettings) -> int:
    """Return how many tokens a question and its answer may have, the same for every checkpoint."""
    positions = {}
    for name in checkpoints:
        load_tokenizer(locate(name))  # what would fail after an hour of another checkpoint should fail now
        positions[name] = positions_of(name) or MAX_LENGTH
    least = min(positions, key=lambda name: positions[name])
    if settings.max_length is None:
        return min(MAX_LENGTH, positions[least])
    if settings.max_length > positions[least]:
        raise TextError(
            f"a length of {settings.max_length} tokens is more than the {positions[least]} positions of {least}; "
            "use that or less"
        )
    return settings.max_length


def _run_checkpoint(
    name: str, tasks: HarnessTasks, settings: HarnessSettings, max_length: int, report: Callable[[int, str], None]
) -> dict[str, Any]:
    """Load one checkpoint and run every task on it."""
    from lm_eval.models.huggingface import HFLM

    start = time.perf_counter()
    report(0, "loading")
    model, folder, dtype = load_model(name, settings.dtype, settings.device)
    results = {}
    with quiet_harness() as truncations, _finite_logits(model):
        harnessed = HFLM(
            pretrained=model,
            tokenizer=load_tokenizer(folder),
            backend="causal",
            max_length=max_length,
            batch_size=settings.batch_size,
        )
        for index, asked in enumerate(tasks.loaded):
            report(index, asked)
            results[asked] = _run_task(harnessed, asked, tasks.loaded[asked], name, settings.limit)
    return {
        "results": results,
        "dtype": dtype,
        "truncated": truncations.count,
        "seconds": round(time.perf_counter() - start, 3),
    }


def _run_task(harnessed: Any, asked: str, loaded: dict[str, Any], name: str, limit: int | None) -> dict[str, Any]:
    """Return what lm-eval's `evaluate` does, from the same seeds as its command line."""
    from lm_eval.evaluator import evaluate

    seeds = _seeds()
    random.seed(seeds["python"])
    np.random.seed(seeds["numpy"])  # noqa: NPY002  (the generator that tasks use)
    torch.manual_seed(seeds["torch"])
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=seeds["fewshot"])
    try:
        return dict(
            evaluate(lm=harnessed, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP_ITERS, log_samples=False)
        )
    except QectomyError as error:
        raise type(error)(f"lm-eval task {asked!r} with {name}: {error}") from error
    except OverflowError as error:
        raise NonFiniteError(f"lm-eval task {asked!r} with {name}: a result is too large to be a number") from error
    except Exception as error:  # tasks are programs: they may fail in any way
        raise QectomyError(f"lm-eval task {asked!r} failed with {name}: {describe(error)}") from error


def _seeds() -> dict[str, int]:
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    return {"python": DEFAULT_RANDOM_SEED, **dict.fromkeys(("numpy", "torch", "fewshot"), DEFAULT_OTHER_SEED)}


@contextmanager
def _finite_logits(model: Any) -> Iterator[None]:
    """Raise NonFiniteError when a logit is NaN or Inf: of NaN, the first of several choices is the likeliest."""

    def check(head: Any, inputs: Any, logits: torch.Tensor) -> None:
        if not all_finite(logits):
            raise NonFiniteError("the model's logits hold NaN or Inf, so that no answer of it means anything")

    handle = model.get_output_embeddings().register_forward_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _rows(asked: str, checkpoints: Sequence[str], results: list[dict[str, Any]]) -> list[Task]:
    """Return one row a task, metric and filter: a group's own first, then those of its tasks."""
    first, rows = results[0], []
    groups = [task for task in first["results"] if task in first["group_subtasks"]]
    for task in dict.fromkeys([*groups, *first["results"]]):
        metrics = first["results"][task]
        for key, value in metrics.items():
            metric, comma, filter_name = key.rpartition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
                continue
            rows.append(
                Task(
                    task=task,
                    group=asked if task != asked else None,
                    metric=metric,
                    filter=filter_name,
                    higher_is_better=first["higher_is_better"].get(task, {}).get(metric),
                    n=int(metrics.get("sample_count", {}).get(key, metrics["sample_len"])),
                    version=None if first["versions"].get(task) in UNVERSIONED else first["versions"][task],
                    num_fewshot=first["n-shot"].get(task),
                    values=[
                        _value(name, task, metric, filter_name, result["results"][task])
                        for name, result in zip(checkpoints, results, strict=True)
                    ],
                )
            )
    return rows


def _value(name: str, task: str, metric: str, filter_name: str, metrics: dict[str, Any]) -> TaskValue:
    value, stderr = metrics[f"{metric},{filter_name}"], metrics.get(f"{metric}_stderr,{filter_name}")
    if not math.isfinite(value):
        raise NonFiniteError(f"lm-eval task {task!r} with {name}: {metric} is {value}, which compares with nothing")
    if not isinstance(stderr, Real) or not math.isfinite(stderr):  # "N/A" where there is no formula
        stderr = None
    return TaskValue(checkpoint=name, value=float(value), stderr=None if stderr is None else float(stderr))
