"""The command that heals a reduced checkpoint; `cli.py` registers it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from qectomy.api.heal import heal as run
from qectomy.commands.terminal import command_line, print_json, show_verdict, takes_options_of, usage_errors

if TYPE_CHECKING:
    from qectomy.record.healing import Healing
    from qectomy.record.reduced import Fitted


@takes_options_of(run)
def heal(as_json: bool, **given: Any) -> None:
    """Win perplexity back: train a reduced checkpoint for a short while to predict what its original predicts.

    On several devices: `torchrun --nproc-per-node 8 -m qectomy heal ...` or `accelerate launch -m qectomy heal ...`
    (DDP, FSDP, DeepSpeed as configured there).
    """
    with usage_errors():
        report = run(**given, progress=True, command=command_line())
    if report is None:  # another process has it
        return
    if as_json:
        print_json(report)
    elif report.healing:
        show_healed(report, report.healing, given["out"])


def show_healed(report: "Fitted", healing: "Healing", out: Path) -> None:
    """Print the outcome of a healing run."""
    from qectomy.report.tables import show_healing

    show_healing(report, healing)
    show_verdict(out)
    typer.echo(f"wrote {out}")
