"""`qectomy.convert`: a fit, that and healing, an exact folding, or the plan of one of these."""

import os
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qectomy.api.arguments import begin, check_out, check_texts, name_or_none, names
from qectomy.api.options import (
    Argument,
    Clean,
    Context,
    Device,
    Field,
    Name,
    Names,
    NoProbe,
    Option,
    Out,
    Resume,
    ResumeOnly,
)
from qectomy.distributed.process_group import ProcessGroup, join
from qectomy.errors import QectomyError, note
from qectomy.models.query_maps import DEFAULT, WRITTEN
from qectomy.progress import Progress, stage

if TYPE_CHECKING:
    from qectomy.checkpoint.checkpoint import Checkpoint
    from qectomy.conversion.settings import ConvertSettings
    from qectomy.models.query_maps import QueryMapSpec
    from qectomy.record.reduced import Exact, Fitted, FoldPlan, Plan
    from qectomy.runs.run_dir import GoOn


def convert(
    checkpoint: Annotated[Name, Argument("Folder or hub id of an original checkpoint.")],
    out: Out,
    *,
    query: Annotated[
        str,
        Option(
            f"Query map: {', '.join(WRITTEN)}, dense; per layer as in 0-2=dense,3-={DEFAULT}. "
            "A dense layer keeps its W_Q. "
            "`exact` takes out what goes without any loss and needs no text; a layer can stay dense beside it."
        ),
    ] = DEFAULT,
    text: Annotated[
        Names | None,
        Option("Calibration text: a file (UTF-8, JSON, .parquet) or a dataset's name. May be repeated."),
    ] = None,
    field: Field = None,
    self_generated: Annotated[
        bool,
        Option("Calibrate, and heal, on text that the model writes itself. This takes the whole model into memory."),
    ] = False,
    tokens: Annotated[int, Option("Calibration tokens, shared evenly among the texts.", min=1)] = 32_768,
    context: Context = None,
    eval_text: Annotated[
        Name | None,
        Option("Text to measure perplexity on, never fitted on. Default: the start of the first --text."),
    ] = None,
    eval_tokens: Annotated[int, Option("Evaluation tokens.", min=1)] = 32_768,
    dtype: Annotated[
        str | None, Option("Type of the written weights: float32, bfloat16, float16. Default: the source's.")
    ] = None,
    device: Device = "cpu",
    seed: Annotated[int, Option("Seed of everything random.", min=0, max=2**63 - 1)] = 0,
    no_refit: Annotated[
        bool,
        Option(
            "Leave W_O and W_down as they are, and so all of a dense layer. Default: they are refitted, from the "
            "first reduced layer on, so that the stream returns to the original's."
        ),
    ] = False,
    heal: Annotated[
        int | None, Option("Then heal on so many tokens of the same text, as 10M: see `heal`.", min=1, counts=True)
    ] = None,
    dry_run: Annotated[bool, Option("Print the plan and what it needs; write nothing.")] = False,
    no_probe: NoProbe = False,
    resume: Resume = False,
    resume_only: ResumeOnly = False,
    clean: Clean = False,
    progress: bool | Progress = False,
    command: str | None = None,
) -> "Fitted | Exact | Plan | FoldPlan | None":
    """Take W_Q out of a checkpoint, write the reduced one to `out` and return its record, which is `out`/qectomy.json.

    The options are those of `qectomy convert`, with `dry_run` the plan is returned. `progress`: True for bars on
    stderr, or a function (done, total, note). `command`: what the record says made it; by default this call. Under
    torchrun every process calls this, and all but the first are returned None. Raises QectomyError.
    """
    command = begin(convert, locals())
    texts, held = names(text), name_or_none(eval_text)
    if not dry_run:  # which notes what is missing
        check_texts([*texts, held], field, context or 16)
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.conversion.settings import ConvertSettings, default_context
    from qectomy.models.query_maps import parse_exact, parse_recipe

    processes = join(device)
    with processes.collective():
        asked = _Asked(
            out=Path(out),
            self_generated=self_generated,
            heal=heal,
            dry_run=dry_run,
            probe=not no_probe,
            resume=processes.on_main(lambda: check_out(Path(out), resume, resume_only, clean)),
            clean=clean,
            progress=progress,
        )
        source = open_checkpoint(os.fspath(checkpoint))
        settings = ConvertSettings(
            texts=texts,
            field=field,
            tokens=tokens,
            context=context or default_context(source),
            eval_text=held,
            eval_tokens=eval_tokens,
            dtype=dtype,
            device=device,
            seed=seed,
            refit=not no_refit,
            command=command,
        )
        if texts and self_generated:
            raise QectomyError("--self-generated takes the place of a text; give one or the other")
        if heal is not None and no_refit:
            raise QectomyError(
                "--heal trains every weight, which --no-refit is to leave alone; convert without --heal, then heal "
                "with `qectomy heal --train query-key`"
            )
        if (kept := parse_exact(query, source.dims)) is None:
            return _fit(source, tuple(parse_recipe(query, source.dims)), settings, asked, processes)
        if heal is not None:
            raise QectomyError("--query exact loses nothing: there is nothing to heal; leave --heal out")
        if no_refit:
            raise QectomyError("--query exact fits nothing: there is nothing to refit; leave --no-refit out")
        # it fits nothing: there is nothing to share
        return _exact(source, settings, kept, asked) if processes.is_main else None


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is asked for besides the settings of a fit."""

    out: Path
    self_generated: bool
    heal: int | None  # tokens
    dry_run: bool
    probe: bool
    resume: "GoOn"
    clean: bool
    progress: bool | Progress


def _fit(
    source: "Checkpoint",
    recipe: "tuple[QueryMapSpec, ...]",
    settings: "ConvertSettings",
    asked: _Asked,
    processes: ProcessGroup,
) -> "Fitted | Plan | None":
    """Run a conversion with a recipe: its plan, its fit, or that and healing."""
    if asked.dry_run:
        if not processes.is_main:
            return None
        plan = _plan(source, recipe, settings, asked.probe)
        _note_what_stops_it(settings, asked)
        return plan
    if asked.self_generated:
        wanted = settings
        settings = processes.on_main(lambda: _self_generated(source, wanted, asked))
    if asked.heal is not None:
        return _fit_and_heal(source, recipe, settings, asked.heal, asked)
    from qectomy.conversion.fitted import convert as run

    with stage(asked.progress, "converting") if processes.is_main else nullcontext() as progress:
        return run(
            source, asked.out, recipe, settings, progress, resume=asked.resume, clean=asked.clean, processes=processes
        )


def _note_what_stops_it(settings: "ConvertSettings", asked: _Asked) -> None:
    """Say on stderr what the conversion would refuse at once, beside what its plan has refused already."""
    from qectomy.runs.run_dir import RunDir

    if not settings.texts and not asked.self_generated:
        note("there is no --text yet to calibrate on")
    for name in filter(None, (*settings.texts, settings.eval_text)):
        if not os.path.exists(name):
            note(f"{name} is no file here; it will be looked for as a dataset")
    if (left := RunDir(asked.out).path).exists() and not (asked.resume or asked.clean):
        note(f"{left} is there: the conversion will want --resume, --clean or another --out")


def _self_generated(source: "Checkpoint", settings: "ConvertSettings", asked: _Asked) -> "ConvertSettings":
    """Return the settings with a text that the model writes, long enough to calibrate, measure and heal on."""
    from qectomy.conversion.fitted import check_device
    from qectomy.conversion.settings import check_context
    from qectomy.healing.models import load_teacher
    from qectomy.healing.self_generated import sampling_dtype, self_generated_text, tokens_to_write

    check_context(source, settings.context)
    model = load_teacher(source, sampling_dtype(settings.device), check_device(settings.device))
    apart = 0 if settings.eval_text else settings.eval_tokens
    tokens = apart + max(settings.tokens, (asked.heal or 0) and tokens_to_write(asked.heal or 0))
    with stage(asked.progress, "writing") as progress:
        path = self_generated_text(
            source,
            source.hashes(),
            model,
            tokens=tokens,
            length=settings.context,
            seed=settings.seed,
            progress=progress,
        )
    return replace(settings, texts=(str(path),))


def _fit_and_heal(
    source: "Checkpoint",
    recipe: "tuple[QueryMapSpec, ...]",
    settings: "ConvertSettings",
    tokens: int,
    asked: _Asked,
) -> "Fitted":
    """Run a fit and healing: the fitted checkpoint lies in OUT.fitted until the healed one is there."""
    from qectomy.healing.convert_and_heal import convert_and_heal
    from qectomy.healing.settings import HealSettings

    heal_settings = HealSettings(
        texts=() if asked.self_generated else settings.texts,
        field=settings.field,
        self_generated=asked.self_generated,
        tokens=tokens,
        context=settings.context,
        eval_text=settings.eval_text,
        eval_tokens=settings.eval_tokens,
        device=settings.device,
        seed=settings.seed,
        command=settings.command,
    )
    with stage(asked.progress, "converting and healing") as progress:
        return convert_and_heal(
            source, asked.out, recipe, settings, heal_settings, progress, resume=asked.resume, clean=asked.clean
        )


def _plan(source: "Checkpoint", recipe: "tuple[QueryMapSpec, ...]", settings: "ConvertSettings", probe: bool) -> "Plan":
    """Return what a conversion would write and need."""
    from qectomy.checkpoint.sizes import totals
    from qectomy.conversion.forecast.forecast import forecast
    from qectomy.conversion.settings import check_context
    from qectomy.record.reduced import Plan

    check_context(source, settings.context)
    settings.check_refit(source, recipe)
    needs = forecast(
        source,
        recipe,
        tokens=settings.tokens,
        eval_tokens=settings.eval_tokens,
        context=settings.context,
        dtype=settings.stored_dtype,
        device=settings.device,
        refit=settings.refit,
        probe=probe,
    )
    totalled = totals(source, recipe, settings.stored_dtype)
    return Plan(plan=[str(spec) for spec in recipe], **totalled, needs=needs)


def _exact(
    source: "Checkpoint", settings: "ConvertSettings", kept: frozenset[int], asked: _Asked
) -> "Exact | FoldPlan":
    """Fold what goes exactly, or return only the plan of it, which reads the weights."""
    from qectomy.conversion.exact import convert_exact, dry_run_exact

    with stage(asked.progress, "planning" if asked.dry_run else "folding") as progress:
        if not asked.dry_run:
            return convert_exact(source, asked.out, settings, kept, progress, resume=asked.resume, clean=asked.clean)
        from qectomy.conversion.forecast.forecast import forecast_exact

        plan = dry_run_exact(source, settings, kept, progress)
        plan.needs = forecast_exact(source, plan.bytes.after, settings.stored_dtype)
        return plan
