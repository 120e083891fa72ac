"""What is recorded of a healing run."""

from typing import Any

from pydantic import ConfigDict

from qectomy.record.base import Amount, Count, Flag, Interval, Made, Number, Plain, Positive, Record, Share, Text
from qectomy.record.texts import ReadAs


class HealedText(Record):
    text: Text
    sha256: Text
    read_as: ReadAs | None = None
    left_out: tuple[Count, Count]  # tokens that are measured on
    validation_tokens: Count
    tokens: Count


class HealingSettings(Record):
    """All options of the run; those that are read again have a field."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Plain | None]

    loss: Text
    lr: Number
    minutes: Number | None = None


class CurveRow(Record):
    """A validation: the loss trained on is the mean since the row before."""

    step: Count
    tokens: Count
    train_loss: Number | None = None
    validation_loss: Number
    validation_kl: Number
    validation_perplexity: Positive
    learning_rate: Number | None = None


class Validation(Record):
    original_perplexity: Positive
    curve: list[CurveRow]


class HealedPerplexity(Record):
    original: Positive
    original_95: Interval | None = None
    fitted: Positive
    fitted_95: Interval | None = None
    fitted_ratio: Positive
    fitted_ratio_95: Interval | None = None
    healed: Positive
    healed_95: Interval | None = None
    healed_ratio: Positive
    healed_ratio_95: Interval | None = None


class HealedChange(Record):
    fitted: Number
    healed: Number


class HealedAgreement(Record):
    fitted: Share
    healed: Share


class HealingSeconds(Record):
    training: Amount
    this_process: Amount


class Spent(Record):
    """What a run was planned to spend; see healing/budget.py."""

    tokens: Count | None = None
    evaluations: Count
    validation_tokens: Count
    tokens_a_second: Amount | None = None
    timing_seconds: Amount | None = None
    enough_minutes: Count | None = None


class Healing(Made):
    texts: list[HealedText]
    self_generated: dict[str, Any] | None = None  # where text that the original wrote comes from
    tokens: Count
    steps: Count
    planned_steps: Count
    best_step: Count  # 0: none was better than the start
    trained_parameters: Count
    settings: HealingSettings
    budget: Spent
    micro_batch: Count
    accumulation: Count
    tokens_a_step: Count
    processes: Count
    device: Text
    seconds: HealingSeconds
    validation: Validation
    perplexity: HealedPerplexity
    kl: HealedChange
    top1_agreement: HealedAgreement
    fitted_sha256: dict[Text, Text]
    teacher_is_source: Flag
    earlier: "Healing | None" = None
