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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qectomy.errors import QectomyError, TextError
from qectomy.eval.protocol import Protocol, ScoringWindows, protocol_record, scoring_windows
from qectomy.text.documents import JOIN, Documents, Reading
from qectomy.text.text import Source, token_ids
from qectomy.text.windows import Span, cut, stacked

WIKITEXT2 = "Salesforce/wikitext:wikitext-2-raw-v1:test"
WIKITEXT2_PAGES = "EleutherAI/wikitext_document_level:wikitext-2-raw-v1:test"
ROLLING_CONTEXT = 2048  # lm-eval's, where a model does not say for how many tokens it was made


@dataclass(frozen=True)
class Published:
    """One named protocol. `context`: fixed, or None for as many tokens as the model was made for."""

    dataset: str | None
    context: int | None
    windows: Callable[[Any, Source, Protocol, int], ScoringWindows]
    lines: bool = False  # a plain text file stands for a dataset of its lines


def published(name: str) -> Published:
    """Return a named protocol. Raises QectomyError listing the known ones."""
    if name not in PUBLISHED:
        raise QectomyError(f"unknown --protocol {name!r}; known: {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def read_text(name: str | None, protocol: str, reading: Reading | None = None) -> Source:
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
    own = Path(name).name if read.is_file else name
    return Source(own, read.sha256, JOIN.join(found), read.read_as, tuple(found))


def _as_rows(text: str) -> list[str]:
    """The rows that `datasets` makes of WikiText's file: its lines with their ends, a blank one as an empty row."""
    # Not splitlines, which also cuts where Unicode sees a line's end.
    return [line if line.strip() else "" for line in io.StringIO(text, newline=None)]


def page_windows(tokenizer: Any, text: Source, protocol: Protocol, vocab_size: int) -> ScoringWindows:
    """Score each page of WikiText whole, detokenized; its words and bytes are counted as the page stands."""
    return _rolling(tokenizer, text, protocol, vocab_size, detokenized, "each page is detokenized; ")


def rolling_windows(tokenizer: Any, text: Source, protocol: Protocol, vocab_size: int) -> ScoringWindows:
    """Score each document whole, in windows that do not overlap but for the last one's context."""
    return _rolling(tokenizer, text, protocol, vocab_size, lambda document: document, "")


def _rolling(
    tokenizer: Any, text: Source, protocol: Protocol, vocab_size: int, prepare: Callable[[str], str], also: str
) -> ScoringWindows:
    context = protocol.context
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise TextError("the tokenizer has neither a BOS nor an EOS token, and rolling windows begin with one")
    stream: list[int] = []  # the documents' tokens, each document after the prefix
    spans: list[Span] = []
    read: list[str] = []
    for document in text.documents:
        ids = _encoded(tokenizer, prepare(document), prefix)
        if protocol.tokens is not None and not read and len(ids) > 2 * protocol.tokens:
            raise TextError(
                f"--tokens {protocol.tokens}: documents are scored whole, and the first of {text.name} has {len(ids)} "
                "tokens; leave --tokens out, or give a text of shorter documents (.jsonl)"
            )
        spans += rolling_spans(len(ids), context, len(stream))
        stream += [prefix, *ids]
        read.append(document)
        if protocol.tokens is not None and len(stream) - len(read) >= protocol.tokens:
            break
    if not spans:
        raise TextError(f"{text.name} has no tokens to score")
    lengths = torch.tensor([stop - start for start, stop, _ in spans])
    padded = stacked(np.array(stream), spans, int(lengths.max()), vocab_size)
    n_tokens = len(stream) - len(read)
    report = protocol_record(
        tokenizer,
        text,
        protocol,
        f"{also}every document is tokenized alone, with the tokenizer's special tokens, every token of it scored "
        f"once: windows of {context} tokens, none overlapping, each given the token before it, the first BOS (EOS "
        "where there is none); the last is filled up from the left with tokens already scored",
        stride=context,
        bos="before each document",
        documents=len(read),
        windows=len(spans),
        tokens=n_tokens,
        scored_tokens=n_tokens,
        scored_bytes=sum(len(document.encode()) for document in read),
        scored_words=sum(len(re.split(r"\s+", document)) for document in read),
        tail="all tokens are scored",
    )
    first = torch.tensor([max(1, span.seen) for span in spans])
    return ScoringWindows(torch.from_numpy(padded), first, report, lengths, JOIN.join(read))


def rolling_spans(n: int, context: int, at: int = 0) -> list[Span]:
    """Return the windows of a document of n tokens that follow their prefix at `at`: each reads one token before."""
    spans = cut(n + 1, context + 1, context, rest=True) if n else []
    return [Span(at + start, at + stop, seen) for start, stop, seen in spans]


def _encoded(tokenizer: Any, text: str, prefix: int) -> list[int]:
    """Tokenize as the harness does: with special tokens, but for a text that is written with its BOS already."""
    special = not text.startswith(tokenizer.decode(prefix))
    return token_ids(tokenizer, text, add_special_tokens=special, verbose=False)["input_ids"]


def detokenized(page: str) -> str:
    """Return a page of WikiText as it was before it was cut into tokens, by the harness's own rules."""
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    return wikitext_detokenizer({"page": page})


JOINED = partial(scoring_windows, special=True)
PUBLISHED = {
    "wikitext2-2048": Published(WIKITEXT2, 2048, JOINED, lines=True),
    "wikitext2-1024": Published(WIKITEXT2, 1024, JOINED, lines=True),
    "lm-eval-wikitext": Published(WIKITEXT2_PAGES, None, page_windows),
    "rolling": Published(None, None, rolling_windows),
}
