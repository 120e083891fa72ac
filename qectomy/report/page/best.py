"""Which measurement of a checkpoint the verdict goes by: its report's own, or one that `qectomy eval --save` left."""

from dataclasses import dataclass
from typing import Any

from qectomy.record.reduced import Exact, Reduced
from qectomy.record.scores import Perplexity
from qectomy.report.page.reading import Folder
from qectomy.report.text_words import text_doubt

OWN, SAVED = "qectomy.json", "evaluation.json"
NOT_ITS_ORIGINAL = (
    "The verdict does not go by evaluation.json: its first checkpoint is not known, by its files, to be the original "
    "that this one was made from. Give the original first, then this one; what an older version wrote, convert again."
)


@dataclass(frozen=True)
class Measurement:
    """A perplexity, and the file that says so."""

    perplexity: Perplexity
    file: str = OWN


def own_measurement(report: Reduced) -> Measurement | None:
    return Measurement(report.perplexity) if report.perplexity else None


def best_measurement(folder: Folder) -> Measurement | None:
    """Return the best measurement of the ratio there is.

    Better is a text that was not fitted on, then an interval, then more tokens, then a narrower interval. What a proof
    says needs none: an exact fold keeps its own.
    """
    own = own_measurement(folder.report)
    if isinstance(folder.report, Exact):
        return own
    found = [one for one in (own, saved_measurement(folder)) if one is not None]
    return max(found, key=lambda one: _worth(folder.report, one.perplexity), default=None)


def saved_measurement(folder: Folder) -> Measurement | None:
    """Return what evaluation.json says of this checkpoint beside its original, both known by their files; else None."""
    rows = folder.results
    mine = next((row for row in rows if row.paired and row.fingerprint in folder.fingerprints), None)
    if mine is None or mine.paired is None or rows[0].fingerprint != folder.report.source.fingerprint:
        return None
    found = Perplexity(
        before=rows[0].perplexity,
        before_95=rows[0].perplexity_95,
        after=mine.perplexity,
        after_95=mine.perplexity_95,
        protocol=mine.own_protocol,
        **mine.paired.model_dump(exclude={"against"}),
    )
    return Measurement(found, SAVED)


def _worth(report: Reduced, found: Perplexity) -> tuple[Any, ...]:
    width = found.ratio_95[1] - found.ratio_95[0] if found.ratio_95 else 0.0
    doubt = text_doubt(found.protocol, report)
    return doubt is None or doubt[0] is not False, bool(found.ratio_95), found.protocol.scored_tokens, -width
