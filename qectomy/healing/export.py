"""What is left of a healing run: the healed checkpoint, what it cost, its curve and its report."""

import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.checkpoint.config_files import copy_companions, copy_model_code, with_code, write_reduced_config
from qectomy.checkpoint.finite import all_finite
from qectomy.checkpoint.headers import TORCH_NAMES
from qectomy.checkpoint.shards import ShardWriter, TensorSpec
from qectomy.checkpoint.sizes import totals
from qectomy.errors import NonFiniteError, OutputError
from qectomy.eval.at_once import RELOAD_TOKENS
from qectomy.eval.layerwise_model import StreamedModel, score_streamed
from qectomy.eval.metrics import cost
from qectomy.eval.peak_memory import peak_memory_bytes
from qectomy.eval.protocol import ScoringWindows
from qectomy.eval.reload import Reload, check_reload
from qectomy.eval.samples import token_sample
from qectomy.eval.token_scores import TokenScores
from qectomy.healing.budget import Budget
from qectomy.healing.curve import curve_of, write_curve
from qectomy.healing.models import Distillation, Unchanged
from qectomy.healing.plan import Plan
from qectomy.healing.settings import HealSettings
from qectomy.progress import Progress
from qectomy.record.base import made
from qectomy.record.healing import (
    CurveRow,
    HealedAgreement,
    HealedChange,
    HealedPerplexity,
    HealedText,
    Healing,
    HealingSeconds,
    HealingSettings,
    Spent,
    Validation,
)
from qectomy.record.reduced import Fitted, FittedLayer, Source, read_if_can, source_of
from qectomy.record.scores import Cost
from qectomy.report.record import write_report
from qectomy.runs.output import cause
from qectomy.runs.run_dir import RunDir
from qectomy.text.packing import Packed, PackedWindows

MEASURED = ("original", "fitted", "healed")


@dataclass(frozen=True)
class Outcome:
    """What training came to. `weights` are those of the best validation; `best_step` is 0 if the start was best."""

    weights: dict[str, Tensor]
    history: list[dict[str, Any]]
    plan: Plan
    budget: Budget
    steps: int
    best_step: int
    seconds: float
    trained: int  # parameters
    original_perplexity: float  # on the validation windows
    processes: int
    logs: Path  # TensorBoard's, where it was asked for
    lr: float  # the largest
    generated: dict[str, Any] | None  # the provenance of text that the original wrote


def export(
    run: RunDir,
    student: Checkpoint,
    original: Checkpoint,
    settings: HealSettings,
    outcome: Outcome,
    packed: Packed,
    held: ScoringWindows,
    device: str,
    progress: Progress | None,
    begun: float,
    unchanged: Unchanged,
) -> Fitted:
    """Publish the healed checkpoint, its curve, report and card as the run's output; return the report.

    Raises Stopped, and leaves no output, if a file of either checkpoint is another by then.
    """
    with _result(run) as work:
        digests = _write_weights(student, outcome, work)
        write_reduced_config(work, with_code(student.family, student.config, reduced=True))
        copy_companions(student.folder, work)
        copy_model_code(student.family, work)
        if outcome.logs.is_dir():
            shutil.copytree(outcome.logs, work / "runs")
        curve = curve_of(outcome.history, outcome.plan.tokens_a_step)
        write_curve(work, curve, outcome.original_perplexity, outcome.best_step)
        scores, reload = _measure(student, original, work, held, device, progress)
        costs = {kind: cost(scores["original"], scores[kind], held) for kind in ("fitted", "healed")}
        fitted, source = fitted_report(student), source_of(original, unchanged.original.weights)
        healing = _record(settings, outcome, packed, curve, costs, device, fitted, source, unchanged.student.weights)
        healing.seconds.this_process = round(time.perf_counter() - begun, 3)
        if fitted and healing.teacher_is_source:
            source.name = fitted.source.name  # the hub's, where the fit knew it
        report = Fitted(
            **(_of_the_fit(fitted) if fitted else _without_a_fit(student, original, settings, reload))
            | dict(costs["healed"])
            | {
                "source": source,
                "token_sample": token_sample(original.folder, held, scores["original"], scores["healed"]),
                "reload_check": reload.check,
                "generation": reload.generation,
                "tensors_sha256": digests,
                "fitted_spans": packed.spans.get("fitted_spans"),
                "healing": healing,
            }
        )
        write_report(work, report, replace(original, name=source.name))
        unchanged.check()
        run.publish()
    return report


@contextmanager
def _result(run: RunDir) -> Iterator[Path]:
    """Yield the folder that becomes the output, empty; it is so again after an error, as the disk may be full."""
    run.begin()
    try:
        yield run.result
    except BaseException as error:
        if run.result.exists():  # it has not become the output
            with suppress(OSError):
                run.begin()
        if isinstance(error, OSError):
            raise OutputError(f"{run.out} could not be written: {cause(error)}") from error
        raise


def _write_weights(student: Checkpoint, outcome: Outcome, work: Path) -> dict[str, str]:
    """Write the trained weights in the types of the reduced checkpoint; with best step 0, the weights as they were.

    Returns the sha256 of each tensor.
    """
    specs = {name: TensorSpec(info.shape, info.dtype) for name, info in student.tensors.items()}
    with ShardWriter(work, specs) as writer:
        for name, spec in specs.items():
            tensor = outcome.weights[name] if outcome.best_step else student.read(name)
            stored = tensor.to(getattr(torch, TORCH_NAMES[spec.dtype]))
            if stored.is_floating_point() and not all_finite(stored):
                raise NonFiniteError(f"{name} does not fit in {TORCH_NAMES[spec.dtype]} after healing")
            writer.write(name, stored)
        writer.finish()
    return writer.digests


def _measure(
    student: Checkpoint, original: Checkpoint, work: Path, held: ScoringWindows, device: str, progress: Progress | None
) -> tuple[dict[str, TokenScores], Reload]:
    """Return the scores of original, fitted and healed model, in float32, and what a fresh process found.

    One layer of one of them is in memory at a time, beside what training still holds.
    """
    models = [
        StreamedModel(checkpoint, torch.float32, device)
        for checkpoint in (original, student, open_checkpoint(work, reduced=True))
    ]

    def report(done: int, total: int, _: str) -> None:
        if progress:
            progress(done, total, "measuring, layer by layer")

    scores = dict(zip(MEASURED, score_streamed(models, held, report), strict=True))
    tokens = held.tokens[:1, :RELOAD_TOKENS]
    logits = models[-1].all_logits(models[-1].states(tokens)[0]).cpu()
    return scores, check_reload(work, tokens, logits, original.folder)


@torch.no_grad()
def teacher_perplexity(criterion: Distillation, packed: Packed, settings: HealSettings, device: str) -> float:
    """Return the original's perplexity on the validation windows, computed as the student's was."""
    windows = PackedWindows(packed.validation, settings.context)
    total = 0.0
    for i in range(len(windows)):
        tokens = windows[i]["input_ids"][None].to(device)
        states = criterion.teach(tokens)
        total += float(criterion.of_states(criterion.teacher, states, tokens, states)["nll"].double())
    return float(torch.tensor(total / len(windows), dtype=torch.float64).exp())


def _record(
    settings: HealSettings,
    outcome: Outcome,
    packed: Packed,
    curve: list[CurveRow],
    costs: dict[str, Cost],
    device: str,
    fitted: Fitted | None,
    source: Source,
    hashes: dict[str, str],
) -> Healing:
    """Return what qectomy.json says of the healing; `hashes` are those of the checkpoint that was healed."""
    plan, budget, before, after = outcome.plan, outcome.budget, costs["fitted"], costs["healed"]
    told = asdict(settings) | {"lr": outcome.lr, "evaluations": budget.evaluations}
    told["validation_tokens"] = budget.validation_tokens
    for name in ("command", "texts", "device"):
        told.pop(name)
    return Healing(
        **made(settings.command),
        texts=[HealedText(**text) for text in packed.report],
        self_generated=outcome.generated,
        tokens=outcome.steps * plan.tokens_a_step,
        steps=outcome.steps,
        planned_steps=plan.steps,
        best_step=outcome.best_step,
        trained_parameters=outcome.trained,
        settings=HealingSettings(**told),
        budget=Spent(**asdict(budget)),
        micro_batch=plan.micro_batch,
        accumulation=plan.accumulation,
        tokens_a_step=plan.tokens_a_step,
        processes=outcome.processes,
        device=_device_name(device),
        seconds=HealingSeconds(training=round(outcome.seconds, 3), this_process=0.0),
        validation=Validation(original_perplexity=outcome.original_perplexity, curve=curve),
        perplexity=HealedPerplexity(
            original=before.perplexity.before,
            original_95=before.perplexity.before_95,
            fitted=before.perplexity.after,
            fitted_95=before.perplexity.after_95,
            fitted_ratio=before.perplexity.ratio,
            fitted_ratio_95=before.perplexity.ratio_95,
            healed=after.perplexity.after,
            healed_95=after.perplexity.after_95,
            healed_ratio=after.perplexity.ratio,
            healed_ratio_95=after.perplexity.ratio_95,
        ),
        kl=HealedChange(fitted=before.kl, healed=after.kl),
        top1_agreement=HealedAgreement(fitted=before.top1_agreement, healed=after.top1_agreement),
        fitted_sha256=hashes,
        teacher_is_source=fitted is None or fitted.source.sha256 == source.sha256,
        earlier=fitted.healing if fitted else None,
    )


def _of_the_fit(fitted: Fitted) -> dict[str, Any]:
    """Return what a healed checkpoint's report keeps of the fitted one's; results of that one are not its own."""
    return dict(fitted) | {"renewed": None}


def _without_a_fit(student: Checkpoint, original: Checkpoint, settings: HealSettings, reload: Reload) -> dict[str, Any]:
    """Return the same where nothing is known of the fit but what the weights tell."""
    return {
        **made(settings.command),
        **totals(original, student.recipe, student.dtype),
        "layers": [FittedLayer(index=index, map=str(spec)) for index, spec in enumerate(student.recipe)],
        "seconds": {},
        "peak_memory_bytes": max(peak_memory_bytes(), reload.peak_memory_bytes),
    }


def fitted_report(student: Checkpoint) -> Fitted | None:
    """Return the record of the checkpoint that is healed; None, if there is none of it that can be read."""
    path = student.folder / "qectomy.json"
    found = read_if_can(path) if path.is_file() else None
    return found if isinstance(found, Fitted) and len(found.layers) == student.dims.n_layers else None


def _device_name(device: str) -> str:
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else f"{kind} ({platform.machine()})"
