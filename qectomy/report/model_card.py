"""The README.md of a reduced checkpoint: what was taken out, what it cost, how to load it."""

import re
import textwrap
from collections import Counter

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.record.reduced import Exact, Fitted, Reduced
from qectomy.record.scores import Perplexity
from qectomy.report.card_metadata import Origin, card_metadata, one_line, origin
from qectomy.report.card_verdict import card_verdict
from qectomy.report.moved_words import has_refitted_dense, moved_meaning, moved_table
from qectomy.report.page.verdict import verdict
from qectomy.report.query_share import kind_words, query_share
from qectomy.report.text_words import read_as_words, text_doubt

FITTED = """The query projections of this {family} checkpoint{kept} were taken out by Qectomy {version}:
{recipe}.
{ending}"""
HOW = "Query maps and W_K were fitted on calibration text layer by layer; "
REFITTED = """W_O and W_down were
refitted to them in closed form{dense}."""
DENSE_TOO = ", also in layers that keep their W_Q (`dense`)"
LEFT = "nothing else was fitted."
HEALED = """ Then the model was healed, trained on {tokens:,} tokens{after} of {texts} to predict what the original
predicts (`healing.png`)."""
EXACT = """What goes exactly of this {family} checkpoint was taken out by Qectomy {version}: query maps
{recipe}. Nothing was fitted: up to rounding it computes what the original does. `gauge` means that a block of each
head's W_Q, and of its W_V, is the identity and not stored; `identity` that a whole W_Q is."""
LIMITS_FITTED = """\
- The numbers above hold for that text, windows of that length and float32. On your own text:
  `qectomy eval ORIGINAL PATH --text YOURS.txt --reference ORIGINAL`. Longer contexts than measured were not tried.
- Perplexity is a mean. It does not say what became of rare words, facts, instructions, other languages, or of what a
  chat model was taught to refuse: try your own tasks, beside the original, before you serve this.
- An adapter (LoRA) of the original does not fit: PEFT drops its part for W_Q without a word, or raises, and of the
  matrices that the rest of it changes some were fitted anew. Merge it into the original, and convert that; or train a
  new one on this model: its attention has {targets}, which `target_modules="all-linear"` finds."""
LIMITS_EXACT = """\
- Exact means up to rounding: in float64 the logits are those of the original; in the stored type other numbers
  are rounded than before. `qectomy verify PATH --against ORIGINAL --text YOURS.txt` says by how much.
- An adapter (LoRA) of the original does not fit: PEFT loads it without a word, and it computes in another basis than
  these heads do. Merge it into the original, and convert that."""
LIMITS_ALL = """\
- What the original does badly, this does too: its card says what it is meant for, and what its biases are.
- The key/value cache keeps its size, and engines that know only stock models need W_Q back, which saves nothing."""


def model_card(report: Reduced, source: Checkpoint) -> str:
    """Return the README.md of a reduced checkpoint. Names and texts are data: none of them adds structure."""
    recipe = ", ".join(f"{name} ({count} layers)" for name, count in Counter(report.maps).items())
    told = {"family": source.family.model_type, "version": report.qectomy, "recipe": recipe}
    if isinstance(report, Fitted):
        kept = ", but for those of `dense` layers," if "dense" in report.maps else ""
        how, limits = FITTED.format(**told, ending=_ending(report), kept=kept), LIMITS_FITTED
    else:
        how, limits = EXACT.format(**told), LIMITS_EXACT
    known, kind = _origin(report, source), kind_words(report)
    return f"""---
{card_metadata(report, f"{one_line(source.name)} {kind}", known)}
---

# {_escaped(source.name)} {kind}

{how}
{_made_from(source, known)}

{_table(report)}
{_measured(report)}
{card_verdict(verdict(report))}

{_moved(report)}## Load it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# The model's code is {source.family.modeling}.py, beside the weights. The tokenizer needs none of it.
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=False)
```

With `import qectomy` first, `trust_remote_code=True` is not needed. For engines that know only stock models, write W_Q
back: `qectomy materialize PATH --out STOCK`.

## Limits

{limits.format(targets=_targets(source))}
{LIMITS_ALL}

## Licence

{_licence(source, known)}

## Made by

{_indented(_commands(report))}

Theory: Karbevski & Mijoski, "Key and Value Weights Are Probably All You Need", arXiv 2510.23912.
"""


def _origin(report: Reduced, source: Checkpoint) -> Origin:
    """Return what is known of the original. Healed by another teacher, `source` has the original's name alone."""
    if isinstance(report, Fitted) and report.healing and not report.healing.teacher_is_source:
        return Origin(hub_id=source.name if "/" in source.name else None)
    return origin(source)


def _made_from(source: Checkpoint, known: Origin) -> str:
    if known.hub_id is not None:
        return f"Made from [{known.hub_id}](https://huggingface.co/{known.hub_id})."
    return (
        f"Made from a local folder, `{_code(source.name)}`; which model of the Hub that is, if any, is not known here."
    )


def _licence(source: Checkpoint, known: Origin) -> str:
    """Say under what licence this may be used, as far as the source says so."""
    names = [known.license] if isinstance(known.license, str) else known.license or []
    if known.license_name is not None:
        names = [known.license_name]
    if not names:
        return (
            "Not known: the original came without a card that names one. The original's licence holds for this "
            "checkpoint too; look it up before you use or share it."
        )
    said = f"That of the original, whose card says {', '.join(f'`{name}`' for name in names)}"
    if known.license_link is not None:
        said += f" ([text](<{known.license_link}>))"
    return f"{said}. Its terms hold for this checkpoint too."


def _ending(report: Fitted) -> str:
    healing = report.healing
    refitted = REFITTED.format(dense=DENSE_TOO if has_refitted_dense(report) else "")
    how = HOW + (refitted if report.calibration is None or report.calibration.refit else LEFT)
    if healing is None:
        return f"No training from end to end. {how}"
    if not healing.best_step:
        return f"{how} Healing it, by training against the original, made it no better (`healing.png`)."
    texts = ", ".join(f"`{_code(text.text)}`" for text in healing.texts)
    if healing.self_generated:
        texts = "text that the original wrote itself"
    kept, all_of_it = healing.best_step * healing.tokens_a_step, healing.tokens
    after = "" if kept == all_of_it else f", of which the first {kept:,} made what is kept,"
    return how + HEALED.format(tokens=all_of_it, after=after, texts=texts)


def _commands(report: Reduced) -> str:
    healing = report.healing if isinstance(report, Fitted) else None
    return "\n".join(dict.fromkeys([report.command, *([healing.command] if healing else [])]))


def _table(report: Reduced) -> str:
    parameters = report.parameters
    rows = [
        "| | original | reduced |",
        "|---|---|---|",
        f"| parameters | {parameters.before:,} | {parameters.after:,} ({parameters.removed:.1%} fewer) |",
        *_query_row(report),
        f"| bytes | {report.bytes.before:,} | {report.bytes.after:,} |",
    ]
    if found := report.perplexity:
        ratio = f"x {found.ratio:.3f}{_interval(found)}"
        rows += [f"| perplexity | {found.before:.3f} | {found.after:.3f} ({ratio}) |", *_fitted_row(report)]
    if bits := report.bits_per_byte:
        rows.append(f"| bits per byte | {bits.before:.4f} | {bits.after:.4f} |")
    return "\n".join(rows) + "\n"


def _query_row(report: Reduced) -> list[str]:
    """How much of W_Q went, of all layers'."""
    if (found := query_share(report)) is None:
        return []
    before, after = f"{found.before:,.0f}", f"{found.after:,.0f}"
    more = "" if found.reduced == found.layers else f" {found.words}"
    return [f"| of which W_Q, and what stands in its place | {before} | {after} ({found.removed:.1%} fewer{more}) |"]


def _interval(perplexity: Perplexity) -> str:
    if not perplexity.ratio_95:
        return ""
    low, high = perplexity.ratio_95
    return f"; {low:.3f} to {high:.3f} with 95 % confidence"


def _fitted_row(report: Reduced) -> list[str]:
    """What the reduced model was at before it was healed."""
    if not isinstance(report, Fitted) or not report.healing:
        return []
    found = report.healing.perplexity
    return [f"| perplexity before healing | | {found.fitted:.3f} (x {found.fitted_ratio:.3f}) |"]


def _measured(report: Reduced) -> str:
    if isinstance(report, Exact) and not report.perplexity:
        return f"Largest difference of a logit {report.logit_error:.1e} of the largest, on random tokens.\n"
    assert report.perplexity, "a fit is always measured"
    protocol = report.perplexity.protocol
    read_as = f"; {_code(words)}" if (words := read_as_words(protocol)) else ""
    told = text_doubt(protocol, report) if isinstance(report, Fitted) else None
    doubt = f"\n{told[1][0].upper()}{told[1][1:]}." if told else ""
    kl, agreement = report.kl, report.top1_agreement
    return f"""Mean KL to the original {kl:.4f} nats a token; same most likely token {agreement:.2%} of the
time. Measured on {protocol.scored_tokens:,} tokens of `{_code(protocol.text)}`
(sha256 {protocol.text_sha256[:16]}{read_as}), windows of {protocol.context} tokens, stride {protocol.stride},
BOS: {protocol.bos}, float32. Perplexity on other text differs.{doubt}
"""


def _moved(report: Reduced) -> str:
    """Say by layer what changed beside W_Q; nothing of an exact fold, or where an older version fitted."""
    heads, rows = moved_table(report)
    if not rows or not isinstance(report, Fitted):
        return ""
    table = [f"| {' | '.join(map(_escaped, row))} |" for row in (heads, *rows)]
    table.insert(1, f"|{'---|' * len(heads)}")
    meaning = textwrap.fill(moved_meaning(report), 118, break_on_hyphens=False)
    return "## What moved beside W_Q\n\n" + "\n".join(table) + f"\n\n{meaning}\n\n"


def _targets(source: Checkpoint) -> str:
    """The modules of a reduced layer's attention to which an adapter can be added, as PEFT takes their names."""
    roles = source.family.roles
    modules = (roles.reduced_key.module, roles.reduced_value.module, roles.output.module)
    return ", ".join(dict.fromkeys(f"`{module.rpartition('.')[2]}`" for module in modules))


def _indented(text: str) -> str:
    """A code block that no backtick in the text can end."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def _code(text: str) -> str:
    """What a pair of backticks can hold."""
    return one_line(text.replace("`", "'"))


def _escaped(text: str) -> str:
    """Return a name in which no character is markup, for a heading."""
    return re.sub(r"([\\`*_{}\[\]()<>#+!|~$&:@])", r"\\\1", one_line(text))
