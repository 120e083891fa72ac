"""The command that takes W_Q out of a checkpoint; `cli.py` registers it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.commands.heal import count, show
from qectomy.commands.terminal import (
    Clean,
    Field,
    Json,
    Resume,
    ResumeOnly,
    check_out,
    check_texts,
    command_line,
    go_on,
    print_json,
    progress_bar,
)
from qectomy.errors import QectomyError

CONTEXT_HELP = "Tokens a window. Default: 512, or what the model was made for if that is less."
NoProbe = Annotated[
    bool, typer.Option("--no-probe", help="Foretell memory and disk alone, and do not time this machine.")
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")]


def convert(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an original checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    query: Annotated[
        str,
        typer.Option(
            help="Query map: identity, select, key-shared, low-rank:R, dense; per layer as in 0-2=dense,3-=key-shared. "
            "A dense layer keeps its W_Q. "
            "`exact` takes out what goes without any loss and needs no text; a layer can stay dense beside it."
        ),
    ] = "key-shared",
    text: Annotated[
        list[str] | None,
        typer.Option(help="Calibration text: a file (UTF-8, JSON, .parquet) or a dataset's name. May be repeated."),
    ] = None,
    field: Field = None,
    self_generated: Annotated[
        bool,
        typer.Option(
            "--self-generated",
            help="Calibrate, and heal, on text that the model writes itself. This takes the whole model into memory.",
        ),
    ] = False,
    tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens, shared evenly among the texts.")] = 32_768,
    context: Annotated[int | None, typer.Option(min=16, help=CONTEXT_HELP)] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(help="Text to measure perplexity on, never fitted on. Default: the start of the first --text."),
    ] = None,
    eval_tokens: Annotated[int, typer.Option(min=1, help="Evaluation tokens.")] = 32_768,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type of the written weights: float32, bfloat16, float16. Default: the source's."),
    ] = None,
    device: Device = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of everything random.")] = 0,
    no_refit: Annotated[
        bool,
        typer.Option(
            "--no-refit",
            help="Leave W_O and W_down as they are, and so all of a dense layer. Default: they are refitted, from the "
            "first reduced layer on, so that the stream returns to the original's.",
        ),
    ] = False,
    heal: Annotated[
        int | None,
        typer.Option(
            parser=count, metavar="COUNT", help="Then heal on so many tokens of the same text, as 10M: see `heal`."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and what it needs; write nothing.")
    ] = False,
    no_probe: NoProbe = False,
    resume: Resume = False,
    resume_only: ResumeOnly = False,
    clean: Clean = False,
    as_json: Json = False,
) -> None:
    """Take W_Q out of a checkpoint in one pass; write the reduced one and its perplexity before and after.

    On several devices: `torchrun --nproc-per-node 8 -m qectomy convert ...`, each with its share of the windows.
    """
    if not dry_run:  # which notes what is missing
        check_texts([*(text or ()), eval_text], field, context or 16)
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.conversion.settings import ConvertSettings, default_context
    from qectomy.models.query_maps import parse_exact, parse_recipe

    with _together(device) as together:
        together.first_alone(lambda: check_out(out, go_on(resume, resume_only), clean))
        source = open_checkpoint(checkpoint)
        settings = ConvertSettings(
            texts=tuple(text or ()),
            field=field,
            tokens=tokens,
            context=context or default_context(source),
            eval_text=eval_text,
            eval_tokens=eval_tokens,
            dtype=dtype,
            device=device,
            seed=seed,
            refit=not no_refit,
            command=command_line(),
        )
        if text and self_generated:
            raise QectomyError("--self-generated takes the place of a text; give one or the other")
        if heal is not None and no_refit:
            raise QectomyError(
                "--heal trains every weight, which --no-refit is to leave alone; convert without --heal, then heal "
                "with `qectomy heal --train query-key`"
            )
        asked = _Asked(
            out=out,
            self_generated=self_generated,
            heal=heal,
            dry_run=dry_run,
            probe=not no_probe,
            resume=go_on(resume, resume_only),
            clean=clean,
            as_json=as_json,
        )
        if (kept := parse_exact(query, source.dims)) is None:
            _fit(source, tuple(parse_recipe(query, source.dims)), settings, asked, together)
        elif heal is not None:
            raise QectomyError("--query exact loses nothing: there is nothing to heal; leave --heal out")
        elif no_refit:
            raise QectomyError("--query exact fits nothing: there is nothing to refit; leave --no-refit out")
        elif together.is_first:  # it fits nothing: there is nothing to share
            _convert_exact(source, settings, kept, asked)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the command line asks for besides the settings of a fit."""

    out: Path
    self_generated: bool
    heal: int | None  # tokens
    dry_run: bool
    probe: bool
    resume: Any  # as go_on returns it
    clean: bool
    as_json: bool


def _fit(source: Any, recipe: Any, settings: Any, asked: _Asked, together: Any) -> None:
    """Run `convert` with a recipe: its plan, its fit, or that and healing."""
    if asked.dry_run:
        if together.is_first:
            _show_plan(source, recipe, settings, asked.probe, asked.as_json)
            _note_what_stops_it(settings, asked)
        return
    if asked.self_generated:
        wanted = settings
        settings = together.first_alone(lambda: _self_generated(source, wanted, asked.heal))
    if asked.heal is None:
        _convert(source, recipe, settings, asked, together)
    else:
        _convert_and_heal(source, recipe, settings, asked.heal, asked)


def _note_what_stops_it(settings: Any, asked: _Asked) -> None:
    """Say on stderr what the conversion would refuse at once, beside what its plan has refused already."""
    from qectomy.runs.work_folder import WorkFolder

    if not settings.texts and not asked.self_generated:
        typer.echo("note: there is no --text yet to calibrate on", err=True)
    for name in filter(None, (*settings.texts, settings.eval_text)):
        if not os.path.exists(name):
            typer.echo(f"note: {name} is no file here; it will be looked for as a dataset", err=True)
    if (left := WorkFolder(asked.out).path).exists() and not (asked.resume or asked.clean):
        typer.echo(f"note: {left} is there: the conversion will want --resume, --clean or another --out", err=True)


class _UsageError(QectomyError):
    """A message and a hint that the first process turns into typer's error again: that one bears no transport."""


@contextmanager
def _together(device: str) -> Iterator[Any]:
    """Yield this process among those that torchrun started, or alone; the first one alone says what goes wrong."""
    from qectomy.distributed.together import join

    together = join(device)
    try:
        with together.one_end():
            try:
                yield together
            except typer.BadParameter as error:
                raise _UsageError(error.message, error.param_hint) from error
    except _UsageError as error:
        if together.is_first:
            raise typer.BadParameter(error.args[0], param_hint=error.args[1]) from error
        together.wait_for_first()
        raise typer.Exit(2) from error
    except (QectomyError, OSError, KeyboardInterrupt) as error:
        if together.is_first:
            raise
        together.wait_for_first()  # at once, where no end of all has been found
        raise typer.Exit(1) from error
    together.leave()


def _convert(source: Any, recipe: Any, settings: Any, asked: _Asked, together: Any) -> None:
    """Run `convert` with a fit alone; the first process shows what came of it."""
    from qectomy.conversion.fitted import convert as run

    with progress_bar("converting") if together.is_first else nullcontext() as progress:
        report = run(
            source, asked.out, recipe, settings, progress, resume=asked.resume, clean=asked.clean, together=together
        )
    if report is None:
        return
    if asked.as_json:
        print_json(report)
    else:
        from qectomy.report.tables import show_conversion

        show_conversion(report)
        typer.echo(f"wrote {asked.out}")


def _self_generated(source: Any, settings: Any, heal: int | None) -> Any:
    """Return the settings with a text that the model writes, long enough to calibrate, measure and heal on."""
    from qectomy.conversion.fitted import check_device
    from qectomy.conversion.settings import check_context
    from qectomy.healing.models import load_teacher
    from qectomy.healing.self_generated import sampling_dtype, self_generated_text, tokens_to_write

    check_context(source, settings.context)
    model = load_teacher(source, sampling_dtype(settings.device), check_device(settings.device))
    apart = 0 if settings.eval_text else settings.eval_tokens
    tokens = apart + max(settings.tokens, (heal or 0) and tokens_to_write(heal))
    with progress_bar("writing") as progress:
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


def _convert_and_heal(source: Any, recipe: Any, settings: Any, tokens: int, asked: _Asked) -> None:
    """Run `convert --heal`: the fitted checkpoint lies in OUT.fitted until the healed one is there."""
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
    with progress_bar("converting and healing") as progress:
        report = convert_and_heal(
            source, asked.out, recipe, settings, heal_settings, progress, resume=asked.resume, clean=asked.clean
        )
    show(report, asked.out, asked.as_json)


def _show_plan(source: Any, recipe: Any, settings: Any, probe: bool, as_json: bool) -> None:
    """Print what a conversion would write and need."""
    from qectomy.checkpoint.sizes import totals
    from qectomy.conversion.forecast.forecast import forecast
    from qectomy.conversion.settings import check_context

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
    plan = {"plan": [str(spec) for spec in recipe], **totals(source, recipe, settings.stored_dtype), "needs": needs}
    if as_json:
        print_json(plan)
    else:
        from qectomy.report.tables import show_plan

        show_plan(plan)


def _convert_exact(source: Any, settings: Any, kept: Any, asked: _Asked) -> None:
    """Run `convert --query exact`, or only its plan, which reads the weights."""
    from qectomy.conversion.exact import convert_exact, dry_run_exact
    from qectomy.report.tables import show_exact

    with progress_bar("planning" if asked.dry_run else "folding") as progress:
        if asked.dry_run:
            from qectomy.conversion.forecast.forecast import forecast_exact

            report = dry_run_exact(source, settings, kept, progress)
            report["needs"] = forecast_exact(source, report["bytes"]["after"], settings.stored_dtype)
        else:
            report = convert_exact(source, asked.out, settings, kept, progress, resume=asked.resume, clean=asked.clean)
    if asked.as_json:
        print_json(report)
    else:
        show_exact(report)
        if not asked.dry_run:
            typer.echo(f"wrote {asked.out}")
