"""The command that brings reduced folders up to this version; `cli.py` registers it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.commands.terminal import Json, one_process, print_json


def renew(
    folders: Annotated[list[Path], typer.Argument(help="Folders of reduced checkpoints, each changed in its place.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Put this version's model code into reduced folders that another version wrote.

    The weights stay as they are. The code is one file beside them, modeling_qectomy_*.py; what was changed in it by
    hand is lost. Where this version's config.json says more, that is added, and qectomy.json notes that the folder was
    renewed. A folder that is refused makes the exit code 1; the others are renewed.
    """
    from qectomy.errors import CheckpointError, QectomyError
    from qectomy.surgery.renew import renew as run

    one_process()
    results: list[dict[str, Any]] = []
    for folder in folders:
        try:
            results.append(run(folder, dry_run))
        except QectomyError as error:
            results.append({"folder": str(folder), "state": "refused", "reason": str(error)})
        if not as_json and results[-1]["state"] != "refused":
            typer.echo(_told(results[-1]))
    if as_json:
        print_json(results)
    if refused := [result["reason"] for result in results if result["state"] == "refused"]:
        raise CheckpointError("\n".join(refused))


def _told(result: dict[str, Any]) -> str:
    """Return in words what was done to a folder."""
    from qectomy.errors import clean

    if result["state"] == "current":
        return clean(f"{result['folder']}: current already")
    fields = f" (config.json: {', '.join(result['fields'])})" if result["fields"] else ""
    done = "renewed" if result["state"] == "renewed" else "would be renewed"
    return clean(f"{result['folder']}: {done}: {', '.join(result['files'])}{fields}")
