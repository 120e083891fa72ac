"""The command that takes W_Q out of a checkpoint; `cli.py` registers it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from qectomy.api.convert import convert as run
from qectomy.commands.heal import show_healed
from qectomy.commands.terminal import command_line, print_json, show_verdict, takes_options_of, usage_errors
from qectomy.distributed.launch import launch
from qectomy.errors import QectomyError


@takes_options_of(run)
def convert(as_json: bool, **given: Any) -> None:
    """Take W_Q out of a checkpoint in one pass; write the reduced one and its perplexity before and after.

    On several devices: `torchrun --nproc-per-node 8 -m qectomy convert ...`, each with its share of the windows.
    """
    with _one_speaks(), usage_errors():
        report = run(**given, progress=True, command=command_line())
    if not report:  # another process has it
        return
    if as_json:
        print_json(report)
    elif "healing" in report:
        show_healed(report, given["out"])
    else:
        _show(report, given["out"], given["dry_run"])


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
        show_verdict(out)
        typer.echo(f"wrote {out}")
