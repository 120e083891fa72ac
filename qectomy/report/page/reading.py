"""Read what lies in the folder of a reduced checkpoint, checked: `read_folder` and `read_points`."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qectomy.checkpoint.checkpoint import sha256
from qectomy.checkpoint.file_identity import fingerprint
from qectomy.checkpoint.headers import MAX_JSON_BYTES, parse_json, read_regular
from qectomy.errors import ReportError, clean
from qectomy.record.base import AnyRecord, read_record
from qectomy.record.bench import Bench, BenchModel
from qectomy.record.evaluation import Evaluated, Evaluation
from qectomy.report.page.checked import Kind, WrongField
from qectomy.report.page.shapes import CURVE_ROW, POINTS, REDUCED
from qectomy.report.page.stored import LayerSizes, stored_layers


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What is known of one reduced checkpoint; `name` tells it from others. All texts are clean."""

    name: str
    report: dict[str, Any]  # qectomy.json
    evaluation: Evaluation | None = None
    bench: Bench | None = None
    curve: list[dict[str, Any]] = field(default_factory=list)  # of its healing
    layers: list[LayerSizes] = field(default_factory=list)  # by the headers of its weights
    fingerprint: str = ""  # of its files, by which results are known to be its own

    @property
    def results(self) -> Sequence[Evaluated]:
        """What evaluation.json says of checkpoints on a text."""
        return (self.evaluation and self.evaluation.results) or ()

    def owns(self, rows: Sequence[Evaluated | BenchModel]) -> bool:
        """Whether results, one a checkpoint, are of this one too, as far as its own files are there to say."""
        return not self.fingerprint or not self.fingerprints.isdisjoint(row.fingerprint for row in rows)

    @property
    def fingerprints(self) -> set[str]:
        """That of its files, and those of its older configs; none where the files are not there."""
        before = self.report.get("renewed", {}).get("fingerprints", [])
        return {self.fingerprint, *before} if self.fingerprint else set()


@dataclass(frozen=True, kw_only=True)
class Point:
    """Something else to compare with: a share of the parameters removed and what it did to the perplexity."""

    name: str
    parameters_removed: float
    ratio: float
    source: str = ""


def read_folder(path: Path, name: str | None = None) -> Folder:
    """Return what the files of a reduced checkpoint say. Raises ReportError that names the file and the field."""
    if not path.exists():
        raise ReportError(f"no folder {path}; give the folder of a reduced checkpoint")
    if not path.is_dir():
        raise ReportError(f"{path} is a file; give the folder of the reduced checkpoint that it lies in")
    if not (path / "qectomy.json").is_file():
        raise ReportError(
            f"{path} holds no qectomy.json, so there is nothing to report; give a folder that `qectomy convert` or "
            "`qectomy heal` wrote"
        )
    report = read_json(path / "qectomy.json", REDUCED)
    curve = report.get("healing", {}).get("validation", {}).get("curve", [])
    if not curve and (path / "healing.csv").is_file():
        curve = read_curve(path / "healing.csv")
    return Folder(
        name=clean(name or path.resolve().name or str(path)),
        report=report,
        evaluation=_optional(path / "evaluation.json", Evaluation),
        bench=_optional(path / "bench.json", Bench),
        curve=curve,
        layers=stored_layers(path),
        fingerprint=_fingerprint(path),
    )


def _fingerprint(path: Path) -> str:
    try:
        return fingerprint(path)
    except OSError:  # the page of a report alone
        return ""


def read_folders(paths: Sequence[Path]) -> list[Folder]:
    """Return several folders, named by as much of their paths as tells them apart."""
    parts = [path.resolve().parts for path in paths]
    for used in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-used:]) for part in parts]
        if len(set(names)) == len(names):
            return [read_folder(path, name) for path, name in zip(paths, names, strict=True)]
    raise ReportError(f"{paths[0]} and another of the folders are the same one; give each once")


def check_original(folder: Folder, original: Path) -> None:
    """Raise ReportError unless a checkpoint is the one that a reduced one was made from, by the hashes of its files."""
    known = folder.report.get("source", {}).get("sha256", {})
    for name, digest in known.items():
        path = original / name
        if not path.is_file() or sha256(path) != digest:
            raise ReportError(f"{original} is not the original of {folder.name}: its {name} is another one, or missing")


def read_points(path: Path) -> list[Point]:
    """Return the points of a JSON file: [{"name": ..., "parameters_removed": 0.067, "ratio": 1.48, "source": ...}]."""
    return [Point(**point) for point in read_json(path, POINTS)]


def read_json(path: Path, kind: Kind) -> Any:
    """Return the content of a JSON file, checked. Raises ReportError."""
    try:
        data = read_regular(path, MAX_JSON_BYTES)
        if data is None:
            raise ReportError(f"{path} has more bytes than any report has ({MAX_JSON_BYTES:,})")
        raw = parse_json(data)
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ReportError(f"{path} is not JSON ({error}); it was damaged, or is another file: make it again") from error
    try:
        return kind(raw, "")
    except WrongField as error:
        raise ReportError(
            f"{path}: {error}. It was changed by hand, or made by another version; make it again or mend the field"
        ) from error


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a healing.csv, checked like the curve in qectomy.json."""
    rows: list[dict[str, Any]] = []
    try:
        data = read_regular(path, MAX_JSON_BYTES)
        if data is None:
            raise ReportError(f"{path} has more bytes than any report has ({MAX_JSON_BYTES:,})")
        for row in csv.DictReader(io.StringIO(data.decode(), newline="")):
            found = {name: _number(text) for name, text in row.items() if name and isinstance(text, str) and text}
            rows.append(CURVE_ROW(found, f"row {len(rows) + 1}"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise ReportError(f"{path} is not a table in UTF-8 ({error}); make it again, or remove it") from error
    except WrongField as error:
        raise ReportError(f"{path}: {error}. Make it again, or remove it") from error
    return rows


def _optional(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    return read_record(path, kind) if path.exists() else None


def _number(text: str) -> Any:
    """A number as CSV has it; a text that is none stays one, for the check to name."""
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text
