"""Text to windows of tokens: files, plain, JSON or parquet, or a `datasets` name in, (n, context) token ids out.

How windows are made: the documents of a source are joined by a blank line and tokenized as one text without
special tokens; the first tokens are cut into windows of `context` tokens that do not overlap. Where the
tokenizer itself starts a text with BOS, every window starts with BOS too (and holds one text token fewer).
"""

import importlib.util
import json
import math
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.config_files import MAX_CARRIED_BYTES, TOKENIZER_FILES, companions, tokenizer_class
from qectomy.errors import CheckpointError, TextError, reason_of
from qectomy.text.documents import Documents, Reading

MAX_GROWTH = 1e4  # of a text by a tokenizer's replacements; those of Llama's and Gemma's keep its length
MAX_TEXT_BYTES = 4_000_000_000
# Of a pattern: a class of characters, a class's or a character's escape, or a plain character; not one to leave out.
FIRST_CHARACTER = r"(\[\^?[^]^[&\\](\\.|[^][&\\])*\]|\\([dDwWsShHnrtpP]|[^\w\s])|[^][\\^$().|?*+{}])(?![*?]|\{[0,])"
CHARACTERS_A_TOKEN = 6  # how much text is read at first for each token wanted; more is read when it falls short


@dataclass(frozen=True)
class Source:
    """A text as a string, with the name and hash under which it is reported."""

    name: str
    sha256: str
    text: str
    read_as: dict[str, Any] = field(default_factory=dict)  # its kind; of records their number and field


@dataclass(frozen=True)
class Windows:
    """Token windows of one or more texts."""

    tokens: torch.Tensor  # (n, context) int64
    bos: bool  # whether each window starts with BOS
    sources: list[dict[str, Any]]  # what a report says of each text: file, sha256, tokens, skipped
    spans: dict[str, Any] = field(default_factory=dict)  # what a report keeps of their content

    def texts(self, tokenizer: Any) -> Iterator[str]:
        """Yield the part of each text that the windows hold."""
        rows = [source["tokens"] // self.tokens.shape[1] for source in self.sources]
        for block in self.tokens[:, int(self.bos) :].split(rows):
            yield text_of(tokenizer, block.flatten().tolist())

    @property
    def scored(self) -> int:
        """How many tokens have a prediction: all but the first of each window."""
        return self.tokens.shape[0] * (self.tokens.shape[1] - 1)


def read_source(name: str, reading: Reading | None = None) -> Source:
    """Read a text file, plain, JSON or parquet, or a dataset. Raises TextError if there is nothing to read."""
    documents = Documents(name, reading)
    path = Path(name)
    if documents.is_file and path.is_file() and path.stat().st_size > MAX_TEXT_BYTES:
        raise TextError(_too_long(path))
    held, length = [], 0
    for document in documents:
        held.append(document)
        length += len(document)
        if length > MAX_TEXT_BYTES:
            raise TextError(_too_long(path))
    text = documents.join.join(held)
    if documents.is_file and not text.strip():
        raise TextError(f"{path} holds no text")
    return Source(path.name if documents.is_file else name, documents.sha256, text, documents.read_as)


def _too_long(path: Path) -> str:
    return (
        f"{path} has more than {MAX_TEXT_BYTES:,} bytes, and all are held in memory. Give a part of it: "
        f"{shlex.join(['head', '-n', '100000', str(path)])} > part{path.suffix}"
    )


def load_tokenizer(folder: Path) -> Any:
    """Load the checkpoint's tokenizer; none of its code is run. Raises CheckpointError if there is none."""
    import transformers

    for file in companions(folder, TOKENIZER_FILES):
        if file.stat().st_size > MAX_CARRIED_BYTES:
            raise CheckpointError(f"{file}: larger than {MAX_CARRIED_BYTES:,} bytes; not a file of a tokenizer")
    if lacking := _lacking(folder):
        raise CheckpointError(lacking)
    named = tokenizer_class(folder)
    loader = transformers.AutoTokenizer if named is None else getattr(transformers, named)
    try:
        with _refused(f"{folder} holds no tokenizer that can be loaded"):
            tokenizer = loader.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            empty = len(tokenizer) <= len(tokenizer.all_special_ids)
            # Of a vocabulary that it cannot read, a class makes a tokenizer that drops all text.
            empty |= named is not None and not tokenizer("text", add_special_tokens=False)["input_ids"]
            check_growth(tokenizer)
    except CheckpointError as error:
        if at_fault := _other_fault(folder):
            raise CheckpointError(at_fault) from error
        raise
    # Where the files of GPT-2's tokenizer are missing, transformers makes one of special tokens alone.
    if empty:
        raise CheckpointError(f"{folder} holds no tokenizer that can be loaded: files are missing, or have no tokens")
    return tokenizer


def _other_fault(folder: Path) -> str:
    """Say what is wrong with config.json, which transformers reads before a tokenizer's own files; "" if nothing is."""
    from transformers import AutoConfig

    if (folder / "config.json").is_file():
        try:
            AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers raises many kinds
            return f"{folder / 'config.json'} cannot be used, and transformers reads it first: {reason_of(error, 300)}"
    return ""


def _lacking(folder: Path) -> str:
    """Say which packages a tokenizer wants that are not here; "" if none."""
    wanted = [name for name in ("sentencepiece", "google.protobuf") if not _is_installed(name)]
    if not wanted or not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        return ""
    return (
        f"{folder} has its tokenizer as tokenizer.model alone, which is read with sentencepiece and protobuf, and "
        f"{' and '.join(wanted)} cannot be imported here: pip install sentencepiece protobuf"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """Make one CheckpointError, `what` and the reason, of whatever a tokenizer raises; a panic of its Rust part too."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {reason_of(error)}") from error


def check_growth(tokenizer: Any) -> None:
    """Raise ValueError for a tokenizer whose replacements, one after the other, make far more of a text than it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    for part in (getattr(backend, "normalizer", None), getattr(backend, "decoder", None)):
        if part is not None and (times := _growth(json.loads(part.__getstate__()))) > MAX_GROWTH:
            raise ValueError(f"its replacements make a text up to {times:.0e} times as long")


def _growth(rule: Any) -> float:
    """How many times as long a rule of a tokenizer can make a text."""
    if isinstance(rule, list):
        return math.prod(map(_growth, rule), start=1.0)
    if not isinstance(rule, dict):
        return 1.0
    parts = [value for name, value in rule.items() if name in ("normalizers", "decoders")]
    inner = _growth(parts)
    if rule.get("type") != "Replace":
        return inner
    pattern, content = rule.get("pattern"), rule.get("content") or ""
    text = pattern.get("String") if isinstance(pattern, dict) else pattern
    if text:
        return inner * max(1.0, len(content) / len(text))
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    # What matches a character at least stands in for it; what can match none is put between all of them.
    return inner * (max(1.0, len(content)) if regex and _takes_a_character(regex) else 1.0 + len(content))


def _takes_a_character(regex: str) -> bool:
    """Whether each match surely has a character: the pattern begins with one that has to be there."""
    return re.match(FIRST_CHARACTER, regex) is not None and "|" not in regex and r"\K" not in regex


def token_ids(tokenizer: Any, text: str, **options: Any) -> Any:
    """Return what a tokenizer makes of a text. Raises CheckpointError if it cannot read it."""
    with _refused("the checkpoint's tokenizer cannot read the text"):
        return tokenizer(text, **options)


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer starts a text with its BOS token."""
    bos = tokenizer.bos_token_id
    return bos is not None and token_ids(tokenizer, "a")["input_ids"][:1] == [bos]


def first_tokens(tokenizer: Any, source: Source, count: int | None) -> list[int]:
    """Return the first `count` tokens (None: all) of a text, reading no more of it than that takes."""
    return first_tokens_and_ends(tokenizer, source, count)[0]


def first_tokens_and_ends(
    tokenizer: Any, source: Source, count: int | None, ends: bool = False, special: bool = False
) -> tuple[list[int], list[int] | None]:
    """Return the first tokens of a text as `first_tokens` does, and where in it each ends, in characters.

    The ends are None if they were not asked for, or the tokenizer cannot say. `special`: with the special tokens that
    the tokenizer puts around a text, if the text is read to its end.
    """
    text = source.text
    length = len(text) if count is None else count * CHARACTERS_A_TOKEN + 1000
    ends = ends and getattr(tokenizer, "is_fast", False)
    while True:
        options = dict(add_special_tokens=special, return_offsets_mapping=ends, verbose=False)
        found = token_ids(tokenizer, text[:length], **options)
        ids = found["input_ids"]
        # The last few tokens before a cut may differ from those of the whole text.
        if length >= len(text) or (count is not None and len(ids) >= count + 64):
            kept = slice(None if count is None else count)
            return ids[kept], [stop for _, stop in found["offset_mapping"][kept]] if ends else None
        length *= 2


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """Return the text that tokens stand for, as the tokenizer writes it."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


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
    bos = adds_bos(tokenizer)
    width = context - bos
    if width < 2:
        raise TextError(f"a context of {context} tokens leaves nothing to predict; use 16 or more")
    blocks, reports = [], []
    wanted = None if tokens is None else max(1, tokens // context)
    for i, source in enumerate(sources):
        left_out = (skip or {}).get(source.sha256, 0)
        share = None if wanted is None else (wanted * (i + 1)) // len(sources) - (wanted * i) // len(sources)
        if share == 0:
            continue
        ids = first_tokens(tokenizer, source, None if share is None else left_out + share * width)
        there, ids = len(ids), ids[left_out:]
        count = len(ids) // width
        if count == 0:
            raise TextError(_too_short(source.name, there, left_out, width))
        block = torch.tensor(ids[: count * width], dtype=torch.int64).view(count, width)
        largest = max(int(block.max()), tokenizer.bos_token_id if bos else 0)
        if largest >= vocab_size:
            raise CheckpointError(
                f"the tokenizer makes token id {largest}, but the model's embedding has {vocab_size} rows; "
                "tokenizer and weights do not belong together"
            )
        blocks.append(block)
        told = {"file": source.name, "sha256": source.sha256, "tokens": count * context, "first_token": left_out}
        reports.append(told | ({"read_as": source.read_as} if source.read_as else {}))
    all_blocks = torch.cat(blocks)
    if bos:
        start = torch.full((all_blocks.shape[0], 1), tokenizer.bos_token_id, dtype=torch.int64)
        all_blocks = torch.cat([start, all_blocks], dim=1)
    return Windows(all_blocks, bos, reports)


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
