"""A text as one string, and the tokenizer that reads it: loaded without code of its folder, every fault of it told."""

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

from qectomy.checkpoint.config_files import MAX_CARRIED_BYTES, TOKENIZER_FILES, companions, tokenizer_class
from qectomy.errors import CheckpointError, TextError, reason_of
from qectomy.text.documents import Documents, Reading

MAX_GROWTH = 1e4  # of a text by a tokenizer's replacements; those of Llama's and Gemma's keep its length
MAX_TEXT_BYTES = 4_000_000_000
# Of a pattern: a class of characters, a class's or a character's escape, or a plain character; not one to leave out.
FIRST_CHARACTER = r"(\[\^?[^]^[&\\](\\.|[^][&\\])*\]|\\([dDwWsShHnrtpP]|[^\w\s])|[^][\\^$().|?*+{}])(?![*?]|\{[0,])"


@dataclass(frozen=True)
class Source:
    """A text as a string, with the name and hash under which it is reported."""

    name: str
    sha256: str
    text: str
    read_as: dict[str, Any] = field(default_factory=dict)  # its kind; of records their number and field
    documents: tuple[str, ...] = ()  # where they are measured one by one: all in their order, empty ones too


def read_source(name: str, reading: Reading | None = None) -> Source:
    """Read a text file, plain, JSON or parquet, or a dataset. Raises TextError if there is nothing to read."""
    documents = Documents(name, reading)
    path = Path(name)
    if documents.is_file and path.is_file() and path.stat().st_size > MAX_TEXT_BYTES:
        raise TextError(_too_long(path))
    held, length = [], 0
    for piece in documents.pieces():
        held.append(piece)
        length += len(piece)
        if length > MAX_TEXT_BYTES:
            raise TextError(_too_long(path))
    text = "".join(held)
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


def bos_of(tokenizer: Any) -> int | None:
    """Return the BOS token, if the tokenizer starts a text with it."""
    bos = tokenizer.bos_token_id
    return bos if bos is not None and token_ids(tokenizer, "a")["input_ids"][:1] == [bos] else None


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """Return the text that tokens stand for, as the tokenizer writes it."""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
