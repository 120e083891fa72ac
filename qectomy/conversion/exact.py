"""The exact conversion: fold what goes exactly, write it, and measure that the model computes the same.

Nothing is fitted and no text is needed; one layer of the model is in memory at a time.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.checkpoint.config_files import copy_companions, copy_model_code, reduced_config, write_reduced_config
from qectomy.checkpoint.headers import TORCH_NAMES
from qectomy.checkpoint.type_range import check_range
from qectomy.conversion.settings import ConvertSettings, check_context
from qectomy.conversion.stopwatch import Stopwatch
from qectomy.errors import QectomyError, QueryMapError
from qectomy.eval.at_once import RELOAD_TOKENS
from qectomy.eval.layerwise_model import StreamedModel, random_tokens, relative_logit_error, score_streamed
from qectomy.eval.metrics import cost
from qectomy.eval.peak_memory import peak_memory_bytes
from qectomy.eval.protocol import Protocol, ScoringWindows, scoring_windows
from qectomy.eval.reload import check_reload
from qectomy.eval.samples import token_sample
from qectomy.models.query_maps import QueryMapSpec, ranges
from qectomy.progress import Progress
from qectomy.record.base import made
from qectomy.record.base import read_record as read_report
from qectomy.record.reduced import Exact, ExactLayer, FoldPlan, source_of
from qectomy.report.record import write_report
from qectomy.runs.input_hashes import SourceWatch
from qectomy.runs.produce import produce
from qectomy.runs.run_dir import GoOn, finished
from qectomy.surgery.basis import usable_error
from qectomy.surgery.checkpoint import ExactPlan, folding_steps, plan_exact
from qectomy.text.documents import Reading
from qectomy.text.text import load_tokenizer, read_source


def convert_exact(
    source: Checkpoint,
    out: Path,
    settings: ConvertSettings,
    kept: frozenset[int] = frozenset(),
    progress: Progress | None = None,
    *,
    resume: GoOn = False,
    clean: bool = False,
) -> Exact:
    """Write what exact folding leaves of a checkpoint to `out`, and return its report (also in `out`/qectomy.json).

    With an evaluation text (`settings.eval_text`, or the first of its texts) both models' perplexity is measured on
    it. Layers in `kept` stay whole; `resume` and `clean` are those of `convert`. Raises a QectomyError where nothing
    goes exactly or a layer is too ill-conditioned, and for what `convert` refuses, and leaves what that leaves.
    """
    watch = Stopwatch()
    if settings.device != "cpu":
        raise QectomyError(
            f"--device {settings.device}: exact folding computes in float64 on the processor; leave it out"
        )
    held = _windows(source, settings)
    unchanged = SourceWatch(source)
    told = _fingerprint(settings, kept, held) | unchanged.fingerprint
    since = watch.add("hashing", watch.begun)
    if resume and finished(out, told):
        return read_report(out / "qectomy.json", Exact)
    check_range(source, settings.stored_dtype)
    plan = plan_exact(source, settings.stored_dtype, kept, progress)
    since = watch.add("planning", since)

    def finish(folder: Path, digests: dict[str, str]) -> Exact:
        config = reduced_config(source, plan.recipe, settings.stored_dtype or source.dtype)
        write_reduced_config(folder, config | ({"tie_word_embeddings": False} if plan.choice.untied else {}))
        copy_companions(source.folder, folder)
        copy_model_code(source.family, folder)
        measured = _measure(source, folder, held, watch, watch.add("folding", since))
        seconds = watch.seconds | {"total": time.perf_counter() - watch.begun}
        report = Exact(
            **made(settings.command),
            **sizes(source, plan, settings.stored_dtype),
            source=source_of(source, unchanged.weights),
            layers=layer_records(source, plan),
            tie=_tie(source, plan),
            **measured,
            seconds={stage: round(value, 3) for stage, value in seconds.items()},
            peak_memory_bytes=max(peak_memory_bytes(), measured["reload_check"].peak_memory_bytes),
            tensors_sha256=digests,
        )
        write_report(folder, report, source)
        return report

    specs = plan.tensors(source, settings.stored_dtype)
    steps = folding_steps(source, plan, settings.stored_dtype)
    return produce(
        out, told, specs, steps, finish, unchanged, resume=resume, clean=clean, progress=progress, doing="folding"
    )


def _fingerprint(settings: ConvertSettings, kept: frozenset[int], held: ScoringWindows | None) -> dict[str, Any]:
    """Return all that decides what an exact conversion writes and measures, but for the source."""
    told: dict[str, Any] = {"command": "convert", "query": "exact", "dense layers": ranges(sorted(kept))}
    told["dtype"] = settings.dtype
    if held is not None:
        text = f"{held.report.text} (sha256 {held.report.text_sha256})"
        told |= {"eval text": text, "eval tokens": settings.eval_tokens, "context": settings.context}
        told |= {} if settings.field is None else {"field": settings.field}
    return told


def _check_error(error: float, dtype: str) -> None:
    """Raise QueryMapError where rounding, blown up by some fold, left another model than the original."""
    if not error <= usable_error(dtype):
        raise QueryMapError(
            f"folded and stored in {TORCH_NAMES[dtype]}, the logits are off by {error:.1e} of the largest (at most "
            f"{usable_error(dtype):.0e} is rounding): some head or bias is too ill-conditioned. Fold to a wider "
            "--dtype, or find the layer by leaving some whole, as in --query 0-3=dense,4-=exact"
        )


def dry_run_exact(
    source: Checkpoint,
    settings: ConvertSettings,
    kept: frozenset[int] = frozenset(),
    progress: Progress | None = None,
) -> FoldPlan:
    """Return what `convert_exact` would write, by its plan alone; the weights are read, nothing is written."""
    plan = plan_exact(source, settings.stored_dtype, kept, progress)
    return FoldPlan(
        layers=layer_records(source, plan), tie=_tie(source, plan), **sizes(source, plan, settings.stored_dtype)
    )


def layer_records(source: Checkpoint, plan: ExactPlan) -> list[ExactLayer]:
    """Return one record a layer: its maps, the verdict on its W_Q, and the condition numbers behind them."""
    records = []
    for index, spec in enumerate(plan.recipe):
        layer = source.dims.stored_layer(index)
        verdict = plan.choice.verdicts[layer]
        records.append(
            ExactLayer(
                index=index,
                map=str(spec),
                value_map=spec.value,
                output_map=spec.output,
                how=verdict.how,
                reason=verdict.reason,
                W_Q_condition=_finite(verdict.condition),
                basis_condition=_finite(verdict.basis_condition),
                pivot_condition=_finite(plan.pivot_conditions.get(layer)),
                value_reason=plan.left.get(layer),
            )
        )
    return records


def _finite(number: float | None) -> float | None:
    """JSON knows no infinity."""
    return None if number is None or math.isinf(number) else number


def sizes(source: Checkpoint, plan: ExactPlan, dtype: str | None) -> dict[str, Any]:
    """Return parameters and bytes before and after, net: everything added, indices and an untied head, is counted."""
    planned = plan.tensors(source, dtype).values()
    dense = QueryMapSpec("dense").parameters(source.dims)
    stored = plan.recipe[: source.dims.n_stored]
    return {
        "parameters": {"before": source.parameters, "after": sum(torch.Size(spec.shape).numel() for spec in planned)},
        "bytes": {"before": source.nbytes, "after": sum(spec.nbytes for spec in planned)},
        "query_parameters": {
            "before": dense * len(stored),
            "after": sum(spec.parameters(source.dims) for spec in stored),
        },
    }


def _tie(source: Checkpoint, plan: ExactPlan) -> str:
    """Say what became of the tie of embedding and head."""
    return "none" if not source.dims.tied else "broken" if plan.choice.untied else "kept"


def _windows(source: Checkpoint, settings: ConvertSettings) -> ScoringWindows | None:
    """Return the evaluation text in windows, if one was given."""
    name = settings.eval_text or (settings.texts[0] if settings.texts else None)
    if name is None:
        return None
    check_context(source, settings.context)
    protocol = Protocol(context=settings.context, tokens=settings.eval_tokens)
    tokenizer = load_tokenizer(source.folder)
    held = read_source(name, Reading(field=settings.field, tokenizer=lambda: tokenizer))
    return scoring_windows(tokenizer, held, protocol, source.dims.vocab_size)


def _measure(
    source: Checkpoint, work: Path, held: ScoringWindows | None, watch: Stopwatch, since: float
) -> dict[str, Any]:
    """Return the fields of what a comparison of the written model with the original, and with itself reloaded, found.

    Raises QueryMapError where rounding left another model than the original.
    """
    written = open_checkpoint(work, reduced=True)
    tokens = held.tokens[:1] if held else random_tokens(source.dims)
    double = [StreamedModel(checkpoint, torch.float64) for checkpoint in (source, written)]
    theirs, ours = (model.states(tokens)[0, -RELOAD_TOKENS:] for model in double)
    error = relative_logit_error(theirs, ours, *double)
    _check_error(error, written.dtype)
    original, reduced = (StreamedModel(checkpoint) for checkpoint in (source, written))
    result: dict[str, Any] = {"logit_error": error, "logit_error_on": "text" if held else "random tokens"}
    if held is not None:
        before, after = score_streamed([original, reduced], held)
        result |= dict(cost(before, after, held))
        result["token_sample"] = token_sample(source.folder, held, before, after)
    since = watch.add("measuring", since)
    logits = reduced.all_logits(reduced.states(tokens)[0, -RELOAD_TOKENS:])
    reload = check_reload(work, tokens, logits, source.folder, writes=held is not None)
    watch.add("reload", since)
    return result | {"reload_check": reload.check, "generation": reload.generation}
