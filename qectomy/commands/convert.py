"""The command that takes W_Q out of a checkpoint; `cli.py` registers it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qectomy.api.convert import convert as run
from qectomy.commands.heal import show_healed
from qectomy.commands.terminal import command_line, print_json, show_verdict, takes_options_of, usage_errors
from qectomy.distributed.launch import launch
from qectomy.errors import QectomyError

if TYPE_CHECKING:
    from qectomy.record.reduced import Exact, Fitted, FoldPlan, Plan


@takes_options_of(run)
def convert(as_json: bool, **given: Any) -> None:
    """Take W_Q out of a checkpoint in one pass; write the reduced one and its perplexity before and after.

    On several devices: `torchrun --nproc-per-node 8 -m qectomy convert ...`, each with its share of the windows.
    """
    with _one_speaks(), usage_errors():
        report = run(**given, progress=True, command=command_line())
    if report is None:  # another process has it
        return
    if as_json:
        print_json(report)
    else:
        _show(report, given["out"])


@contextmanager
def _one_speaks() -> Iterator[None]:
    """Let the first process alone say what went wrong; the others end without a word."""
    try:
        yield
    except (QectomyError, OSError, KeyboardInterrupt) as error:
        if launch().rank == 0:
            raise
        raise typer.Exit(1) from error


def _show(report: "Fitted | Exact | Plan | FoldPlan", out: Path) -> None:
    """Print what a conversion wrote, or would write."""
    from qectomy.record.reduced import Fitted, FoldPlan, Plan
    from qectomy.report.tables import show_conversion, show_exact, show_plan

    if isinstance(report, Plan):
        show_plan(report)
    elif isinstance(report, FoldPlan):
        show_exact(report)
    elif isinstance(report, Fitted) and report.healing:
        show_healed(report, report.healing, out)
    else:
        if isinstance(report, Fitted):
            show_conversion(report)
        else:
            show_exact(report)
        show_verdict(out)
        typer.echo(f"wrote {out}")
