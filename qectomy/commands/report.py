"""The command that writes the page of reduced checkpoints; `cli.py` registers it."""

from typing import Any

import typer

from qectomy.api.page import page
from qectomy.commands.terminal import note_old_code, print_json, takes_options_of


@takes_options_of(page)
def report(as_json: bool, **given: Any) -> None:
    """Write one HTML page on reduced checkpoints: what was removed, what it cost, whether to believe it.

    It needs nothing beside it and no network. It shows qectomy.json, and where they lie in the folder evaluation.json
    (`eval --save`) and bench.json (`bench --save`).
    """
    note_old_code(given["folders"])
    result = page(**given)
    if as_json:
        print_json(result)
        return
    from qectomy.report.page.table import show_summary

    show_summary(result)
    for card in result["cards"]:
        typer.echo(f"wrote the verdict in {card} anew")
    typer.echo(f"wrote {result['out']}")
