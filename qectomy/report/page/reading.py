"""Read what lies in the folder of a reduced checkpoint, checked: `read_folder` and `read_points`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ConfigDict

from qectomy.checkpoint.checkpoint import sha256
from qectomy.checkpoint.file_identity import fingerprint
from qectomy.errors import ReportError, clean
from qectomy.record.base import AnyRecord, Positive, Record, Share, Text, read_record
from qectomy.record.bench import Bench, BenchModel
from qectomy.record.evaluation import Evaluated, Evaluation
from qectomy.record.reduced import Reduced, read_reduced
from qectomy.report.page.stored import LayerSizes, stored_layers


@dataclass(frozen=True, kw_only=True)
class Folder:
    """What is known of one reduced checkpoint; `name` tells it from others. All texts are clean."""

    name: str
    report: Reduced  # qectomy.json
    evaluation: Evaluation | None = None
    bench: Bench | None = None
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
        before = self.report.renewed.fingerprints if self.report.renewed else []
        return {self.fingerprint, *before} if self.fingerprint else set()


class Point(Record):
    """Something else to compare with: a share of the parameters removed and what it did to the perplexity."""

    model_config = ConfigDict(extra="forbid")

    name: Text
    parameters_removed: Share
    ratio: Positive
    source: Text = ""


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
    return folder_of(
        path,
        read_reduced(path / "qectomy.json"),
        name,
        evaluation=_optional(path / "evaluation.json", Evaluation),
        bench=_optional(path / "bench.json", Bench),
    )


def folder_of(
    path: Path,
    report: Reduced,
    name: str | None = None,
    evaluation: Evaluation | None = None,
    bench: Bench | None = None,
) -> Folder:
    """Return what is known of a folder by its report and by the weights that lie there."""
    return Folder(
        name=clean(name or path.resolve().name or str(path)),
        report=report,
        evaluation=evaluation,
        bench=bench,
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
    for name, digest in folder.report.source.sha256.items():
        path = original / name
        if not path.is_file() or sha256(path) != digest:
            raise ReportError(f"{original} is not the original of {folder.name}: its {name} is another one, or missing")


def read_points(path: Path) -> list[Point]:
    """Return the points of a JSON file: [{"name": ..., "parameters_removed": 0.067, "ratio": 1.48, "source": ...}]."""
    return read_record(path, list[Point])


def _optional(path: Path, kind: type[AnyRecord]) -> AnyRecord | None:
    return read_record(path, kind) if path.exists() else None
