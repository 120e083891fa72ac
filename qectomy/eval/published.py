"""Protocols under which perplexities are published, by name, so that numbers can be laid beside those of papers.

    wikitext2-2048      WikiText-2 (raw, test), its lines joined by blank lines and tokenized as one text with the
    wikitext2-1024      tokenizer's own special tokens, disjoint windows, the last incomplete one dropped: GPTQ
                        (arXiv 2210.17323), SliceGPT (arXiv 2401.15024), SVD-LLM (arXiv 2403.07378)
    lm-eval-wikitext    task `wikitext` of lm-evaluation-harness: each page detokenized and scored whole, in disjoint
                        windows of as many tokens as the model was made for; words and bytes are the page's as it stands
    rolling             the same windows on documents of your own, as they stand: `loglikelihood_rolling` of the harness

They are measured on the dataset where a network is, or on a local file in its place (--text).
"""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qectomy.errors import QectomyError, TextError
from qectomy.eval.protocol import Protocol, ScoringWindows, about, check_ids
from qectomy.text.documents import JOIN, Documents, Reading
from qectomy.text.text import Source, first_tokens_and_ends, text_of
from qectomy.text.text_spans import spans_of

WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1:test"
WIKITEXT2_PAGES = "EleutherAI/wikitext_document_level:wikitext-2-raw-v1:test"
ROLLING_CONTEXT = 2048  # lm-eval's, where a model does not say for how many tokens it was made


@dataclass(frozen=True)
class Text:
    """A text as its documents, in their order, none left out: an empty line of WikiText is one."""

    name: str
    sha256: str
    documents: list[str]
    read_as: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """One named protocol. `context`: fixed, or None for as many tokens as the model was made for."""

    dataset: str | None
    context: int | None
    windows: Callable[[Any, Text, Protocol, int], ScoringWindows]
    lines: bool = False  # a plain text file stands for a dataset of its lines


def published(name: str) -> Published:
    """Return a named protocol. Raises QectomyError listing the known ones."""
    if name not in PUBLISHED:
        raise QectomyError(f"unknown --protocol {name!r}; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def read_text(name: str | None, protocol: str, reading: Reading | None = None) -> Text:
    """Read the documents of a named protocol: its dataset's, or those of a local file. Raises TextError."""
    chosen = published(protocol)
    name = name or chosen.dataset
    if name is None:
        raise TextError(f"--protocol {protocol} is measured on a text of your own: give --text")
    read = Documents(name, reading)
    found = list(read)
    if read.join == "":
        found = ["".join(found)]
        found = _as_rows(found[0]) if chosen.lines else found
    if not any(document.strip() for document in found):
        raise TextError(f"{name} holds no text")
    return Text(Path(name).name if read.is_file else name, read.sha256, found, read.read_as)


def _as_rows(text: str) -> list[str]:
    """The rows that `datasets` makes of WikiText's file: its lines with their ends, a blank one as an empty row."""
    # Not splitlines, which also cuts where Unicode sees a line's end.
    return [line if line.strip() else "" for line in io.StringIO(text, newline=None)]


def joined_windows(tokenizer: Any, text: Text, protocol: Protocol, vocab_size: int) -> ScoringWindows:
    """Cut one long text into disjoint windows, special tokens only where the tokenizer puts them: at its start."""
    context, whole = protocol.context, JOIN.join(text.documents)
    source = Source(text.name, text.sha256, whole)
    read, ends = first_tokens_and_ends(tokenizer, source, None, ends=True, special=True)
    bos = read[:1] == [tokenizer.bos_token_id] and read[:1] != [None]
    read = read[: protocol.tokens]
    ids = torch.tensor(read, dtype=torch.int64)
    n = len(ids) // context
    if n == 0 and protocol.tokens is not None and protocol.tokens < context:
        raise TextError(f"--tokens {protocol.tokens} is fewer than one window of {context}; ask for more of them")
    if n == 0:
        raise TextError(f"{text.name} has {len(ids)} tokens, fewer than one window of {context}; give more text")
    check_ids(ids, vocab_size)
    spans = spans_of(tokenizer, whole, read, ends and ends[: len(read)])
    starts = range(0, n * context, context)
    n_bytes, n_words = (sum(count(a + 1, a + context) for a in starts) for count in (spans.n_bytes, spans.n_words))
    report = {
        **_named(text, protocol, tokenizer),
        "in_words": (
            f"documents joined by blank lines and tokenized as one text with the tokenizer's special tokens; windows "
            f"of {context} tokens, none overlapping; all tokens of a window but the first are scored, given those "
            "before them"
        ),
        "stride": context,
        "bos": "at the start of the text" if bos else "none",
        "windows": n,
        "tokens": n * context,
        "scored_tokens": n * (context - 1),
        "scored_bytes": n_bytes,
        "scored_words": n_words,
        "tail": "tokens after the last whole window are left out",
    }
    first = torch.ones(n, dtype=torch.int64)
    measured = text_of(tokenizer, read[: n * context])
    return ScoringWindows(ids[: n * context].view(n, context), first, n_bytes, report, n_words, text=measured)


def page_windows(tokenizer: Any, text: Text, protocol: Protocol, vocab_size: int) -> ScoringWindows:
    """Score each page of WikiText whole, detokenized; its words and bytes are counted as the page stands."""
    return _rolling(tokenizer, text, protocol, vocab_size, detokenized, "each page is detokenized; ")


def rolling_windows(tokenizer: Any, text: Text, protocol: Protocol, vocab_size: int) -> ScoringWindows:
    """Score each document whole, in windows that do not overlap but for the last one's context."""
    return _rolling(tokenizer, text, protocol, vocab_size, lambda document: document, "")


def _rolling(
    tokenizer: Any, text: Text, protocol: Protocol, vocab_size: int, prepare: Callable[[str], str], also: str
) -> ScoringWindows:
    context = protocol.context
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise TextError("the tokenizer has neither a BOS nor an EOS token, and rolling windows begin with one")
    rows: list[tuple[list[int], int]] = []  # a window's tokens, position of the first scored one
    n_tokens = n_bytes = n_words = n_documents = 0
    for document in text.documents:
        ids = _encoded(tokenizer, prepare(document), prefix)
        if protocol.tokens is not None and n_documents == 0 and len(ids) > 2 * protocol.tokens:
            raise TextError(
                f"--tokens {protocol.tokens}: documents are scored whole, and the first of {text.name} has {len(ids)} "
                "tokens; leave --tokens out, or give a text of shorter documents (.jsonl)"
            )
        rows += rolling_rows(ids, prefix, context)
        n_tokens, n_bytes, n_documents = n_tokens + len(ids), n_bytes + len(document.encode()), n_documents + 1
        n_words += len(re.split(r"\s+", document))
        if protocol.tokens is not None and n_tokens >= protocol.tokens:
            break
    if not rows:
        raise TextError(f"{text.name} has no tokens to score")
    lengths = torch.tensor([len(tokens) for tokens, _ in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row, (tokens, _) in zip(padded, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    check_ids(padded, vocab_size)
    report = {
        **_named(text, protocol, tokenizer),
        "in_words": (
            f"{also}every document is tokenized alone, with the tokenizer's special tokens, every token of it scored "
            f"once: windows of {context} tokens, none overlapping, each given the token before it, the first BOS (EOS "
            "where there is none); the last is filled up from the left with tokens already scored"
        ),
        "stride": context,
        "bos": "before each document",
        "documents": n_documents,
        "windows": len(rows),
        "tokens": n_tokens,
        "scored_tokens": n_tokens,
        "scored_bytes": n_bytes,
        "scored_words": n_words,
        "tail": "all tokens are scored",
    }
    measured, first = JOIN.join(text.documents[:n_documents]), torch.tensor([first for _, first in rows])
    return ScoringWindows(padded, first, n_bytes, report, n_words, lengths, measured)


def rolling_rows(ids: list[int], prefix: int, context: int) -> list[tuple[list[int], int]]:
    """Return the windows of one document: each with the tokens read and scored, and where the scored ones begin."""
    rows, done = [], 0
    while done < len(ids):
        stop = min(done + context, len(ids))
        # The last window may be short: what it lacks, it reads of what was scored before, if there was anything.
        start = max(0, stop - context) if done else 0
        before = ids[start - 1] if start else prefix
        rows.append(([before, *ids[start:stop]], done - start + 1))
        done = stop
    return rows


def _encoded(tokenizer: Any, text: str, prefix: int) -> list[int]:
    """Tokenize as the harness does: with special tokens, but for a text that is written with its BOS already."""
    special = not text.startswith(tokenizer.decode(prefix))
    return tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]


def _named(text: Text, protocol: Protocol, tokenizer: Any) -> dict[str, Any]:
    source = Source(text.name, text.sha256, "", text.read_as)
    of_all = {} if protocol.tokens is None else {"only_first_tokens": protocol.tokens}
    return {
        "name": protocol.name,
        **about(source),
        **of_all,
        "tokenizer": type(tokenizer).__name__,
        "context": protocol.context,
    }


def detokenized(page: str) -> str:
    """Return a page of WikiText as it was before it was cut into tokens, by the harness's own rules."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return wikitext_detokenizer({"page": page})


PUBLISHED = {
    "wikitext2-2048": Published(WIKITEXT2, 2048, joined_windows, lines=True),
    "wikitext2-1024": Published(WIKITEXT2, 1024, joined_windows, lines=True),
    "lm-eval-wikitext": Published(WIKITEXT2_PAGES, None, page_windows),
    "rolling": Published(None, None, rolling_windows),
}
