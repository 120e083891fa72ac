"""qectomy.json and the model card: what was removed, what it cost, and how to do it again."""

import importlib.metadata
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qectomy import __version__
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.file_identity import fingerprint
from qectomy.checkpoint.sizes import totals
from qectomy.eval.peak_memory import peak_memory_bytes
from qectomy.eval.reload import Reload
from qectomy.models.query_maps import QueryMapSpec
from qectomy.report.model_card import model_card
from qectomy.report.page.writing import write_page

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def conversion_report(
    *,
    source: Checkpoint,
    recipe: tuple[QueryMapSpec, ...],
    command: str,
    stored_dtype: str | None,
    context: int,
    seed: int,
    refit: bool,
    device: str,
    hashes: dict[str, str],
    calibration: list[dict[str, Any]],
    layers: list[dict[str, Any]],
    measured: dict[str, Any],
    seconds: dict[str, float],
    total_seconds: float,
    forward_pass_seconds: float,
    reload: Reload,
    processes: int = 1,
) -> dict[str, Any]:
    """Return the record of one conversion: everything needed to believe it and to repeat it."""
    sizes = totals(source, recipe, stored_dtype)
    return {
        **provenance(source, command, hashes),
        "calibration": {
            "texts": calibration,
            "context": context,
            "seed": seed,
            "refit": refit,
        },
        "layers": layers,
        **measured,
        **sizes,
        "seconds": {
            **{stage: round(value, 3) for stage, value in seconds.items()},
            "total": round(total_seconds, 3),
        },
        "forward_pass_seconds": round(forward_pass_seconds, 3),
        "peak_memory_bytes": max(peak_memory_bytes(), reload.peak_memory_bytes),
        "device": device,
        "processes": processes,
        **reload.record(),
    }


def provenance(source: Checkpoint, command: str, hashes: dict[str, str]) -> dict[str, Any]:
    """Return what made a checkpoint: versions, the command, and the source by its hashes."""
    return {
        **made(command),
        "source": {
            "name": source.name,
            "model_type": source.family.model_type,
            "dtype": source.dtype,
            "sha256": hashes,
            "fingerprint": fingerprint(source.folder),  # by which `eval` names it
        },
    }


def made(command: str) -> dict[str, Any]:
    """Return by which versions, when and by which command something was made."""
    return {
        "qectomy": __version__,
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in PACKAGES},
        },
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def write_report(folder: Path, report: dict[str, Any], source: Checkpoint) -> None:
    """Write qectomy.json, README.md and report.html beside the weights."""
    (folder / "qectomy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    card = _card(report, source)  # file names need not be UTF-8
    (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    write_page(folder)


def _card(report: dict[str, Any], source: Checkpoint) -> str:
    """Return the model card; one that cannot be made must not undo a conversion."""
    try:
        return model_card(report, source)
    except Exception as error:
        why = f"No model card was made ({type(error).__name__}). See qectomy.json."
        return f"# {source.name}, reduced by Qectomy\n\n{why}\n"
