"""evaluation.json: what `qectomy eval` measured of checkpoints, by a text and by the tasks of lm-eval."""

from typing import Annotated, Literal

from pydantic import Field

from qectomy.record.base import Amount, Count, Flag, Made, Number, Plain, Record, Text
from qectomy.record.scores import Paired, Summary
from qectomy.record.texts import Overlap, TextProtocol


class PairedWith(Paired):
    against: Text


class Evaluated(Summary):
    """One checkpoint on one text; the others are also paired with the first, where their tokens are the same."""

    checkpoint: Text
    fingerprint: Text  # of its files, by which it is known
    reference: Text | None = None
    reference_refused: Text | None = None
    paired: PairedWith | None = None
    paired_refused: Text | None = None
    seconds: Amount
    tokens_per_second: Amount | None = None  # None: a reference ran beside it
    device: Text
    streamed: Flag
    overlap: Overlap | None = None  # with what this checkpoint was fitted on
    protocol: TextProtocol

    @property
    def own_protocol(self) -> TextProtocol:
        """The protocol, which all share, with this checkpoint's overlap."""
        return self.protocol.model_copy(update={"overlap": self.overlap})


class TaskValue(Record):
    checkpoint: Text
    value: Number
    stderr: Amount | None = None


class Task(Record):
    """One metric of a task, a value a checkpoint."""

    task: Text
    group: Text | None = None
    metric: Text
    filter: Text
    higher_is_better: Flag | None = None
    n: Count
    version: Plain | None = None
    num_fewshot: Plain | None = None
    values: Annotated[list[TaskValue], Field(min_length=1)]


class HarnessRun(Record):
    """How every checkpoint was asked; lists have an entry a checkpoint."""

    limit: Count | None = None
    max_length: Count
    batch_size: Count
    device: Text
    num_fewshot: Count | None = None
    bootstrap_iters: Count
    seeds: dict[Text, Count]
    dtype: list[Text]
    truncated: list[Count]
    seconds: list[Amount]


class Harness(Record):
    version: Text
    tasks: list[Task]
    settings: HarnessRun


class Evaluation(Made):
    kind: Literal["evaluation"] = "evaluation"
    results: list[Evaluated] | None = None
    lm_eval: Harness | None = None
