"""How text becomes scored tokens. Two perplexities compare only under equal protocols.

A text is cut into windows; in each, the tokens from `first_scored` on are scored, given all before them in the window.
Dimensions: n windows, L positions.
"""

from dataclasses import dataclass
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import locate
from qectomy.checkpoint.headers import read_json
from qectomy.errors import CheckpointError, TextError
from qectomy.text.documents import CONTEXT
from qectomy.text.text import Source, adds_bos, first_tokens_and_ends, text_of
from qectomy.text.text_spans import spans_of


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
    n_bytes: int  # UTF-8 bytes of the scored tokens
    report: dict[str, Any]
    n_words: int = 0  # words that begin in the scored tokens
    lengths: torch.Tensor | None = None  # (n,) tokens of each window; None: L each
    text: str = ""  # that the scored tokens stand for

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


def scoring_windows(tokenizer: Any, source: Source, protocol: Protocol, vocab_size: int) -> ScoringWindows:
    """Cut a text into windows with a stride. Raises TextError when it is shorter than one window."""
    context, stride = protocol.context, protocol.stride or protocol.context
    if not 0 < stride <= context:
        raise TextError(f"--stride {stride} must lie between 1 and the context, {context}")
    bos = adds_bos(tokenizer)
    width = context - bos
    step = min(stride, width)
    read, ends = first_tokens_and_ends(tokenizer, source, protocol.tokens, ends=True)
    ids = torch.tensor(read, dtype=torch.int64)
    if protocol.tokens is not None and protocol.tokens < width:
        raise TextError(
            f"{protocol.tokens} evaluation tokens are fewer than one window of {width}; ask for more of them"
        )
    if width < 2:
        raise TextError(f"a context of {context} tokens leaves nothing to predict after BOS; use 3 or more")
    if len(ids) < width:
        raise TextError(
            f"{source.name} has {len(ids)} tokens, fewer than one window of {width}; give more text or a smaller "
            "--context"
        )
    check_ids(torch.tensor([*read, tokenizer.bos_token_id] if bos else read), vocab_size)
    windows = ids.unfold(0, width, step).clone()
    first = torch.full((windows.shape[0],), width - step)
    first[0] = 0
    if bos:
        windows = torch.cat([torch.full((windows.shape[0], 1), tokenizer.bos_token_id), windows], dim=1)
        first += 1
    first.clamp_(min=1)  # the first position of a window has nothing before it
    starts = [index * step for index in range(windows.shape[0])]
    scored = [(start + int(skip) - bos, start + width) for start, skip in zip(starts, first, strict=True)]
    spans = spans_of(tokenizer, source.text, read, ends)
    n_bytes, n_words = (sum(count(*span) for span in scored) for count in (spans.n_bytes, spans.n_words))
    report = {
        **about(source),
        "tokenizer": type(tokenizer).__name__,
        "in_words": (
            "documents joined by a blank line and tokenized as one text without special tokens; windows of "
            f"{context} tokens, {'none overlapping' if step == width else f'each {step} further than the one before'}; "
            "a token is scored once, given all before it in its window"
        ),
        "context": context,
        "stride": step,
        "bos": "every window starts with BOS" if bos else "none",
        "windows": windows.shape[0],
        "tokens": (windows.shape[0] - 1) * step + width,
        "scored_tokens": sum(stop - start for start, stop in scored),
        "scored_bytes": n_bytes,
        "scored_words": n_words,
        "tail": "tokens after the last whole window are left out",
    }
    measured = text_of(tokenizer, read[: report["tokens"]])
    return ScoringWindows(windows, first, n_bytes, report, n_words, text=measured)


def about(source: Source) -> dict[str, Any]:
    """What a report says of a text: its name, its hash and as what it was read."""
    read_as = {"text_read_as": source.read_as} if source.read_as else {}
    return {"text": source.name, "text_sha256": source.sha256, **read_as}


def check_ids(ids: torch.Tensor, vocab_size: int) -> None:
    """Raise CheckpointError if the tokenizer makes ids that the embedding has no row for."""
    if int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer makes token id {int(ids.max())}, but the model's embedding has {vocab_size} rows"
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
