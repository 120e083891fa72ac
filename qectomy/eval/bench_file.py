"""bench.json: what `qectomy bench` measured, written whole or not at all."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from qectomy.errors import OutputError

FIELDS = {"qectomy", "settings", "models", "ratios"}  # what every such file has


def check_savable(path: Path) -> None:
    """Raise OutputError unless `path` is free, or an earlier result of bench, in a folder that can be written to."""
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} is not a folder that can be written to; --save needs one that exists")
    if path.is_symlink() or (path.exists() and not _is_bench(path)):
        raise OutputError(f"{path} exists and is no result of bench; nothing is overwritten. Give another --save.")


def save_bench(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON. A reader sees the file before or after, never half of it."""
    check_savable(path)
    try:
        descriptor, work = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.absolute().parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(result, indent=2, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.chmod(work, 0o644)
            os.replace(work, path)
        except BaseException:
            Path(work).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror}") from error


def _is_bench(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.keys() >= FIELDS
