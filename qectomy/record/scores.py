"""What is recorded of the scores of a text's tokens: one model's, and a reduced one's beside its original's."""

from typing import Annotated

from pydantic import AfterValidator, model_validator

from qectomy.record.base import Count, Interval, Number, Positive, Record, Share
from qectomy.record.texts import TextProtocol


def _rising(edges: list[int]) -> list[int]:
    if edges != sorted(set(edges)):
        raise ValueError("its numbers should rise")
    return edges


class ByPosition(Record):
    """Mean losses between the edges: one for each edge, or one fewer where the last edge closes the last span."""

    edges: Annotated[list[Count], AfterValidator(_rising)]

    @model_validator(mode="after")
    def _check_lengths(self) -> "ByPosition":
        for name, losses in self:
            if len(self.edges) - len(losses) not in (0, 1):
                raise ValueError(f"{name} has {len(losses)} numbers for {len(self.edges)} edges")
        return self


class LossByPosition(ByPosition):
    nll: list[Number]


class LossesByPosition(ByPosition):
    before: list[Number]
    after: list[Number]


class Summary(Record):
    """What one model's scores come to; KL and agreement against a reference, where there was one."""

    perplexity: Positive
    perplexity_95: Interval | None = None
    nll: Number
    bits_per_byte: Number
    word_perplexity: Positive | None = None
    per_position: LossByPosition
    kl: Number | None = None
    kl_95: Interval | None = None
    top1_agreement: Share | None = None


class Paired(Record):
    """Ratio and difference of two perplexities, paired by window. No interval: there were too few windows."""

    ratio: Positive
    ratio_95: Interval | None = None
    difference: Number
    difference_95: Interval | None = None
    windows: Count


class Perplexity(Paired):
    """The original's and the reduced model's on one text."""

    before: Positive
    after: Positive
    before_95: Interval | None = None
    after_95: Interval | None = None
    protocol: TextProtocol


class Change(Record):
    """A number of the original, and of the reduced model."""

    before: Number
    after: Number


class Cost(Record):
    """What a conversion cost, on one text."""

    perplexity: Perplexity
    bits_per_byte: Change
    word_perplexity: Change | None = None  # None: beyond any number
    per_position: LossesByPosition
    kl: Number  # to the original, nats a token
    kl_95: Interval | None = None
    top1_agreement: Share
