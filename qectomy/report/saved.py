"""Results in files of their own, which a report picks up: written whole, and never over another's file."""

import os
import tempfile
from pathlib import Path

from qectomy.checkpoint.headers import parse_json
from qectomy.errors import OutputError
from qectomy.record.bench import Bench
from qectomy.record.evaluation import Evaluation


def check_savable(path: Path, kind: str) -> None:
    """Raise OutputError unless `path` is free, or an earlier result of this kind, in a folder that can be written."""
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} is not a folder that can be written to; --save needs one that exists")
    if path.is_symlink() or (path.exists() and not _is_of(path, kind)):
        raise OutputError(f"{path} exists and is no result of {kind}; nothing is overwritten. Give another --save.")


def save_result(result: Evaluation | Bench, path: Path) -> None:
    """Write a result as JSON. Raises OutputError."""
    check_savable(path, result.kind)
    try:
        write_whole(path, result.as_json())
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror}") from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file. A reader sees the file before or after, never half of it, and a failure leaves nothing."""
    descriptor, work = tempfile.mkstemp(prefix=f".{path.name[:80]}.partial-", dir=path.absolute().parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(work, 0o666 & ~umask)
        os.replace(work, path)
    except BaseException:
        Path(work).unlink(missing_ok=True)
        raise


def _is_of(path: Path, kind: str) -> bool:
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("kind") == kind and "qectomy" in found
