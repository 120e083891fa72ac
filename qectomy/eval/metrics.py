"""From the scores of a text's tokens to what a report says of them, each number by its definition in one place.

Dimensions: N scored tokens.
"""

import math

from qectomy.errors import NonFiniteError
from qectomy.eval.protocol import ScoringWindows
from qectomy.eval.statistics import by_position, mean_interval, paired, perplexity_interval
from qectomy.eval.token_scores import TokenScores
from qectomy.record.scores import Change, Cost, LossByPosition, LossesByPosition, Paired, Perplexity, Summary

MOST_NATS = 650.0  # whose exp a float holds with room for a ratio


def summarize(scores: TokenScores, windows: ScoringWindows) -> Summary:
    """Return perplexity a token and a word, nats a token, bits a byte; mean KL and top-1 agreement if there are any.

    Intervals are the 95 % bootstrap's over windows; None for a single window.
    """
    total = float(scores.nll.sum())
    if not float(scores.nll.mean()) < MOST_NATS:
        raise NonFiniteError(f"{float(scores.nll.mean()):.0f} nats a token: a perplexity beyond any number")
    within, positions = windows.places()
    edges, (by_span,) = by_position(positions, scores.nll)
    return Summary(
        perplexity=float(scores.nll.mean().exp()),
        perplexity_95=perplexity_interval(scores.nll, within),
        nll=float(scores.nll.mean()),
        bits_per_byte=total / math.log(2) / max(1, windows.n_bytes),
        word_perplexity=_exp(total / max(1, windows.n_words)),
        per_position=LossByPosition(edges=edges, nll=by_span),
        kl=None if scores.kl is None else float(scores.kl.mean()),
        kl_95=None if scores.kl is None else mean_interval(scores.kl, within),
        top1_agreement=None if scores.agree is None else float(scores.agree.mean()),
    )


def compare(before: TokenScores, after: TokenScores, windows: ScoringWindows) -> Paired:
    """Return ratio and difference of two models' perplexities, paired by window, with 95 % intervals."""
    return paired(before.nll, after.nll, windows.places()[0])


def cost(before: TokenScores, after: TokenScores, windows: ScoringWindows) -> Cost:
    """Return what a conversion cost, from the scores of both models on the same windows, float32."""
    one, other, both = summarize(before, windows), summarize(after, windows), compare(before, after, windows)
    assert other.kl is not None, "`after` has the other model as its reference"
    assert other.top1_agreement is not None
    words = one.word_perplexity, other.word_perplexity
    return Cost(
        perplexity=Perplexity(
            before=one.perplexity,
            after=other.perplexity,
            **dict(both),
            before_95=one.perplexity_95,
            after_95=other.perplexity_95,
            protocol=windows.report.model_copy(update={"dtype": "float32"}),
        ),
        bits_per_byte=Change(before=one.bits_per_byte, after=other.bits_per_byte),
        word_perplexity=None if words[0] is None or words[1] is None else Change(before=words[0], after=words[1]),
        per_position=LossesByPosition(
            edges=one.per_position.edges, before=one.per_position.nll, after=other.per_position.nll
        ),
        kl=other.kl,
        kl_95=other.kl_95,
        top1_agreement=other.top1_agreement,
    )


def _exp(nats: float) -> float | None:
    """None for what is beyond any number: a long word, as of Chinese, may cost more nats than exp takes."""
    return math.exp(nats) if nats < MOST_NATS else None
