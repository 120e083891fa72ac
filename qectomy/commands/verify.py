"""The command that certifies that nothing was lost; `cli.py` registers it."""

from typing import Any

import typer

from qectomy.api.verify import verify as run
from qectomy.commands.terminal import print_json, takes_options_of, usage_errors


@takes_options_of(run)
def verify(as_json: bool, **given: Any) -> None:
    """Certify that a reduced checkpoint computes what its original does; exit code 1 if it is not exact."""
    with usage_errors():
        result = run(**given, progress=True)
    if as_json:
        print_json(result)
    else:
        from qectomy.report.tables import show_certificate

        show_certificate(result)
    if result["verdict"] != "exact":
        raise typer.Exit(1)
