"""Put this version's model code into a reduced folder that another version wrote, and into its config what it reads.

The weights stay as they are. Each file is written beside the one whose place it takes and renamed, so that who loads
the folder meanwhile reads one or the other, whole. Where the run ends between two files, the folder loads all the same.
"""

import os
import tempfile
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from qectomy import __version__
from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.checkpoint.config_files import code_fields, has_model_code, json_text, stale_model_files
from qectomy.checkpoint.file_identity import fingerprint
from qectomy.checkpoint.headers import read_json
from qectomy.errors import CheckpointError, OutputError, QectomyError, shown
from qectomy.models.architectures import find_reduced_family
from qectomy.models.family import Family
from qectomy.runs.output import cause, interruptible
from qectomy.runs.records import sync

CONFIG, REPORT = "config.json", "qectomy.json"


@dataclass(frozen=True)
class Renewal:
    """What a folder lacks of this version: the content of its files to write, in order, and the config's new fields."""

    files: dict[str, bytes]
    fields: tuple[str, ...]


def renew(folder: Path, dry_run: bool = False) -> dict[str, Any]:
    """Bring model code and config of a reduced folder up to this version; return what was done, or would be.

    Returns {"folder", "state", "files", "fields"}: `state` is `current`, `renewed` or, with `dry_run`, `old`; `files`
    those that were written and `fields` those of config.json that changed. Raises CheckpointError for a folder that is
    no reduced checkpoint, or a damaged one; for one that a newer version wrote; and where a file to write is a link.
    Raises OutputError where the disk refuses.
    """
    renewal = _renewal(folder)
    for name in renewal.files:
        _check_own(folder, name)
    if not dry_run:
        try:
            with interruptible():
                for name, data in renewal.files.items():
                    _put(folder / name, data)
        except OSError as error:
            raise OutputError(
                f"{folder} could not be renewed: {cause(error)}. Each of its files is whole; run it again"
            ) from error
    state = "current" if not renewal.files else "old" if dry_run else "renewed"
    return {"folder": str(folder), "state": state, "files": list(renewal.files), "fields": list(renewal.fields)}


def has_old_code(folder: Path) -> bool:
    """Whether a folder is a reduced checkpoint's, as far as its config says, and its model code not this version's."""
    try:
        config = read_json(folder / CONFIG)
        return isinstance(config, dict) and not has_model_code(find_reduced_family(config), folder)
    except (QectomyError, OSError):
        return False


def _renewal(folder: Path) -> Renewal:
    """Return what is to be written into a folder, which is checked."""
    family, config, checkpoint = _reduced(folder)
    report = _report(folder)
    _check_not_newer(folder, report)
    files = {file.name: file.read_bytes() for file in stale_model_files(family, folder)}
    wanted = _code_fields(family, config) | _index_fields(checkpoint, report or {})
    fields = {name: value for name, value in wanted.items() if config.get(name) != value}
    if fields:
        files[CONFIG] = json_text(config | fields).encode()
    if files and report is not None:
        files[REPORT] = json_text(_noted(folder, report, bool(fields)), sort=False).encode()
    return Renewal(files, tuple(fields))


def _reduced(folder: Path) -> tuple[Family, dict[str, Any], Checkpoint | None]:
    """Return family and config of a folder on this disk, opened. Raises CheckpointError for no reduced checkpoint.

    A quantized folder, whose tensors go by names of its engine, is not opened.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder on this disk, and `qectomy renew` changes a folder in its place: fetch one from "
            "the Hub with `hf download ID --local-dir FOLDER`, and give that"
        )
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG}: not a JSON object")
    try:
        family = find_reduced_family(config)
        quantized = config.get("quantization_config") is not None
        checkpoint = None if quantized else open_checkpoint(folder, reduced=True)
    except QectomyError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    return family, config, checkpoint


def _code_fields(family: Family, config: dict[str, Any]) -> dict[str, Any]:
    """Return what config.json has to say for this version's code to be found: other classes' entries stay."""
    said, own = config.get("auto_map"), code_fields(family)
    return own | {"auto_map": (said if isinstance(said, dict) else {}) | own["auto_map"]}


def _index_fields(checkpoint: Checkpoint | None, report: dict[str, Any]) -> dict[str, Any]:
    """Return the sha256 of the layers' channel numbers, where they are still those of which qectomy.json has the hash.

    Of a folder without such a report nobody knows whether they are. Raises CheckpointError where they are not.
    """
    written = report.get("tensors_sha256")
    if checkpoint is None or not isinstance(written, dict) or checkpoint.config.get("index_sha256") is not None:
        return {}
    for name in filter(checkpoint.family.is_index, checkpoint.tensors):
        if written.get(name) != checkpoint.digest(name):
            raise CheckpointError(
                f"{checkpoint.folder}: the channel numbers {name} are not those that were written, whose sha256 is in "
                "qectomy.json: they were changed, or averaged with another model's. Take the folder as it was written"
            )
    digests = checkpoint.index_digests()
    return {"index_sha256": digests} if any(digests) else {}


def _report(folder: Path) -> dict[str, Any] | None:
    """Return what qectomy.json says; None where there is none, as in a folder that was saved anew after loading."""
    if not (folder / REPORT).exists():
        return None
    report = read_json(folder / REPORT)
    if not isinstance(report, dict):
        raise CheckpointError(f"{folder / REPORT}: not a JSON object")
    return report


def _check_not_newer(folder: Path, report: dict[str, Any] | None) -> None:
    """Raise CheckpointError for a folder whose code comes from a newer version than this."""
    renewed = (report or {}).get("renewed")
    for said in ((report or {}).get("qectomy"), renewed.get("qectomy") if isinstance(renewed, dict) else None):
        try:
            newer = isinstance(said, str) and Version(said) > Version(__version__)
        except InvalidVersion:
            continue
        if newer:
            raise CheckpointError(
                f"{folder} was written by qectomy {shown(said)}, and this is {__version__}: its model code would become"
                " older, not newer. Install that version"
            )


def _noted(folder: Path, report: dict[str, Any], config_changes: bool) -> dict[str, Any]:
    """Return qectomy.json with a note of this renewal; results measured before it know the folder by `fingerprints`."""
    before = report.get("renewed")
    known = before.get("fingerprints") if isinstance(before, dict) else None
    fingerprints = [name for name in known if isinstance(name, str)] if isinstance(known, list) else []
    if config_changes:
        fingerprints.append(fingerprint(folder))
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return report | {"renewed": {"qectomy": __version__, "created": created, "fingerprints": fingerprints}}


def _check_own(folder: Path, name: str) -> None:
    """Raise CheckpointError where a file to write, or the folder, is a link: what it leads to is somebody else's."""
    for path in (folder, folder / name):
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {path.resolve()}, and nothing is written through links. Give the folder that it "
                "leads to, or a copy that has files in their place (`cp -rL`)"
            )
        if path != folder and path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no file: remove it")


def _put(path: Path, data: bytes) -> None:
    """Let a file hold `data`, from one moment to the next, as open to others as it was, or as config.json is."""
    mode = (path if path.exists() else path.with_name(CONFIG)).stat().st_mode & 0o777
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    sync(path.parent)
