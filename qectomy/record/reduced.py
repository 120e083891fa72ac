"""qectomy.json: what was taken out of a checkpoint, what that cost, and how to do it again."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from qectomy import __version__
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.file_identity import fingerprint
from qectomy.errors import ReportError, clean, note, shown
from qectomy.record.base import (
    Amount,
    Count,
    Flag,
    Interval,
    Made,
    Number,
    Record,
    Share,
    Size,
    Text,
    checked,
    read_raw,
)
from qectomy.record.healing import Healing
from qectomy.record.scores import Change, LossesByPosition, Perplexity
from qectomy.record.texts import ReadAs

FORMAT: Literal[1] = 1


class Counts(Record):
    before: Count
    after: Count


class Sizes(Record):
    before: Size
    after: Size

    @property
    def removed(self) -> float:
        """The share that went."""
        return 1 - self.after / self.before


class Totals(Record):
    """The whole checkpoint's, net: all that was added is counted."""

    parameters: Sizes
    bytes: Sizes
    query_parameters: Counts  # of layers that are not dense; of an exact fold, of all

    @property
    def maps(self) -> Sequence[str]:
        """The query map of each layer."""
        raise NotImplementedError


class Layer(Record):
    index: Count
    map: Text


class OfLayers(Totals):
    """What has a record a layer."""

    layers: Sequence[Layer]

    @property
    def maps(self) -> Sequence[str]:
        return [layer.map for layer in self.layers]


class Plan(Totals):
    """What a fit would write, and what that needs."""

    plan: list[Text]  # a map a layer
    needs: dict[str, Any]

    @property
    def maps(self) -> Sequence[str]:
        return self.plan


class Source(Record):
    """The original, by its files."""

    name: Text
    model_type: Text
    dtype: Text
    sha256: dict[Text, Text]
    fingerprint: Text  # by which `eval` names it


def source_of(checkpoint: Checkpoint, hashes: dict[str, str]) -> Source:
    """Return what is recorded of an original whose files have these hashes."""
    return Source(
        name=checkpoint.name,
        model_type=checkpoint.family.model_type,
        dtype=checkpoint.dtype,
        sha256=hashes,
        fingerprint=fingerprint(checkpoint.folder),
    )


class TokenLoss(Record):
    """A token, and what predicting it costs both models, in nats; None where it is not scored."""

    text: Text
    before: Number | None = None
    after: Number | None = None

    @property
    def gap(self) -> float | None:
        """By how many nats the reduced model predicts it worse."""
        return None if self.before is None or self.after is None else self.after - self.before


class TokenSample(Record):
    text: Text  # its name
    window: Count | None = None
    tokens: list[TokenLoss] = Field(default_factory=list)
    skipped: Text | None = None  # why there are no tokens


class Writing(Record):
    """What both models write after a prompt."""

    prompt: Text
    original: Text
    reduced: Text


class Generation(Record):
    max_new_tokens: Count | None = None
    decoding: Text | None = None
    prompt_format: Text | None = None  # None: plain text
    samples: list[Writing] = Field(default_factory=list)
    skipped: Text | None = None  # why there are no samples


class ReloadCheck(Record):
    """What a fresh process found: errors of logits as shares of the largest."""

    largest_relative_logit_error: Amount
    largest_relative_logit_error_cached: Amount
    peak_memory_bytes: Count


class Renewed(Record):
    """By what the model code was renewed; results measured before know the folder by the older fingerprints."""

    qectomy: Text
    created: Text
    fingerprints: list[Text]


class Written(Record):
    """What any version's qectomy.json says of the weights beside it."""

    tensors_sha256: dict[str, str] | None = None


class Reduced(OfLayers, Made):
    """What every reduced checkpoint says of itself."""

    format: Literal[1] = FORMAT
    source: Source
    perplexity: Perplexity | None = None
    bits_per_byte: Change | None = None
    word_perplexity: Change | None = None
    per_position: LossesByPosition | None = None
    kl: Number | None = None
    kl_95: Interval | None = None
    top1_agreement: Share | None = None
    token_sample: TokenSample | None = None
    seconds: dict[Text, Amount]  # by stage, and their total
    peak_memory_bytes: Count
    reload_check: ReloadCheck
    generation: Generation | None = None
    tensors_sha256: dict[str, str]
    renewed: Renewed | None = None

    @property
    def fitted_hashes(self) -> set[str]:
        """The sha256 of each text that was fitted or trained on, in an earlier healing, too."""
        return set()


class FitText(Record):
    file: Text
    sha256: Text
    tokens: Count
    first_token: Count
    read_as: ReadAs | None = None


class Calibration(Record):
    texts: list[FitText]
    context: Count
    seed: Count
    refit: Flag


class AttentionKL(Record):
    """Of the reduced layer's attention to the original's, in nats, on windows that were fitted on and on others."""

    fitted: Number
    heldout: Number


class FittedLayer(Layer):
    """A layer of a fit; where qectomy.json was lost before healing, no more than its map is known."""

    attention_kl: AttentionKL | None = None
    moved: dict[Text, Amount | None] | None = None  # None of a part: it held only zeros before
    singular_values: list[Amount] | None = None
    seconds: Amount | None = None


class Spans(Record):
    """The content of what was fitted or trained on, as a sketch of hashes (text/overlap.py)."""

    words: Count
    complete: Flag
    below: Count
    hashes: str
    validation: "Spans | None" = None  # of what healing was validated on


class Fitted(Reduced):
    """A fit, or one that was healed; where qectomy.json was lost before healing, not how it was fitted."""

    method: Literal["fitted"] = "fitted"
    layers: list[FittedLayer]
    calibration: Calibration | None = None
    perplexity: Perplexity
    bits_per_byte: Change
    per_position: LossesByPosition
    kl: Number
    top1_agreement: Share
    forward_pass_seconds: Amount | None = None
    device: Text | None = None
    processes: Count | None = None
    fitted_spans: Spans | None = None
    healing: Healing | None = None

    @property
    def fitted_hashes(self) -> set[str]:
        found = {text.sha256 for text in self.calibration.texts} if self.calibration else set()
        healing = self.healing
        while healing:
            found |= {text.sha256 for text in healing.texts}
            healing = healing.earlier
        return found


class ExactLayer(Layer):
    """A layer's maps, what became of its W_Q and why, and the condition numbers behind that."""

    value_map: Text
    output_map: Text
    how: Text
    reason: Text
    value_reason: Text | None = None
    W_Q_condition: Number | None = None
    basis_condition: Number | None = None
    pivot_condition: Number | None = None

    @property
    def conditions(self) -> list[float]:
        """Those that are known."""
        found = self.W_Q_condition, self.basis_condition, self.pivot_condition
        return [condition for condition in found if condition is not None]


class Folded(OfLayers):
    """What an exact fold comes to, done or planned."""

    layers: list[ExactLayer]
    tie: Text  # of embedding and head: none, kept or broken


class FoldPlan(Folded):
    dry_run: Literal[True] = True
    needs: dict[str, Any] | None = None


class Exact(Folded, Reduced):
    """An exact fold. Nothing was fitted, and a text need not be measured."""

    method: Literal["exact"] = "exact"
    layers: list[ExactLayer]
    logit_error: Amount  # in float64, as a share of the largest logit
    logit_error_on: Text


def read_if_can(path: Path) -> Fitted | Exact | None:
    """Return what a qectomy.json says; None, and a note, where this version cannot read it."""
    try:
        return read_reduced(path)
    except ReportError as error:
        note(f"going on without its record, which the weights do not need: {error}")
        return None


def read_reduced(path: Path) -> Fitted | Exact:
    """Return what a qectomy.json says. Raises ReportError that names the field, or the version that reads it.

    One without a format number is read as far as it has what is needed.
    """
    raw = read_raw(path)
    told = raw if isinstance(raw, dict) else {}
    if (found := told.get("format")) not in (None, FORMAT):
        by = clean(shown(told.get("qectomy")))
        raise ReportError(
            f"{path} is of format {clean(shown(found))}, which qectomy {by} wrote and reads; this is qectomy "
            f"{__version__}, which reads format {FORMAT}. Install that version, or convert again with this one"
        )
    return checked(raw, Exact, path) if told.get("method") == "exact" else checked(raw, Fitted, path)
