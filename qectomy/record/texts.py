"""What is recorded of a text that was measured, and how it was."""

from qectomy.record.base import Count, Flag, Record, Share, Text


class ReadAs(Record):
    """As what a text was read: of records their number and field."""

    kind: Text
    records: Count | None = None
    field: Text | None = None
    chat_template_sha256: Text | None = None
    looks_like: Text | None = None  # what prose seems to be instead


class Overlap(Record):
    """How much of a text stands in what was fitted or trained on: the share of its spans of `words` words."""

    share: Share | None = None
    validation_share: Share | None = None  # of the text that healing was validated on
    spans: Count
    words: Count
    fitted_text: Flag | None = None  # whether the text itself, another part of it, was fitted or trained on
    complete: Flag  # whether all that was fitted or trained on is known


class TextProtocol(Record):
    """A text, and how it was cut into windows and scored. Two perplexities compare only under equal protocols."""

    name: Text | None = None  # of a published protocol
    text: Text
    text_sha256: Text
    text_read_as: ReadAs | None = None
    only_first_tokens: Count | None = None
    tokenizer: Text
    in_words: Text
    context: Count
    stride: Count
    bos: Text
    documents: Count | None = None
    windows: Count
    tokens: Count
    scored_tokens: Count
    scored_bytes: Count
    scored_words: Count
    tail: Text
    first_token: Count | None = None  # of the text, where not its start was measured
    fitted_on: Flag | None = None  # whether the reduced model was fitted on some of these tokens
    overlap: Overlap | None = None
    dtype: Text | None = None  # computed in
