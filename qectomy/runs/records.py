"""JSON on the disk that is there whole or not at all, and of which a flipped byte is noticed."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from qectomy.checkpoint.headers import MAX_JSON_BYTES, parse_json, read_regular
from qectomy.errors import QectomyError, shown

DRAFT = ".draft"
DIGEST = "sha256 of the rest"  # in a record


def read_record(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run's folder. Raises QectomyError for one that was damaged."""
    try:
        data = read_regular(path, MAX_JSON_BYTES)
        found = None if data is None else parse_json(data)
    except (OSError, ValueError) as error:
        raise QectomyError(f"{path} cannot be read ({error}); remove the folder to start anew") from error
    if not isinstance(found, dict):
        raise QectomyError(f"{path} is not what a run writes; remove the folder to start anew")
    digest = found.pop(DIGEST, None)
    if digest is not None and digest != _digest(found):
        raise QectomyError(f"{path} was damaged on the disk after it was written; remove the folder to start anew")
    return found


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object as `write_json` does, so that `read_record` notices when a byte of it flips."""
    write_json(path, value | {DIGEST: _digest(value)})


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that it is there whole or not at all, a power cut notwithstanding."""
    draft = path.with_name(path.name + DRAFT)
    with draft.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return in words where two fingerprints differ."""
    names = sorted({*found, *wanted})
    return [
        f"{_plain(name)} was {_plain(found.get(name))}, is {_plain(wanted.get(name))}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _plain(value: Any) -> str:
    """A value without quotation marks, if it is a short text that can be printed."""
    return value if isinstance(value, str) and len(value) < 300 and value.isprintable() else shown(value)
