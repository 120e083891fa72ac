"""The conversion: one pass over the checkpoint, layer by layer, never the whole model in memory.

    embedding ─► for each layer: read its tensors ─► teacher layer on the teacher's stream
                                                 ─► fit query map and W_K, refit W_O and W_down on the student's stream
                                                 ─► write the reduced tensors ─► student layer on its stream ─► next
              ─► final norm and head ─► perplexity before and after, KL to the teacher, top-1 agreement

Calibration and evaluation windows ride together; the evaluation windows are never fitted on.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.config_files import copy_companions, copy_model_code
from qectomy.checkpoint.sizes import scratch_bytes, totals
from qectomy.checkpoint.type_range import check_range
from qectomy.conversion.final_scores import FinalScores
from qectomy.conversion.layerwise import LayerPass
from qectomy.conversion.settings import ConvertSettings, check_context
from qectomy.conversion.shared_run import check_alike, shared_folder
from qectomy.conversion.stopwatch import Stopwatch
from qectomy.distributed.process_group import ProcessGroup
from qectomy.errors import QectomyError, TextError, UnsupportedArchitecture
from qectomy.eval.metrics import cost
from qectomy.eval.peak_memory import peak_memory_bytes
from qectomy.eval.protocol import Protocol, ScoringWindows, scoring_windows
from qectomy.eval.reload import check_reload
from qectomy.eval.samples import token_sample
from qectomy.models.query_maps import QueryMapSpec, written
from qectomy.progress import Progress
from qectomy.record.base import made
from qectomy.record.base import read_record as read_report
from qectomy.record.reduced import Calibration, Fitted, FitText, Spans, source_of
from qectomy.record.texts import Overlap
from qectomy.report.record import write_report
from qectomy.runs.input_hashes import SourceWatch
from qectomy.runs.output import check_room
from qectomy.runs.run_dir import GoOn, RunDir, finished
from qectomy.runs.step_writer import check_shards
from qectomy.text.documents import Reading
from qectomy.text.overlap import FittedSpans, Sketch
from qectomy.text.text import load_tokenizer, read_source
from qectomy.text.windows import Windows, make_windows


def convert(
    source: Checkpoint,
    out: Path,
    recipe: tuple[QueryMapSpec, ...],
    settings: ConvertSettings,
    progress: Progress | None = None,
    *,
    resume: GoOn = False,
    clean: bool = False,
    processes: ProcessGroup | None = None,
) -> Fitted | None:
    """Write the reduced checkpoint to `out` and return its report (also in `out`/qectomy.json).

    Of several processes, which torchrun started and which `processes` has joined, each calls this and fits on its share
    of the windows; the first one writes, and the others return None.

    Until it is whole it lies in OUT.converting, whence `resume` goes on and which `clean` removes first. Raises a
    QectomyError, and leaves nothing behind, for text that is too short, weights or states that are not finite, an
    output folder that exists. A full or failing disk, a source that changes, an interruption, and whatever goes wrong
    after the last layer, as a result that a fresh process cannot reload, leave what was done; an error whose cause can
    pass is marked as `resumable`.
    """
    processes = processes or ProcessGroup(settings.device)
    with processes.collective():
        heard = progress if processes.is_main else None
        return _convert(source, out, recipe, settings, heard, processes, resume, clean)


def _convert(
    source: Checkpoint,
    out: Path,
    recipe: tuple[QueryMapSpec, ...],
    settings: ConvertSettings,
    progress: Progress | None,
    processes: ProcessGroup,
    resume: GoOn,
    clean: bool,
) -> Fitted | None:
    watch = Stopwatch()
    _check_stock(source)
    check_context(source, settings.context)
    settings.check_refit(source, recipe)
    device = check_device(processes.device)
    needed = totals(source, recipe, settings.stored_dtype)["bytes"]["after"]
    needed += scratch_bytes(source, settings.tokens, settings.eval_tokens)
    processes.on_main(lambda: check_room(out, needed - RunDir(out).nbytes()))
    fitted, held = processes.on_main(lambda: _windows(source, settings))
    since = watch.add("text", watch.begun)
    unchanged = SourceWatch(source, processes.on_main)
    told = fingerprint(recipe, settings, fitted, held) | {"processes": processes.world_size} | unchanged.fingerprint
    check_alike(processes, told)
    if resume and processes.on_main(lambda: finished(out, told)):
        return read_report(out / "qectomy.json", Fitted) if processes.is_main else None
    processes.on_main(lambda: check_range(source, settings.stored_dtype))
    watch.add("hashing", since)
    runner = LayerRunner(source, recipe, settings.context, device)
    with shared_folder(processes, out, told, resume=resume, clean=clean) as work:
        run = LayerPass(source, recipe, settings, runner, fitted, held, unchanged, work, watch, processes)
        scores, digests = run.run(progress)
        processes.barrier()  # all have closed their files
        if scores.expected is None:
            return None
        report = _finish(run, scores, digests, fitted, unchanged)
        unchanged.check()
        work.publish()
    return report


def _check_stock(source: Checkpoint) -> None:
    """Raise UnsupportedArchitecture for a checkpoint that has lost its W_Q, or may have."""
    if source.reduced:
        raise UnsupportedArchitecture(
            f"{source.folder} is of a class of this package ({source.config['model_type']}), and query maps are fitted "
            "to stock models: use --query exact"
        )


def _finish(
    run: LayerPass, scores: FinalScores, digests: dict[str, str], fitted: Windows, unchanged: SourceWatch
) -> Fitted:
    """Write what lies beside the weights, check that the result reloads, and return its report."""
    since, source, result = time.perf_counter(), run.source, run.work.result
    assert scores.expected is not None, "the first process"
    copy_companions(source.folder, result)
    copy_model_code(source.family, result)
    check_shards(result, run.specs, digests)
    reload = check_reload(result, *scores.expected, source.folder)
    run.watch.add("reload", since)
    settings, seconds = run.settings, run.watch.seconds | {"total": run.watch.total}
    report = Fitted(
        **made(settings.command),
        **totals(source, run.recipe, settings.stored_dtype),
        source=source_of(source, unchanged.weights),
        calibration=Calibration(
            texts=[FitText(**told) for told in fitted.sources],
            context=settings.context,
            seed=settings.seed,
            refit=settings.refit,
        ),
        layers=run.layers,
        **dict(cost(scores.before, scores.after, run.held)),
        token_sample=token_sample(source.folder, run.held, scores.before, scores.after),
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        forward_pass_seconds=round(run.forward_pass_seconds(scores.head_seconds), 3),
        peak_memory_bytes=max(peak_memory_bytes(), reload.peak_memory_bytes),
        device=settings.device,
        processes=run.share.processes.world_size,
        reload_check=reload.check,
        generation=reload.generation,
        tensors_sha256=digests,
        fitted_spans=Spans(**fitted.spans["fitted_spans"]),
    )
    write_report(result, report, source)
    return report


def fingerprint(
    recipe: tuple[QueryMapSpec, ...], settings: ConvertSettings, fitted: Windows, held: ScoringWindows
) -> dict[str, Any]:
    """Return all that decides what a conversion computes, but for the source and the number of threads."""
    texts = {f"text {i + 1}": f"{text['file']} (sha256 {text['sha256']})" for i, text in enumerate(fitted.sources)}
    return {
        "command": "convert",
        "query": written(recipe),
        **texts,
        "eval text": f"{held.report.text} (sha256 {held.report.text_sha256})",
        "tokens": settings.tokens,
        "eval tokens": settings.eval_tokens,
        "context": settings.context,
        "dtype": settings.dtype,
        "device": torch.device(settings.device).type,
        "seed": settings.seed,
        **({} if settings.refit else {"refit": "left out (--no-refit)"}),  # older versions noted nothing: all refitted
        **({} if settings.field is None else {"field": settings.field}),
    }


def check_device(name: str) -> str:
    """Return the device if this machine has it. Raises QectomyError otherwise."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise QectomyError(f"--device {name}: not usable here ({str(error).splitlines()[0][:120]})") from error
    return name


def _windows(source: Checkpoint, settings: ConvertSettings) -> tuple[Windows, ScoringWindows]:
    """Tokenize both texts; the evaluation tokens of a text that is also fitted on are left out of the fit."""
    if not settings.texts:
        raise TextError("no calibration text: give --text FILE, some 32,768 tokens of the kind the model is used on")
    tokenizer = load_tokenizer(source.folder)
    reading = Reading(field=settings.field, tokenizer=lambda: tokenizer)
    sources = [read_source(name, reading) for name in settings.texts]
    held_source = read_source(settings.eval_text, reading) if settings.eval_text else sources[0]
    protocol = Protocol(context=settings.context, tokens=settings.eval_tokens)
    held = scoring_windows(tokenizer, held_source, protocol, source.dims.vocab_size)
    fitted = make_windows(
        tokenizer,
        sources,
        context=settings.context,
        tokens=settings.tokens,
        vocab_size=source.dims.vocab_size,
        skip={held_source.sha256: settings.eval_tokens},
    )
    spans = FittedSpans(held.text, Sketch())
    for text in fitted.texts(tokenizer):
        spans.add(text)
    found = spans.record()
    measured = held.report.model_copy(update={"overlap": Overlap(**found["overlap"])})
    return replace(fitted, spans=found), replace(held, report=measured)
