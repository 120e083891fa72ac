"""How much text a run of tokens stands for: UTF-8 bytes and words, by which models of any tokenizer compare."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

PIECE = 24  # tokens decoded together where the tokenizer does not say which characters a token is
WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class TextSpans:
    """Where each token of a text ends in it. A token counts what it adds to the text before it.

    So a character of several tokens, or one that a window's edge cuts, is counted once.
    """

    byte_ends: np.ndarray  # (tokens + 1,), from 0
    word_ends: np.ndarray  # (tokens + 1,): words that have begun

    def n_bytes(self, start: int, stop: int) -> int:
        """UTF-8 bytes of tokens [start, stop)."""
        return int(self.byte_ends[stop] - self.byte_ends[start])

    def n_words(self, start: int, stop: int) -> int:
        """Words, runs of anything but white space, that begin in tokens [start, stop)."""
        return int(self.word_ends[stop] - self.word_ends[start])


def spans_of(tokenizer: Any, text: str, ids: list[int], character_ends: list[int] | None) -> TextSpans:
    """Return where each of `ids` ends in `text`; `character_ends` is what a fast tokenizer says of each, or None."""
    if character_ends is None:
        text, character_ends = _decoded_ends(tokenizer, ids)
    ends = np.maximum.accumulate(np.array([0, *character_ends], dtype=np.int64))
    code_points = np.frombuffer(text[: int(ends[-1])].encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    lengths = 1 + (code_points > 0x7F).astype(np.int64) + (code_points > 0x7FF) + (code_points > 0xFFFF)
    bytes_before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    begins = np.array([match.start() for match in WORD.finditer(text, 0, int(ends[-1]))], dtype=np.int64)
    return TextSpans(bytes_before[ends], np.searchsorted(begins, ends, side="left"))


def _decoded_ends(tokenizer: Any, ids: list[int]) -> tuple[str, list[int]]:
    """Return the text that tokens decode to, and where in it each ends.

    Long texts are decoded in pieces that begin at a whole character; a token that ends inside of one ends where the
    last whole one does.
    """
    pieces: list[str] = []
    ends: list[int] = []
    piece: list[int] = []
    kept = before = 0  # characters of the piece that are in the text already; of the pieces before it
    for token in ids:
        piece.append(token)
        decoded = tokenizer.decode(piece, clean_up_tokenization_spaces=False)
        whole = not decoded.endswith("\ufffd")
        ends.append(before + len(decoded) - kept if whole else (ends[-1] if ends else 0))
        if whole and len(piece) >= PIECE:
            pieces.append(decoded[kept:])
            before += len(decoded) - kept
            piece = [token]  # kept, as some tokenizers drop the space before a text's first token
            kept = len(tokenizer.decode(piece, clean_up_tokenization_spaces=False))
    pieces.append(tokenizer.decode(piece, clean_up_tokenization_spaces=False)[kept:] if piece else "")
    return "".join(pieces), ends
