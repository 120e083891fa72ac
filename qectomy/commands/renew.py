"""The command that brings reduced folders up to this version; `cli.py` registers it."""

from typing import Any

import typer

from qectomy.api.renew import renew as run
from qectomy.commands.terminal import one_process, print_json, takes_options_of
from qectomy.errors import CheckpointError, clean


@takes_options_of(run)
def renew(as_json: bool, **given: Any) -> None:
    """Put this version's model code into reduced folders that another version wrote.

    The weights stay as they are. The code is one file beside them, modeling_qectomy_*.py; what was changed in it by
    hand is lost. Where this version's config.json says more, that is added, and qectomy.json notes that the folder was
    renewed. A folder that is refused makes the exit code 1; the others are renewed.
    """
    one_process()
    results = run(**given)
    refused = [result for result in results if result["state"] == "refused"]
    if as_json:
        print_json(results)
    else:
        for result in results:
            if result not in refused:
                typer.echo(clean(f"{result['folder']}: {_told(result)}"))
    if refused:
        raise CheckpointError("\n".join(result["reason"] for result in refused))


def _told(result: dict[str, Any]) -> str:
    """Return in words what was done to a folder."""
    if result["state"] == "current":
        return "current already"
    fields = f" (config.json: {', '.join(result['fields'])})" if result["fields"] else ""
    done = "renewed" if result["state"] == "renewed" else "would be renewed"
    return f"{done}: {', '.join(result['files'])}{fields}"
