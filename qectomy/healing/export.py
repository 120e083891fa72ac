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
from qectomy.checkpoint.headers import TORCH_NAMES, read_json
from qectomy.checkpoint.shards import ShardWriter, TensorSpec
from qectomy.checkpoint.sizes import totals
from qectomy.errors import NonFiniteError, OutputError, QectomyError
from qectomy.eval.at_once import RELOAD_TOKENS
from qectomy.eval.layerwise_model import StreamedModel, score_streamed
from qectomy.eval.metrics import cost
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
from qectomy.report.page.reading import read_json as read_report
from qectomy.report.page.shapes import REDUCED
from qectomy.report.record import made, provenance, write_report
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
) -> dict[str, Any]:
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
        healing = _record(
            settings, outcome, packed, curve, scores, held, outcome.generated, device, time.perf_counter() - begun
        )
        report = _report(student, original, settings, healing, held, scores, reload, unchanged)
        report |= {"tensors_sha256": digests, "fitted_spans": packed.spans.get("fitted_spans")}
        name = report["source"].get("name")  # the hub's, where the fit knew it
        write_report(work, report, replace(original, name=name) if isinstance(name, str) else original)
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
    curve: list[dict[str, int | float | None]],
    scores: dict[str, TokenScores],
    held: ScoringWindows,
    generated: dict[str, Any] | None,
    device: str,
    total_seconds: float,
) -> dict[str, Any]:
    """Return what qectomy.json says of the healing; `generated` is where text that the original wrote comes from."""
    plan = outcome.plan
    costs = {kind: cost(scores["original"], scores[kind], held) for kind in ("fitted", "healed")}
    told = asdict(settings) | {"lr": outcome.lr, "evaluations": outcome.budget.evaluations}
    told["validation_tokens"] = outcome.budget.validation_tokens
    for name in ("command", "texts", "device"):
        told.pop(name)
    return {
        "texts": packed.report,
        "self_generated": generated,
        "tokens": outcome.steps * plan.tokens_a_step,
        "steps": outcome.steps,
        "planned_steps": plan.steps,
        "best_step": outcome.best_step,
        "trained_parameters": outcome.trained,
        "settings": told,
        "budget": asdict(outcome.budget),
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "tokens_a_step": plan.tokens_a_step,
        "processes": outcome.processes,
        "device": _device_name(device),
        "seconds": {"training": round(outcome.seconds, 3), "this_process": round(total_seconds, 3)},
        "validation": {"original_perplexity": outcome.original_perplexity, "curve": curve},
        "perplexity": {
            "original": costs["fitted"]["perplexity"]["before"],
            "original_95": costs["fitted"]["perplexity"]["before_95"],
            **{kind: found["perplexity"]["after"] for kind, found in costs.items()},
            **{f"{kind}_95": found["perplexity"]["after_95"] for kind, found in costs.items()},
            **{f"{kind}_ratio": found["perplexity"]["ratio"] for kind, found in costs.items()},
            **{f"{kind}_ratio_95": found["perplexity"]["ratio_95"] for kind, found in costs.items()},
        },
        "kl": {kind: found["kl"] for kind, found in costs.items()},
        "top1_agreement": {kind: found["top1_agreement"] for kind, found in costs.items()},
    }


def _report(
    student: Checkpoint,
    original: Checkpoint,
    settings: HealSettings,
    healing: dict[str, Any],
    held: ScoringWindows,
    scores: dict[str, TokenScores],
    reload: Reload,
    inputs: Unchanged,
) -> dict[str, Any]:
    """Return the fitted checkpoint's report with the healing; costs and the reload check are the healed model's."""
    made_by = provenance(original, settings.command, inputs.original.weights)
    report = {
        **made_by,
        "layers": [{"index": index, "map": str(spec)} for index, spec in enumerate(student.recipe)],
        **totals(original, student.recipe, student.dtype),
        **fitted_report(student),
    }
    healing |= {"earlier": report["healing"]} if "healing" in report else {}
    teacher = made_by["source"]
    healing |= {"teacher_is_source": report["source"].get("sha256") == teacher["sha256"]}
    if healing["teacher_is_source"]:
        teacher = teacher | {"name": report["source"].get("name", teacher["name"])}  # the hub's, where the fit knew it
    report["source"] = teacher
    return {
        **report,
        **cost(scores["original"], scores["healed"], held),
        "token_sample": token_sample(original.folder, held, scores["original"], scores["healed"]),
        **reload.record(),
        "healing": {**made(settings.command), "fitted_sha256": inputs.student.weights, **healing},
    }


def fitted_report(student: Checkpoint) -> dict[str, Any]:
    """Return the qectomy.json of the checkpoint that is healed; nothing, if there is none that can be read."""
    path = student.folder / "qectomy.json"
    try:
        read_report(path, REDUCED)  # every field that is known is what it should be
        found = {name: value for name, value in read_json(path).items() if value is not None}
    except QectomyError:
        return {}
    return found if len(found.get("layers", [])) == student.dims.n_layers else {}


def _device_name(device: str) -> str:
    kind = torch.device(device).type
    return torch.cuda.get_device_name(device) if kind == "cuda" else f"{kind} ({platform.machine()})"
