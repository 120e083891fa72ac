"""How text becomes scored tokens. Two perplexities compare only under equal protocols.

A text is cut into windows; in each, the tokens from `first_scored` on are scored, given all before them in the window.
Dimensions: n windows, L positions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from qectomy.checkpoint.checkpoint import locate
from qectomy.checkpoint.headers import read_json
from qectomy.errors import TextError
from qectomy.record.texts import ReadAs, TextProtocol
from qectomy.text.documents import CONTEXT
from qectomy.text.text import Source, bos_of, text_of
from qectomy.text.text_spans import spans_of
from qectomy.text.windows import cut, first_tokens, stacked, text_width


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Context, stride and share of the text. `name`: of a published protocol (`published.py`), which says the rest."""

    context: int = CONTEXT
    stride: int | None = None  # None: context, windows do not overlap
    tokens: int | None = None  # read only the first tokens of the text; None: all of it
    name: str | None = None


@dataclass(frozen=True)
class ScoringWindows:
    """Windows of one text, and which tokens of each are scored."""

    tokens: torch.Tensor  # (n, L); what follows a shorter window's own tokens is never read by one that is scored
    first_scored: torch.Tensor  # (n,) position of the first token that counts in each window
    report: TextProtocol  # what is said of them, and counted
    lengths: torch.Tensor | None = None  # (n,) tokens of each window; None: L each
    text: str = ""  # that the scored tokens stand for

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the scored tokens."""
        return self.report.scored_bytes

    @property
    def n_words(self) -> int:
        """Words that begin in the scored tokens."""
        return self.report.scored_words

    def scored_mask(self) -> torch.Tensor:
        """(n, L - 1): True where the next token, at position t + 1, is scored."""
        positions = torch.arange(1, self.tokens.shape[1])
        mask = positions[None, :] >= self.first_scored[:, None]
        return mask if self.lengths is None else mask & (positions[None, :] < self.lengths[:, None])

    def score_numbers(self) -> torch.Tensor:
        """(n, L - 1): which score, in the order of the windows, the next token at each position gets; -1: none."""
        mask = self.scored_mask()
        return torch.full(mask.shape, -1).masked_scatter_(mask, torch.arange(int(mask.sum())))

    def length(self, window: int) -> int:
        """Tokens of one window."""
        return self.tokens.shape[1] if self.lengths is None else int(self.lengths[window])

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the window and the position of each scored token, (N,) each, in the order in which they are scored."""
        windows, before = self.scored_mask().nonzero(as_tuple=True)
        return windows, before + 1


def scoring_windows(
    tokenizer: Any, source: Source, protocol: Protocol, vocab_size: int, special: bool = False
) -> ScoringWindows:
    """Cut a text into windows with a stride. Raises TextError when it is shorter than one window.

    `special`: the tokenizer's own special tokens stand around the whole text, and no BOS before each window.
    """
    context, stride = protocol.context, protocol.stride or protocol.context
    if not 0 < stride <= context:
        raise TextError(f"--stride {stride} must lie between 1 and the context, {context}")
    bos = None if special else bos_of(tokenizer)
    width = text_width(context, bos)
    step = min(stride, width)
    if protocol.tokens is not None and protocol.tokens < width:
        raise TextError(
            f"{protocol.tokens} evaluation tokens are fewer than one window of {width}; ask for more of them"
        )
    read = first_tokens(tokenizer, source.text, protocol.tokens, places=True, special=special)
    spans = cut(len(read.ids), width, step)
    if not spans:
        shorter = "" if protocol.name else " or a smaller --context"
        raise TextError(
            f"{source.name} has {len(read.ids)} tokens, fewer than one window of {width}; give more text{shorter}"
        )
    windows = torch.from_numpy(stacked(np.array(read.ids), spans, width, vocab_size, bos))
    first = torch.tensor([max(1, span.seen + (bos is not None)) for span in spans])  # before that one stands nothing
    counted = spans_of(tokenizer, source.text, read.ids, read.ends)
    scored = [(stop - windows.shape[1] + skip, stop) for (_, stop, _), skip in zip(spans, first.tolist(), strict=True)]
    begins = "every window starts with BOS" if bos is not None else "none"
    if special and read.ids[:1] == [tokenizer.bos_token_id]:
        begins = "at the start of the text"
    report = protocol_record(
        tokenizer,
        source,
        protocol,
        _in_words(context, step, overlapping=step < width, special=special),
        stride=step,
        bos=begins,
        windows=len(spans),
        tokens=spans[-1].stop,
        scored_tokens=sum(stop - start for start, stop in scored),
        scored_bytes=sum(counted.n_bytes(*span) for span in scored),
        scored_words=sum(counted.n_words(*span) for span in scored),
        tail="tokens after the last whole window are left out",
    )
    return ScoringWindows(windows, first, report, text=text_of(tokenizer, read.ids[: spans[-1].stop]))


def _in_words(context: int, step: int, *, overlapping: bool, special: bool) -> str:
    """Say how one text becomes windows."""
    around = "with the tokenizer's" if special else "without"
    apart = f"each {step} further than the one before" if overlapping else "none overlapping"
    return (
        f"documents joined by a blank line and tokenized as one text {around} special tokens; windows of {context} "
        f"tokens, {apart}; a token is scored once, given all before it in its window"
    )


def protocol_record(tokenizer: Any, source: Source, protocol: Protocol, in_words: str, **counts: Any) -> TextProtocol:
    """Return what a report says of how a text was measured: the text, the windows, and what of them is scored."""
    return TextProtocol(
        name=protocol.name,
        text=source.name,
        text_sha256=source.sha256,
        text_read_as=ReadAs(**source.read_as) if source.read_as else None,
        only_first_tokens=None if protocol.name is None else protocol.tokens,
        tokenizer=type(tokenizer).__name__,
        in_words=in_words,
        context=protocol.context,
        **counts,
    )


def common_context(names: list[str]) -> int:
    """Return 512, or the number of positions that each of these checkpoints was made for, if that is less."""
    return min([CONTEXT, *(made_for for made_for in map(positions_of, names) if made_for)])


def positions_of(name: str) -> int | None:
    """Return the number of positions that a checkpoint was made for, by its config; None if that does not say."""
    config = read_json(locate(name) / "config.json")
    fields = config if isinstance(config, dict) else {}
    fields = {**inner, **fields} if isinstance(inner := fields.get("text_config"), dict) else fields
    said = [fields.get(field) for field in ("max_position_embeddings", "n_positions")]
    found = [positions for positions in said if isinstance(positions, int) and positions > 1]
    return min(found, default=None)


def check_positions(name: str, config: Any, context: int, protocol: str | None = None) -> None:
    """Raise TextError if a model with a table of positions, not RoPE, has fewer than a window's.

    `protocol`: the name of a published one that says how long its windows are.
    """
    rows = table_of_positions(config)
    if rows is None or context <= rows:
        return
    if protocol is not None:
        raise TextError(
            f"--protocol {protocol} means windows of {context} tokens, and {name} has {rows} positions; it can be "
            "measured by another one alone, as wikitext2-1024, lm-eval-wikitext or rolling"
        )
    raise TextError(f"--context {context} is longer than the {rows} positions of {name}; use {rows} or less")


def table_of_positions(config: Any) -> int | None:
    """Return how many rows a model's table of positions has; None for RoPE, which goes on beyond any."""
    rows = getattr(config, "max_position_embeddings", None)
    return rows if getattr(config, "rope_parameters", None) is None and isinstance(rows, int) else None
