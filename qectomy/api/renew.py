"""`qectomy.renew`: this version's model code into reduced folders that another version wrote."""

from pathlib import Path
from typing import Annotated, Any

from qectomy.api.arguments import begin, names
from qectomy.api.options import Argument, Names, Option
from qectomy.errors import QectomyError


def renew(
    folders: Annotated[Names, Argument("Folders of reduced checkpoints, each changed in its place.", path=True)],
    *,
    dry_run: Annotated[bool, Option("Say what would be written, and write nothing.")] = False,
) -> list[dict[str, Any]]:
    """Put this version's model code into reduced folders; return of each what was done, or would be.

    `state` is `current`, `renewed`, `old` (with `dry_run`) or `refused`, for the `reason` beside it; one folder that is
    refused does not keep the others from being renewed.
    """
    begin(renew, locals())
    from qectomy.surgery.renew import renew as run

    results: list[dict[str, Any]] = []
    for folder in names(folders):
        try:
            results.append(run(Path(folder), dry_run))
        except QectomyError as error:
            results.append({"folder": folder, "state": "refused", "reason": str(error)})
    return results
