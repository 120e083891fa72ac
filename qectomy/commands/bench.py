"""The command that times two checkpoints side by side; `cli.py` registers it."""

from typing import Any

import typer

from qectomy.api.bench import bench as run
from qectomy.commands.terminal import command_line, print_json, takes_options_of, usage_errors


@takes_options_of(run)
def bench(as_json: bool, **given: Any) -> None:
    """Time loading, prefill and decoding of two checkpoints in turn, next to what the bytes they read allow."""
    with usage_errors():
        result = run(**given, progress=True, command=command_line())
    if as_json:
        print_json(result)
        return
    from qectomy.report.bench_table import show_bench

    show_bench(result)
    if given["save"] is not None:
        typer.echo(f"wrote {given['save']}")
