"""What a reduced checkpoint is fit for, by a rule that is stated, and what speaks for and against the numbers."""

from dataclasses import dataclass

from qectomy.record.reduced import Exact, Fitted, FittedLayer, Reduced
from qectomy.report.page import numbers
from qectomy.report.page.best import (
    NOT_ITS_ORIGINAL,
    SAVED,
    Measurement,
    best_measurement,
    own_measurement,
    saved_measurement,
)
from qectomy.report.page.reading import Folder
from qectomy.report.text_words import text_doubt

CLOSE, USABLE = 1.05, 1.5  # of the perplexity ratio
FEW_TOKENS = 10_000  # scored: below this the interval says more than the number
OVERFIT = 1.5  # held-out attention KL over fitted: the fit learnt its text
LEAST_KL = 1e-6  # nats: float32's roundings of a KL come to some 1e-7, and a ratio of them means nothing
MEASURE = "`qectomy eval ORIGINAL REDUCED --text YOURS.txt --save REDUCED/evaluation.json`"
SAME_LOGITS = 1e-3  # of the largest logit, between this process and a fresh one


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A word, its tone for the page (good, fair, poor), what it means and the rule that gave it."""

    word: str
    tone: str
    meaning: str
    rule: str


@dataclass(frozen=True, kw_only=True)
class Check:
    """One reason to believe the numbers, or to doubt them; `holds` None where the report does not say."""

    holds: bool | None
    text: str


def verdict(report: Reduced, measured: Measurement | None = None) -> Verdict:
    """Return what a checkpoint is fit for: an exact fold by its proof, others by the upper end of their ratio.

    `measured`: a better measurement than the report's own.
    """
    if isinstance(report, Exact):
        return Verdict(
            word="Lossless" if report.logit_error <= SAME_LOGITS else "Exact up to rounding",
            tone="good",
            meaning="Nothing was fitted. What went was folded into what stayed, by algebra: up to rounding the reduced "
            "model computes what the original does. That is a proof, not a measurement; the numbers below only "
            "confirm it. `qectomy verify` makes the certificate.",
            rule="made with --query exact",
        )
    measured = measured or own_measurement(report)
    assert measured is not None, "a fit is always measured"
    perplexity, interval = measured.perplexity, measured.perplexity.ratio_95
    top = interval[1] if interval else perplexity.ratio
    what = "the upper end of the ratio’s 95 % interval" if interval else "the ratio, for which there is no interval,"
    healed = isinstance(report, Fitted) and report.healing is not None
    tokens = perplexity.protocol.scored_tokens
    what += f" on {tokens:,} tokens ({SAVED})" if measured.file == SAVED else ""
    few = tokens < FEW_TOKENS
    if top <= CLOSE and (few or not interval):
        return Verdict(
            word="Close, on little text",
            tone="fair",
            meaning=f"On this text it predicts nearly as well as the original, but the text is short. Measure at least "
            f"{FEW_TOKENS:,} tokens of your own before you rely on it: {MEASURE}, then `qectomy report REDUCED`, whose "
            "verdict goes by the best measurement there is.",
            rule=f"{what} is {numbers.ratio(top)}, at most {CLOSE:g}"
            + (f", on fewer than {FEW_TOKENS:,} tokens" if few else ", on too few windows for one"),
        )
    if top <= CLOSE:
        return Verdict(
            word="Close",
            tone="good",
            meaning="On this text it predicts nearly as well as the original. Check it on your own task, then use it.",
            rule=f"{what} is {numbers.ratio(top)}, at most {CLOSE:g}",
        )
    if top <= USABLE:
        return Verdict(
            word="Heal further before use" if healed else "Heal before use",
            tone="fair",
            meaning="The cost shows. More tokens of `qectomy heal` win part of it back."
            if healed
            else "The cost shows. A short training against the original, `qectomy heal`, wins part of it back.",
            rule=f"{what} is {numbers.ratio(top)}, above {CLOSE:g} and at most {USABLE:g}",
        )
    return Verdict(
        word="A starting point only",
        tone="poor",
        meaning="Not a model to serve. It is where a long healing can start; a map that removes less costs far less.",
        rule=f"{what} is {numbers.ratio(top)}, above {USABLE:g}",
    )


def judged(folder: Folder) -> Verdict:
    """Return the verdict on a folder by the best measurement that lies in it."""
    return verdict(folder.report, best_measurement(folder))


def checks(folder: Folder) -> list[Check]:
    """Return what speaks for and against the numbers of a report, those in doubt first."""
    report = folder.report
    found = [*_measure_checks(report, best_measurement(folder)), *_fit_checks(report), *_file_checks(report)]
    if len(folder.results) > 1 and folder.owns(folder.results) and isinstance(report, Fitted):
        found += [] if saved_measurement(folder) else [Check(holds=None, text=NOT_ITS_ORIGINAL)]
    return sorted(found, key=lambda check: {False: 0, None: 1, True: 2}[check.holds])


def _measure_checks(report: Reduced, measured: Measurement | None) -> list[Check]:
    if isinstance(report, Exact):
        return _exact_checks(report)
    assert measured is not None, "a fit is always measured"
    perplexity, tokens = measured.perplexity, measured.perplexity.protocol.scored_tokens
    advice = f": few. Measure at least {FEW_TOKENS:,}" if tokens < FEW_TOKENS else ""
    by = f" ({SAVED})" if measured.file == SAVED else ""
    found = [Check(holds=not advice, text=f"Perplexity is measured on {tokens:,} tokens{by}{advice}.")]
    if perplexity.ratio_95:
        low, high = perplexity.ratio_95
        told = "is within the noise of this text" if low <= 1 <= high else "is beyond the noise of this text"
        text = f"The difference {told}, by a paired bootstrap over {perplexity.windows:,} windows."
        found.append(Check(holds=True, text=text))
    else:
        found.append(Check(holds=None, text="There is no interval of the ratio: too few windows."))
    if doubt := text_doubt(perplexity.protocol, report):
        found.append(Check(holds=doubt[0], text=f"{doubt[1][0].upper()}{doubt[1][1:]}."))
    return found


def _exact_checks(report: Exact) -> list[Check]:
    on, most = report.logit_error_on, numbers.short(report.logit_error)
    text = f"In float64 no logit is off by more than {most} of the largest, on {on}."
    found = [Check(holds=report.logit_error <= SAME_LOGITS, text=text)]
    if report.perplexity:
        times, tokens = report.perplexity.ratio, report.perplexity.protocol.scored_tokens
        text = f"Perplexity on {tokens:,} tokens is {numbers.ratio(times)} times the original’s."
        found.append(Check(holds=abs(times - 1) <= SAME_LOGITS, text=text))
    text = "This page holds no certificate: `qectomy verify` proves each tensor against the original."
    return [*found, Check(holds=None, text=text)]


def heldout_ratio(layer: FittedLayer) -> float | None:
    """Return a layer's held-out attention KL over the fitted one; None where nothing was fitted or both are rounding.

    A dense layer has no fit: its attention is off by what the layers before it left over alone.
    """
    if layer.map == "dense" or layer.attention_kl is None or layer.attention_kl.fitted < LEAST_KL:
        return None
    return layer.attention_kl.heldout / layer.attention_kl.fitted


def _fit_checks(report: Reduced) -> list[Check]:
    if not isinstance(report, Fitted) or report.healing:  # healing has changed what the fit left
        return []
    pairs = [layer.attention_kl for layer in report.layers if layer.attention_kl and heldout_ratio(layer) is not None]
    if not pairs:
        return []
    times = sum(pair.heldout for pair in pairs) / sum(pair.fitted for pair in pairs)
    advice = "more calibration tokens would help" if times > OVERFIT else "the fit carries over to text it has not seen"
    where = "" if len(pairs) == len(report.layers) else f" in the {len(pairs)} layers that were fitted"
    text = f"Held-out attention error{where} is {times:.2f} times the fitted one: {advice}."
    return [Check(holds=times <= OVERFIT, text=text)]


def _file_checks(report: Reduced) -> list[Check]:
    error = report.reload_check.largest_relative_logit_error
    same = "the same logits" if error == 0 else f"logits off by {numbers.short(error)} of the largest"
    found = [Check(holds=error <= SAME_LOGITS, text=f"A fresh process loaded what was written: {same}.")]
    if isinstance(report, Fitted) and report.healing and not report.healing.teacher_is_source:
        text = "It was healed against another checkpoint than it was made from."
        found.append(Check(holds=False, text=text))
    return [*found, Check(holds=True, text="The original is pinned by the hashes of its files, see provenance.")]
