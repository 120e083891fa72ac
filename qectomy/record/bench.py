"""bench.json: what inference costs with two checkpoints, as `qectomy bench` measured it."""

from typing import Annotated, Literal

from pydantic import Field

from qectomy.record.base import Amount, Count, Flag, Made, Positive, Record, Size, Text


class Spread(Record):
    """A median and an interval around it."""

    median: Amount
    low: Amount
    high: Amount


class Prefill(Record):
    batch: Count
    tokens: Count  # of each prompt
    tokens_per_second: Spread


class Decode(Record):
    batch: Count
    operations_per_step: Count
    bytes_read_per_token: Positive
    tokens_per_second: Spread
    bytes_per_second: Positive


class BenchModel(Record):
    """One checkpoint; load time and memory are None where no fresh process was started."""

    checkpoint: Text
    fingerprint: Text
    parameters: Size
    bytes: Size
    bytes_on_disk: Size
    kv_cache_bytes_per_token: Amount = 0
    load_seconds: Spread | None = None
    peak_memory_bytes: Amount | None = None
    prefill: list[Prefill] = Field(default_factory=list)
    decode: list[Decode] = Field(default_factory=list)


class PrefillRatio(Record):
    batch: Count
    ratio: Spread


class DecodeRatio(PrefillRatio):
    byte_limit: Positive  # the ratio if only the bytes that a step reads took time
    share_of_limit: Positive


class BenchRatios(Record):
    """The original's cost over the reduced one's."""

    parameters: Positive
    bytes: Positive
    bytes_on_disk: Positive
    load: Spread | None = None
    peak_memory: Positive | None = None
    prefill: list[PrefillRatio] = Field(default_factory=list)
    decode: list[DecodeRatio] = Field(default_factory=list)


class BenchRun(Record):
    batches: list[Count]
    rounds: Count
    starts: Count
    prompt_tokens: Count
    new_tokens: Count
    compile: Flag
    seed: Count


class Bench(Made):
    kind: Literal["bench"] = "bench"
    device: Text
    device_name: Text | None = None
    dtype: Text
    threads: Count
    settings: BenchRun
    models: Annotated[list[BenchModel], Field(min_length=2, max_length=2)]
    ratios: BenchRatios
    warnings: list[Text]
    notes: list[Text]
