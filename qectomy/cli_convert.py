"""The command that takes W_Q out of a checkpoint; `cli.py` registers it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.cli_heal import count, show
from qectomy.errors import QectomyError
from qectomy.terminal import Clean, Json, Resume, check_out, command_line, print_json, progress_bar

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
            "`exact` takes out what goes without any loss and needs no text; a layer can stay dense beside it."
        ),
    ] = "key-shared",
    text: Annotated[
        list[str] | None,
        typer.Option(help="Calibration text: a UTF-8, .jsonl or .parquet file or a dataset's name. May be repeated."),
    ] = None,
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
    clean: Clean = False,
    as_json: Json = False,
) -> None:
    """Take W_Q out of a checkpoint in one pass; write the reduced one and its perplexity before and after.

    On several devices: `torchrun --nproc-per-node 8 -m qectomy convert ...`, each with its share of the windows.
    """
    from qectomy.calibrate.settings import ConvertSettings, default_context
    from qectomy.surgery.checkpoint import open_checkpoint
    from qectomy.surgery.query_maps import parse_exact, parse_recipe

    with _together(device) as together:
        together.first_alone(lambda: check_out(out, resume, clean))
        source = open_checkpoint(checkpoint)
        settings = ConvertSettings(
            texts=tuple(text or ()),
            tokens=tokens,
            context=context or default_context(source),
            eval_text=eval_text,
            eval_tokens=eval_tokens,
            dtype=dtype,
            device=device,
            seed=seed,
            command=command_line(),
        )
        if text and self_generated:
            raise QectomyError("--self-generated takes the place of a text; give one or the other")
        kept = parse_exact(query, source.dims)
        if kept is not None:
            if heal is not None:
                raise QectomyError("--query exact loses nothing: there is nothing to heal; leave --heal out")
            if together.is_first:  # it fits nothing: there is nothing to share
                _convert_exact(source, out, settings, kept, dry_run, resume, clean, as_json)
            return
        recipe = tuple(parse_recipe(query, source.dims))
        if dry_run:
            if together.is_first:
                _show_plan(source, recipe, settings, not no_probe, as_json)
            return
        if self_generated:
            wanted = settings
            settings = together.first_alone(lambda: _self_generated(source, wanted, heal))
        if heal is not None:
            _convert_and_heal(source, out, recipe, settings, heal, self_generated, resume, clean, as_json)
            return
        _convert(source, out, recipe, settings, together, resume, clean, as_json)


@contextmanager
def _together(device: str) -> Iterator[Any]:
    """Yield this process among those that torchrun started, or alone; the first one alone says what goes wrong."""
    from qectomy.calibrate.together import join

    together = join(device)
    try:
        with together.one_end():
            yield together
    except (QectomyError, OSError, KeyboardInterrupt) as error:
        if together.is_first:
            raise
        together.wait_for_first()
        raise typer.Exit(1) from error
    together.leave()


def _convert(
    source: Any, out: Path, recipe: Any, settings: Any, together: Any, resume: bool, clean: bool, as_json: bool
) -> None:
    """Run `convert` with a fit."""
    from qectomy.calibrate.convert import convert as run

    with progress_bar("converting") as progress:
        report = run(source, out, recipe, settings, progress, resume=resume, clean=clean, together=together)
    if report is None:
        return
    if as_json:
        print_json(report)
    else:
        from qectomy.eval.tables import show_conversion

        show_conversion(report)
        typer.echo(f"wrote {out}")


def _self_generated(source: Any, settings: Any, heal: int | None) -> Any:
    """Return the settings with a text that the model writes, long enough to calibrate, measure and heal on."""
    from qectomy.calibrate.convert import check_device
    from qectomy.calibrate.healing.models import load_teacher
    from qectomy.calibrate.healing.self_generated import sampling_dtype, self_generated_text, tokens_to_write

    settings.check_context(source)
    model = load_teacher(source, sampling_dtype(settings.device), check_device(settings.device))
    apart = 0 if settings.eval_text else settings.eval_tokens
    tokens = apart + max(settings.tokens, (heal or 0) and tokens_to_write(heal))
    with progress_bar("writing") as progress:
        path = self_generated_text(
            source, model, tokens=tokens, length=settings.context, seed=settings.seed, progress=progress
        )
    return replace(settings, texts=(str(path),))


def _convert_and_heal(
    source: Any,
    out: Path,
    recipe: Any,
    settings: Any,
    tokens: int,
    self_generated: bool,
    resume: bool,
    clean: bool,
    as_json: bool,
) -> None:
    """Run `convert --heal`: the fitted checkpoint lies in OUT.fitted until the healed one is there."""
    from qectomy.calibrate.healing.convert_and_heal import convert_and_heal
    from qectomy.calibrate.healing.settings import HealSettings

    heal_settings = HealSettings(
        texts=() if self_generated else settings.texts,
        self_generated=self_generated,
        tokens=tokens,
        context=settings.context,
        eval_text=settings.eval_text,
        eval_tokens=settings.eval_tokens,
        device=settings.device,
        seed=settings.seed,
        command=settings.command,
    )
    with progress_bar("converting and healing") as progress:
        report = convert_and_heal(source, out, recipe, settings, heal_settings, progress, resume=resume, clean=clean)
    show(report, out, as_json)


def _show_plan(source: Any, recipe: Any, settings: Any, probe: bool, as_json: bool) -> None:
    """Print what a conversion would write and need."""
    from qectomy.calibrate.forecast.forecast import forecast
    from qectomy.surgery.plan import totals

    settings.check_context(source)
    needs = forecast(
        source,
        recipe,
        tokens=settings.tokens,
        eval_tokens=settings.eval_tokens,
        context=settings.context,
        dtype=settings.stored_dtype,
        device=settings.device,
        probe=probe,
    )
    plan = {"plan": [str(spec) for spec in recipe], **totals(source, recipe, settings.stored_dtype), "needs": needs}
    if as_json:
        print_json(plan)
    else:
        from qectomy.eval.tables import show_plan

        show_plan(plan)


def _convert_exact(
    source: Any, out: Path, settings: Any, kept: Any, dry_run: bool, resume: bool, clean: bool, as_json: bool
) -> None:
    """Run `convert --query exact`, or with `dry_run` only its plan, which reads the weights."""
    from qectomy.calibrate.convert_exact import convert_exact, dry_run_exact
    from qectomy.eval.tables import show_exact

    with progress_bar("planning" if dry_run else "folding") as progress:
        if dry_run:
            from qectomy.calibrate.forecast.forecast import forecast_exact

            report = dry_run_exact(source, settings, kept, progress)
            report["needs"] = forecast_exact(source, report["bytes"]["after"], settings.stored_dtype)
        else:
            report = convert_exact(source, out, settings, kept, progress, resume=resume, clean=clean)
    if as_json:
        print_json(report)
    else:
        show_exact(report)
        if not dry_run:
            typer.echo(f"wrote {out}")
