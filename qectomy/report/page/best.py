"""Which measurement of a checkpoint the verdict goes by: its report's own, or one that `qectomy eval --save` left."""

from typing import Any

from qectomy.record.scores import Perplexity
from qectomy.report.page.reading import Folder
from qectomy.report.text_words import text_doubt

OWN, SAVED = "qectomy.json", "evaluation.json"
NOT_ITS_ORIGINAL = (
    "The verdict does not go by evaluation.json: its first checkpoint is not known, by its files, to be the original "
    "that this one was made from. Give the original first, then this one; what an older version wrote, convert again."
)


def best_report(folder: Folder) -> dict[str, Any]:
    """Return the report with the best measurement of the ratio there is as its `perplexity`, `file` saying whose it is.

    Better is a text that was not fitted on, then an interval, then more tokens, then a narrower interval. What a proof
    says needs none: an exact fold keeps its own.
    """
    report = folder.report
    own = {**report["perplexity"], "file": OWN} if "perplexity" in report else None
    if report.get("method") == "exact":
        return report
    found = [one for one in (own, saved_measurement(folder)) if one is not None]
    return {**report, "perplexity": max(found, key=lambda one: _worth(report, one))} if found else report


def saved_measurement(folder: Folder) -> dict[str, Any] | None:
    """Return what evaluation.json says of this checkpoint beside its original, both known by their files; else None."""
    rows = folder.results
    mine = next((row for row in rows if row.paired and row.fingerprint in folder.fingerprints), None)
    if mine is None or mine.paired is None or rows[0].fingerprint != folder.report.get("source", {}).get("fingerprint"):
        return None
    found = Perplexity(
        before=rows[0].perplexity,
        before_95=rows[0].perplexity_95,
        after=mine.perplexity,
        after_95=mine.perplexity_95,
        protocol=mine.protocol.model_copy(update={"overlap": mine.overlap}),
        **mine.paired.model_dump(exclude={"against"}),
    )
    return {**found.model_dump(exclude_none=True), "file": SAVED}


def _worth(report: dict[str, Any], perplexity: dict[str, Any]) -> tuple[Any, ...]:
    protocol, interval = perplexity.get("protocol", {}), perplexity.get("ratio_95")
    width = interval[1] - interval[0] if interval else 0.0
    doubt = text_doubt(report, protocol)
    return doubt is None or doubt[0] is not False, bool(interval), protocol.get("scored_tokens", 0), -width
