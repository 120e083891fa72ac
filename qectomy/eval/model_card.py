"""The README.md of a reduced checkpoint: what was taken out, what it cost, how to load it."""

import json
from typing import Any

from qectomy.surgery.checkpoint import Checkpoint

FITTED = """The query projections of this {family} checkpoint were taken out by Qectomy {version}:
{recipe}. {ending}"""
FITTED_ALONE = """No training from end to end: query maps and W_K were fitted on calibration text layer by layer,
W_O and W_down refitted to them in closed form."""
HEALED = """Query maps and W_K were fitted on calibration text layer by layer, W_O and W_down refitted to them in closed
form; then the model was healed, trained on {tokens:,} tokens of {texts} to predict what the original predicts
(`healing.png`)."""
EXACT = """What goes exactly of this {family} checkpoint was taken out by Qectomy {version}: query maps
{recipe}. Nothing was fitted: up to rounding it computes what the original does. `gauge` means that a block of each
head's W_Q, and of its W_V, is the identity and not stored; `identity` that a whole W_Q is."""


def model_card(report: dict[str, Any], source: Checkpoint) -> str:
    """Return the README.md of a reduced checkpoint."""
    exact = report.get("method") == "exact"
    recipe = ", ".join(f"{name} ({count} layers)" for name, count in _counts(report["layers"]).items())
    how = (EXACT if exact else FITTED).format(
        family=source.family.model_type, version=report["qectomy"], recipe=recipe, ending=_ending(report)
    )
    return f"""---
library_name: transformers
base_model: {json.dumps(source.name, ensure_ascii=False)}
tags: [qectomy{"" if exact else ", query-free-attention"}]
---

# {_one_line(source.name)} {"folded exactly" if exact else "without W_Q"}

{how}

{_table(report)}
{_measured(report)}
## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# The model's code is {source.family.modeling}.py, beside the weights.
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
```

With `import qectomy` first, `trust_remote_code` is not needed. For engines that know only stock models, write W_Q back:
`qectomy materialize PATH --out STOCK`.

## Made by

{_indented(_commands(report))}

Theory: Karbevski & Mijoski, "Key and Value Weights Are Probably All You Need", arXiv 2510.23912. The licence is that of
the original checkpoint.
"""


def _ending(report: dict[str, Any]) -> str:
    healing = report.get("healing")
    if healing is None:
        return FITTED_ALONE
    if not healing["best_step"]:
        return FITTED_ALONE + " Healing it, by training against the original, made it no better (`healing.png`)."
    texts = ", ".join(f"`{_one_line(text['text'])}`" for text in healing["texts"])
    if healing["self_generated"]:
        texts = "text that the original wrote itself"
    return HEALED.format(tokens=healing["best_step"] * healing["tokens_a_step"], texts=texts)


def _commands(report: dict[str, Any]) -> str:
    healing = report.get("healing")
    return report["command"] if healing is None else "\n".join(dict.fromkeys((report["command"], healing["command"])))


def _table(report: dict[str, Any]) -> str:
    parameters = report["parameters"]
    removed = 1 - parameters["after"] / parameters["before"]
    rows = [
        "| | original | reduced |",
        "|---|---|---|",
        f"| parameters | {parameters['before']:,} | {parameters['after']:,} ({removed:.1%} fewer) |",
        f"| bytes | {report['bytes']['before']:,} | {report['bytes']['after']:,} |",
    ]
    if "perplexity" in report:
        perplexity, bits = report["perplexity"], report["bits_per_byte"]
        rows += [
            f"| perplexity | {perplexity['before']:.3f} | {perplexity['after']:.3f} (x {perplexity['ratio']:.3f}) |",
            *_fitted_row(report),
            f"| bits per byte | {bits['before']:.4f} | {bits['after']:.4f} |",
        ]
    return "\n".join(rows) + "\n"


def _fitted_row(report: dict[str, Any]) -> list[str]:
    """What the reduced model was at before it was healed."""
    if "healing" not in report:
        return []
    found = report["healing"]["perplexity"]
    return [f"| perplexity before healing | | {found['fitted']:.3f} (x {found['fitted_ratio']:.3f}) |"]


def _measured(report: dict[str, Any]) -> str:
    if "perplexity" not in report:
        return f"Largest difference of a logit {report['logit_error']:.1e} of the largest, on random tokens.\n"
    protocol, agreement = report["perplexity"]["protocol"], report["top1_agreement"]
    return f"""Mean KL to the original {report["kl"]:.4f} nats a token; same most likely token {agreement:.2%} of the
time. Measured on {protocol["scored_tokens"]:,} tokens of `{_one_line(protocol["text"])}`
(sha256 {protocol["text_sha256"][:16]}), windows of {protocol["context"]} tokens, stride {protocol["stride"]},
BOS: {protocol["bos"]}, float32. Perplexity on other text differs.
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
