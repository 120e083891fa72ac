"""The command that says what can go from a checkpoint; `cli.py` registers it."""

from typing import Any

from qectomy.api.inspect import inspect as run
from qectomy.commands.terminal import print_json, takes_options_of, usage_errors


@takes_options_of(run)
def inspect(as_json: bool, **given: Any) -> None:
    """Say what each query map would remove, from the config and the file headers alone unless audited."""
    with usage_errors():
        result = run(**given, progress=True)
    if as_json:
        print_json(result)
        return
    from qectomy.report.inspection_table import show_inspection

    show_inspection(result, given["checkpoint"])
