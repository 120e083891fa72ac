"""qectomy.json and the model card: what was removed, what it cost, and how to do it again."""

import importlib.metadata
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from qectomy import __version__
from qectomy.calibrate.settings import ConvertSettings
from qectomy.eval.peak_memory import peak_memory_bytes
from qectomy.eval.reload import Reload
from qectomy.surgery.checkpoint import Checkpoint
from qectomy.surgery.plan import totals
from qectomy.surgery.query_maps import QueryMapSpec

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


def conversion_report(
    *,
    source: Checkpoint,
    recipe: tuple[QueryMapSpec, ...],
    settings: ConvertSettings,
    hashes: dict[str, str],
    calibration: list[dict[str, Any]],
    layers: list[dict[str, Any]],
    before: dict[str, float],
    after: dict[str, float],
    protocol: dict[str, Any],
    seconds: dict[str, float],
    total_seconds: float,
    forward_pass_seconds: float,
    reload: Reload,
) -> dict[str, Any]:
    """Return the record of one conversion: everything needed to believe it and to repeat it."""
    sizes = totals(source, recipe, settings.stored_dtype)
    return {
        "qectomy": __version__,
        "versions": {
            "python": platform.python_version(),
            **{p: importlib.metadata.version(p) for p in PACKAGES},
        },
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": settings.command,
        "source": {
            "name": source.name,
            "model_type": source.family.model_type,
            "dtype": source.dtype,
            "sha256": hashes,
        },
        "calibration": {"texts": calibration, "context": settings.context, "seed": settings.seed},
        "layers": layers,
        "perplexity": {
            "before": before["perplexity"],
            "after": after["perplexity"],
            "ratio": after["perplexity"] / before["perplexity"],
            "protocol": {**protocol, "dtype": "float32"},
        },
        "bits_per_byte": {"before": before["bits_per_byte"], "after": after["bits_per_byte"]},
        "kl": after["kl"],
        "top1_agreement": after["top1_agreement"],
        **sizes,
        "seconds": {
            **{stage: round(value, 3) for stage, value in seconds.items()},
            "total": round(total_seconds, 3),
        },
        "forward_pass_seconds": round(forward_pass_seconds, 3),
        "peak_memory_bytes": max(peak_memory_bytes(), reload.peak_memory_bytes),
        "device": settings.device,
        "reload_check": {
            "largest_relative_logit_error": reload.error,
            "peak_memory_bytes": reload.peak_memory_bytes,
        },
    }


def write_report(folder: Path, report: dict[str, Any], source: Checkpoint) -> None:
    """Write qectomy.json and README.md beside the weights."""
    (folder / "qectomy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    card = model_card(report, source)  # file names need not be UTF-8
    (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")


def model_card(report: dict[str, Any], source: Checkpoint) -> str:
    """Return the README.md of a reduced checkpoint."""
    perplexity, parameters, protocol = (
        report["perplexity"],
        report["parameters"],
        report["perplexity"]["protocol"],
    )
    removed = 1 - parameters["after"] / parameters["before"]
    recipe = ", ".join(f"{name} ({count} layers)" for name, count in _counts(report["layers"]).items())
    base = source.name
    return f"""---
library_name: transformers
base_model: {json.dumps(base, ensure_ascii=False)}
tags: [qectomy, query-free-attention]
---

# {_one_line(base)} without W_Q

The query projections of this {source.family.model_type} checkpoint were taken out by Qectomy {report["qectomy"]}:
{recipe}. No training from end to end: query maps and W_K were fitted on calibration text layer by layer, W_O and W_down
refitted to them in closed form.

| | original | reduced |
|---|---|---|
| parameters | {parameters["before"]:,} | {parameters["after"]:,} ({removed:.1%} fewer) |
| bytes | {report["bytes"]["before"]:,} | {report["bytes"]["after"]:,} |
| perplexity | {perplexity["before"]:.3f} | {perplexity["after"]:.3f} (x {perplexity["ratio"]:.3f}) |
| bits per byte | {report["bits_per_byte"]["before"]:.4f} | {report["bits_per_byte"]["after"]:.4f} |

Mean KL to the original {report["kl"]:.4f} nats a token; same most likely token {report["top1_agreement"]:.1%} of the
time. Measured on {protocol["scored_tokens"]:,} tokens of `{_one_line(protocol["text"])}`
(sha256 {protocol["text_sha256"][:16]}), windows of {protocol["context"]} tokens, stride {protocol["stride"]},
BOS: {protocol["bos"]}, float32. Perplexity on other text differs.

## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# The model's code is {source.family.modeling}.py, beside the weights.
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH")
```

With `import qectomy` first, `trust_remote_code` is not needed. For engines that know only stock models, write W_Q back:
`qectomy materialize PATH --out STOCK`.

## Made by

{_indented(report["command"])}

Theory: Karbevski & Mijoski, "Key and Value Weights Are Probably All You Need", arXiv 2510.23912. The licence is that of
the original checkpoint.
"""


def _counts(layers: list[dict[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for layer in layers:
        counts[layer["map"]] = counts.get(layer["map"], 0) + 1
    return counts


def _indented(text: str) -> str:
    """A code block that no backtick in the text can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _one_line(text: str) -> str:
    return " ".join(text.replace("`", "'").split())
