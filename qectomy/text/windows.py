"""Text to windows of tokens: one stream of tokens, one cutter, for what is fitted, measured and trained on.

The documents of a text are joined by a blank line and tokenized as one text without special tokens. Where the tokenizer
itself starts a text with BOS, every window starts with BOS too (and holds one text token fewer).

Dimensions: n windows, L positions.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from qectomy.errors import CheckpointError, TextError
from qectomy.text.text import Source, bos_of, text_of, token_ids

CHARACTERS_A_TOKEN = 6  # how much text is read at first for each token wanted; more is read when it falls short
ITEM = np.dtype("<u4")  # of a stream of tokens, as on disk
UNSURE = 64  # tokens before a cut in the text that may differ from those of the whole text


class Opening:
    """The start of a text that comes in pieces, read on as far as is asked for."""

    def __init__(self, pieces: Iterable[str]):
        self._pieces, self.text = iter(pieces), ""

    def upto(self, length: int | None) -> str:
        """Return the first characters; fewer where the text ends, all where None are asked for."""
        held, there = [self.text], len(self.text)
        while (length is None or there < length) and (piece := next(self._pieces, None)) is not None:
            held.append(piece)
            there += len(piece)
        self.text = "".join(held)
        return self.text[:length]


class Tokens(NamedTuple):
    """Tokens of a text, and where in it each stands, in characters: None if that was not asked for or is not known."""

    ids: list[int]
    places: list[tuple[int, int]] | None

    @property
    def ends(self) -> list[int] | None:
        return None if self.places is None else [stop for _, stop in self.places]


def first_tokens(
    tokenizer: Any, text: str | Opening, count: int | None, *, places: bool = False, special: bool = False
) -> Tokens:
    """Return the first `count` tokens (None: all) of a text, reading no more of it than that takes.

    `special`: with the special tokens that the tokenizer puts around a text, if the text is read to its end.
    """
    opening = Opening([text]) if isinstance(text, str) else text
    places = places and getattr(tokenizer, "is_fast", False)
    length = None if count is None else count * CHARACTERS_A_TOKEN + 1000
    while True:
        read = opening.upto(length)
        found = token_ids(tokenizer, read, add_special_tokens=special, return_offsets_mapping=places, verbose=False)
        if length is None or count is None or len(read) < length or len(found["input_ids"]) >= count + UNSURE:
            return Tokens(found["input_ids"][:count], found["offset_mapping"][:count] if places else None)
        length *= 2


class TokenStream:
    """The tokens of a text of any length, from its front: tokenized piece by piece, in the memory of one piece."""

    def __init__(self, tokenizer: Any, pieces: Iterable[str]):
        self._tokenizer, self._pieces, self._left = tokenizer, iter(pieces), np.empty(0, ITEM)
        self.taken = 0

    def take(self, count: int) -> np.ndarray:
        """Return the next tokens, fewer where the text ends."""
        got, there = [self._left], len(self._left)
        while there < count and (piece := next(self._pieces, None)) is not None:
            ids = token_ids(self._tokenizer, piece, add_special_tokens=False, verbose=False)["input_ids"]
            got.append(np.asarray(ids, ITEM))
            there += len(ids)
        joined = np.concatenate(got)
        found, self._left = joined[:count], joined[count:]
        self.taken += len(found)
        return found


class Span(NamedTuple):
    """A window over the tokens [start, stop) of a text, whose first `seen` ones lie in the window before it, too."""

    start: int
    stop: int
    seen: int


def cut(n: int, width: int, step: int | None = None, *, rest: bool = False) -> list[Span]:
    """Return the windows of `width` tokens over n, each `step` (None: width) further than the one before.

    Tokens behind the last whole window are left out; with `rest` they make another, filled up from the left.
    """
    step = step or width
    spans = [Span(at, at + width, width - step if at else 0) for at in range(0, n - width + 1, step)]
    done = spans[-1].stop if spans else 0
    if rest and done < n:
        start = max(0, n - width)
        spans.append(Span(start, n, done - start))
    return spans


def stacked(ids: np.ndarray, spans: list[Span], width: int, vocab_size: int, bos: int | None = None) -> np.ndarray:
    """Return the tokens of windows (n, L), each after BOS where that is given, and filled up with 0 on the right.

    Raises CheckpointError for ids that the embedding has no row for.
    """
    lead = int(bos is not None)
    windows = np.zeros((len(spans), lead + width), ids.dtype)
    if bos is not None:
        windows[:, 0] = bos
    for window, (start, stop, _) in zip(windows, spans, strict=True):
        window[lead : lead + stop - start] = ids[start:stop]
    if (largest := int(windows.max(initial=0))) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer makes token id {largest}, but the model's embedding has {vocab_size} rows; "
            "tokenizer and weights do not belong together"
        )
    return windows


@dataclass(frozen=True)
class Windows:
    """Token windows of one or more texts."""

    tokens: torch.Tensor  # (n, L) int64
    bos: bool  # whether each window starts with BOS
    sources: list[dict[str, Any]]  # what a report says of each text: file, sha256, tokens, skipped
    spans: dict[str, Any] = field(default_factory=dict)  # what a report keeps of their content

    def texts(self, tokenizer: Any) -> Iterator[str]:
        """Yield the part of each text that the windows hold."""
        rows = [source["tokens"] // self.tokens.shape[1] for source in self.sources]
        for block in self.tokens[:, int(self.bos) :].split(rows):
            yield text_of(tokenizer, block.flatten().tolist())


def make_windows(
    tokenizer: Any,
    sources: list[Source],
    *,
    context: int,
    tokens: int | None,
    vocab_size: int,
    skip: dict[str, int] | None = None,
) -> Windows:
    """Cut the sources into windows of `context` tokens, about `tokens` in all (None: everything there is).

    The tokens are shared evenly among the sources. `skip` gives, by a source's sha256, how many of its first
    tokens to leave out (they are evaluated on). Raises TextError when a text is shorter than one window and
    CheckpointError when the tokenizer makes ids beyond the embedding.
    """
    bos = bos_of(tokenizer)
    width = text_width(context, bos)
    blocks, reports = [], []
    wanted = None if tokens is None else max(1, tokens // context)
    for i, source in enumerate(sources):
        left_out = (skip or {}).get(source.sha256, 0)
        share = None if wanted is None else (wanted * (i + 1)) // len(sources) - (wanted * i) // len(sources)
        if share == 0:
            continue
        count = None if share is None else left_out + share * width
        ids = np.array(first_tokens(tokenizer, source.text, count).ids, np.int64)
        spans = cut(len(ids) - left_out, width)
        if not spans:
            raise TextError(_too_short(source.name, len(ids), left_out, width))
        blocks.append(stacked(ids[left_out:], spans, width, vocab_size, bos))
        told = {"file": source.name, "sha256": source.sha256, "tokens": len(spans) * context, "first_token": left_out}
        reports.append(told | ({"read_as": source.read_as} if source.read_as else {}))
    return Windows(torch.from_numpy(np.concatenate(blocks)), bos is not None, reports)


def text_width(context: int, bos: int | None) -> int:
    """Return how many tokens of the text a window of `context` tokens holds. Raises TextError for fewer than two."""
    width = context - (bos is not None)
    if width < 2:
        after, least = ("", 2) if bos is None else (" after BOS", 3)
        raise TextError(f"a context of {context} tokens leaves nothing to predict{after}; use {least} or more")
    return width


def _too_short(name: str, there: int, left_out: int, width: int) -> str:
    """Say that a text of `there` tokens, the first `left_out` of them evaluated on, leaves no window to fit on."""
    if not left_out:
        return f"{name} has {there} tokens, fewer than one window of {width}; give more text or a smaller --context"
    half = there // 2 // width * width
    fewer = f", --eval-tokens {half} or fewer" if half else ""
    return (
        f"{name} has {there} tokens; less the first {min(left_out, there)}, which are kept for evaluation, that is "
        f"fewer than one window of {width}; give an --eval-text{fewer} or a smaller --context"
    )
