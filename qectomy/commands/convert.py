"""The command that takes W_Q out of a checkpoint; `cli.py` registers it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.commands.heal import count, show_healed
from qectomy.commands.terminal import (
    Clean,
    Field,
    Json,
    Resume,
    ResumeOnly,
    command_line,
    print_json,
    usage_errors,
)
from qectomy.distributed.launch import launch
from qectomy.errors import QectomyError

CONTEXT_HELP = "Tokens a window. Default: 512, or what the model was made for if that is less."
NoProbe = Annotated[
    bool, typer.Option("--no-probe", help="Foretell memory and disk alone: fit nothing to tell the time.")
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
    from qectomy.api.convert import convert as run

    with _one_speaks(), usage_errors():
        report = run(
            checkpoint,
            out,
            query=query,
            text=text,
            field=field,
            self_generated=self_generated,
            tokens=tokens,
            context=context,
            eval_text=eval_text,
            eval_tokens=eval_tokens,
            dtype=dtype,
            device=device,
            seed=seed,
            no_refit=no_refit,
            heal=heal,
            dry_run=dry_run,
            no_probe=no_probe,
            resume=resume,
            resume_only=resume_only,
            clean=clean,
            progress=True,
            command=command_line(),
        )
    if not report:  # another process has it
        return
    if as_json:
        print_json(report)
    elif "healing" in report:
        show_healed(report, out)
    else:
        _show(report, out, dry_run)


@contextmanager
def _one_speaks() -> Iterator[None]:
    """Let the first process alone say what went wrong; the others end without a word."""
    try:
        yield
    except (QectomyError, OSError, KeyboardInterrupt) as error:
        if launch().rank == 0:
            raise
        raise typer.Exit(1) from error


def _show(report: dict[str, Any], out: Path, dry_run: bool) -> None:
    """Print what a conversion wrote, or would write."""
    from qectomy.report.tables import show_conversion, show_exact, show_plan

    if "plan" in report:
        show_plan(report)
        return
    if dry_run or report.get("method") == "exact":
        show_exact(report)
    else:
        show_conversion(report)
    if not dry_run:
        typer.echo(f"wrote {out}")
