"""What a reduced checkpoint is fit for, by a rule that is stated, and what speaks for and against the numbers."""

from dataclasses import dataclass
from typing import Any

from qectomy.report.page import numbers
from qectomy.report.page.best import NOT_ITS_ORIGINAL, SAVED, best_report, saved_measurement
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


def removed_share(report: dict[str, Any]) -> float:
    """The share of the model's parameters that went."""
    return 1 - report["parameters"]["after"] / report["parameters"]["before"]


def verdict(report: dict[str, Any]) -> Verdict:
    """Return what a checkpoint is fit for, by its method, else by the upper end of its perplexity ratio."""
    perplexity = report.get("perplexity")
    if report.get("method") == "exact":
        return Verdict(
            word="Lossless" if report.get("logit_error", 0.0) <= SAME_LOGITS else "Exact up to rounding",
            tone="good",
            meaning="Nothing was fitted. What went was folded into what stayed, by algebra: up to rounding the reduced "
            "model computes what the original does. That is a proof, not a measurement; the numbers below only "
            "confirm it. `qectomy verify` makes the certificate.",
            rule="made with --query exact",
        )
    if perplexity is None:
        return Verdict(
            word="Not measured",
            tone="fair",
            meaning=f"The report holds no perplexity. Measure it before use: {MEASURE}.",
            rule="no perplexity in qectomy.json",
        )
    interval = perplexity.get("ratio_95")
    top = interval[1] if interval else perplexity["ratio"]
    what = "the upper end of the ratio’s 95 % interval" if interval else "the ratio, for which there is no interval,"
    healed = "healing" in report
    tokens = perplexity.get("protocol", {}).get("scored_tokens")
    what += f" on {tokens:,} tokens ({SAVED})" if tokens and perplexity.get("file") == SAVED else ""
    few = tokens is not None and tokens < FEW_TOKENS
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
    return verdict(best_report(folder))


def checks(folder: Folder) -> list[Check]:
    """Return what speaks for and against the numbers of a report, those in doubt first."""
    report = best_report(folder)
    found = [*_measure_checks(report), *_fit_checks(report), *_file_checks(report)]
    if len(folder.results) > 1 and folder.owns(folder.results) and report.get("method") != "exact":
        found += [] if saved_measurement(folder) else [Check(holds=None, text=NOT_ITS_ORIGINAL)]
    return sorted(found, key=lambda check: {False: 0, None: 1, True: 2}[check.holds])


def _measure_checks(report: dict[str, Any]) -> list[Check]:
    perplexity = report.get("perplexity")
    if report.get("method") == "exact":
        return _exact_checks(report)
    if perplexity is None:
        return [Check(holds=None, text="No text was measured.")]
    found = []
    protocol = perplexity.get("protocol", {})
    tokens = protocol.get("scored_tokens")
    if tokens is not None:
        few = tokens < FEW_TOKENS
        advice = f": few. Measure at least {FEW_TOKENS:,}" if few else ""
        by = f" ({SAVED})" if perplexity.get("file") == SAVED else ""
        found.append(Check(holds=not few, text=f"Perplexity is measured on {tokens:,} tokens{by}{advice}."))
    if "ratio_95" in perplexity:
        low, high = perplexity["ratio_95"]
        windows = f" over {perplexity['windows']:,} windows" if "windows" in perplexity else ""
        told = "is within the noise of this text" if low <= 1 <= high else "is beyond the noise of this text"
        found.append(Check(holds=True, text=f"The difference {told}, by a paired bootstrap{windows}."))
    else:
        found.append(Check(holds=None, text="There is no interval of the ratio: too few windows, or an older version."))
    return [*found, *_text_check(report, protocol)]


def _exact_checks(report: dict[str, Any]) -> list[Check]:
    found = []
    if "logit_error" in report:
        on, most = report.get("logit_error_on", "a text"), numbers.short(report["logit_error"])
        text = f"In float64 no logit is off by more than {most} of the largest, on {on}."
        found.append(Check(holds=report["logit_error"] <= SAME_LOGITS, text=text))
    if "perplexity" in report:
        tokens = report["perplexity"].get("protocol", {}).get("scored_tokens")
        on = f" on {tokens:,} tokens" if tokens else ""
        times = report["perplexity"]["ratio"]
        text = f"Perplexity{on} is {numbers.ratio(times)} times the original’s."
        found.append(Check(holds=abs(times - 1) <= SAME_LOGITS, text=text))
    text = "This page holds no certificate: `qectomy verify` proves each tensor against the original."
    return [*found, Check(holds=None, text=text)]


def _text_check(report: dict[str, Any], protocol: dict[str, Any]) -> list[Check]:
    """Whether the measured text is another than those fitted and trained on."""
    if "text_sha256" not in protocol:
        return []
    doubt = text_doubt(report, protocol)
    return [] if doubt is None else [Check(holds=doubt[0], text=f"{doubt[1][0].upper()}{doubt[1][1:]}.")]


def heldout_ratio(layer: dict[str, Any]) -> float | None:
    """Return a layer's held-out attention KL over the fitted one; None where nothing was fitted or both are rounding.

    A dense layer has no fit: its attention is off by what the layers before it left over alone.
    """
    fitted, heldout = (layer.get("attention_kl", {}).get(name) for name in ("fitted", "heldout"))
    if layer["map"] == "dense" or fitted is None or heldout is None or fitted < LEAST_KL:
        return None
    return heldout / fitted


def _fit_checks(report: dict[str, Any]) -> list[Check]:
    pairs = [layer["attention_kl"] for layer in report["layers"] if heldout_ratio(layer) is not None]
    if not pairs or "healing" in report:  # healing has changed what the fit left
        return []
    fitted, heldout = (sum(pair[name] for pair in pairs) for name in ("fitted", "heldout"))
    times = heldout / fitted
    advice = "more calibration tokens would help" if times > OVERFIT else "the fit carries over to text it has not seen"
    where = "" if len(pairs) == len(report["layers"]) else f" in the {len(pairs)} layers that were fitted"
    text = f"Held-out attention error{where} is {times:.2f} times the fitted one: {advice}."
    return [Check(holds=times <= OVERFIT, text=text)]


def _file_checks(report: dict[str, Any]) -> list[Check]:
    found = []
    error = report.get("reload_check", {}).get("largest_relative_logit_error")
    if error is not None:
        same = "the same logits" if error == 0 else f"logits off by {numbers.short(error)} of the largest"
        found.append(Check(holds=error <= SAME_LOGITS, text=f"A fresh process loaded what was written: {same}."))
    if report.get("healing", {}).get("teacher_is_source") is False:
        text = "It was healed against another checkpoint than it was made from."
        found.append(Check(holds=False, text=text))
    if report.get("source", {}).get("sha256"):
        found.append(Check(holds=True, text="The original is pinned by the hashes of its files, see provenance."))
    return found
