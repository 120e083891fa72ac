"""Text into windows on disk: streamed, packed, split into training and validation, read by number.

A text is tokenized a piece at a time, its documents joined by a blank line, and cut into windows that do not overlap:

    [measured on, or fitted on and then measured on] [validation] [trained on ...

What the reduced model was fitted on says little of how it does elsewhere, so no validation window lies there; it is
trained on last, where the rest is short. Nothing else but a piece of the text is held; a window is read from the file
when it is asked for.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from qectomy.checkpoint.checkpoint import sha256
from qectomy.errors import QectomyError, TextError, note
from qectomy.progress import Progress
from qectomy.runs.records import read_record, write_record
from qectomy.text.documents import Documents, Reading
from qectomy.text.overlap import FittedSpans
from qectomy.text.text import bos_of, text_of
from qectomy.text.windows import ITEM, TokenStream, cut, stacked, text_width

BLOCK = 4096  # windows held at a time
RECORD = "data.json"


class PackedWindows(Dataset):
    """Windows of token ids in a file, in `order` or as they lie there."""

    def __init__(self, path: Path, context: int, order: "Shuffled | None" = None, length: int | None = None):
        self._path, self._context, self._order = path, context, order
        self.stored = path.stat().st_size // (context * ITEM.itemsize)
        self._length = self.stored if length is None else length
        self._map: np.ndarray | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if self._map is None:  # in the process that reads: a map does not travel to data workers
            self._map = np.memmap(self._path, ITEM, "r").reshape(-1, self._context)
        window = self._map[i if self._order is None else self._order[i]]
        return {"input_ids": torch.from_numpy(window.astype(np.int64))}


class Shuffled:
    """The order in which n windows are read over and over: every reading a permutation of its own, from one seed."""

    def __init__(self, n: int, seed: int):
        self._n, self._seed = n, seed
        self._reading, self._permutation = -1, np.empty(0, np.int64)

    def __getitem__(self, i: int) -> int:
        reading, place = divmod(i, self._n)
        if reading != self._reading:
            self._permutation = np.random.default_rng((self._seed, reading)).permutation(self._n)
            self._reading = reading
        return int(self._permutation[place])


@dataclass(frozen=True)
class Reserved:
    """Which tokens of a text are used otherwise: [start, stop) is measured on, those up to `fitted` were fitted on."""

    start: int = 0
    stop: int = 0
    fitted: int = 0


@dataclass(frozen=True)
class Packed:
    """What was packed: two files of windows, and what a report says of each text."""

    train: Path
    validation: Path
    report: list[dict[str, Any]]
    spans: dict[str, Any] = field(default_factory=dict)  # what a report keeps of the content of all texts that are seen

    @staticmethod
    def kept(folder: Path) -> "Packed | None":
        """Return what `pack` wrote to a folder before, if it got to its end and the disk has it as it was written."""
        if not (folder / RECORD).is_file():
            return None
        record = read_record(folder / RECORD)
        texts, digests, spans = record.get("texts"), record.get("files"), record.get("spans", {})
        if not (isinstance(texts, list) and isinstance(digests, dict) and isinstance(spans, dict)):
            raise QectomyError(f"{folder / RECORD} is not what a run writes; remove the folder to start anew")
        found = Packed(folder / "train.bin", folder / "validation.bin", texts, spans)
        if damaged := [name for name, digest in found.digests().items() if digest != digests.get(name)]:
            note(f"{' and '.join(damaged)} in {folder} was damaged on the disk: the texts are packed again")
            return None
        return found

    def digests(self) -> dict[str, str]:
        """Return the sha256 of both files, by name; of one that is gone, none."""
        return {path.name: sha256(path) if path.is_file() else "" for path in (self.train, self.validation)}


def pack(
    tokenizer: Any,
    names: list[str],
    folder: Path,
    *,
    context: int,
    tokens: int,
    validation_tokens: int,
    vocab_size: int,
    reserved: dict[str, Reserved] | None = None,
    reading: Reading | None = None,
    spans: FittedSpans | None = None,
    progress: Progress | None = None,
) -> Packed:
    """Write train.bin and validation.bin to `folder`: at most `tokens` and `validation_tokens`, evenly from the texts.

    Where a text is short, an eighth of it at most is for validation. `reserved`: by a text's name. `spans` is given
    what is trained and validated on. Raises TextError for a text that is too short to train on, CheckpointError for ids
    beyond the embedding, QectomyError where the folder tells of an earlier packing that came to something else.
    """
    report: list[dict[str, Any]] = []
    with ExitStack() as stack:
        parts = {part: stack.enter_context((folder / f"{part}.bin").open("wb")) for part in ("train", "validation")}
        for number, name in enumerate(names):
            source = _TextWindows(tokenizer, Documents(name, reading), vocab_size, context)
            kept = (reserved or {}).get(name, Reserved())
            share = -(-tokens * (number + 1) // len(names)) - (-(-tokens * number // len(names)))
            wanted = max(1, share // context), max(1, validation_tokens // len(names) // context)
            report.append(_pack_one(source, kept, *wanted, parts["train"], parts["validation"], spans))
            if progress:
                progress(number + 1, len(names), f"{report[-1]['tokens']:,} tokens of {name}")
        for file in parts.values():
            file.flush()
            os.fsync(file.fileno())
    packed = Packed(folder / "train.bin", folder / "validation.bin", report, spans.record() if spans else {})
    content = {"texts": report, "files": packed.digests()}
    earlier = read_record(folder / RECORD) if (folder / RECORD).is_file() else content
    if any(earlier.get(name) != json.loads(json.dumps(found)) for name, found in content.items()):
        raise QectomyError(
            f"{', '.join(names)}: packed again, this is not the text that the run in {folder} began with, as a dataset "
            "may change. Remove the folder to start anew"
        )
    write_record(folder / RECORD, content | {"spans": packed.spans})
    return packed


def _pack_one(
    source: "_TextWindows",
    reserved: Reserved,
    wanted: int,
    held: int,
    train: BinaryIO,
    validation: BinaryIO,
    spans: FittedSpans | None,
) -> dict[str, Any]:
    """Write a text's windows, those that were fitted on last; return what the report says of the text."""

    order = 1

    def write(windows: np.ndarray, file: BinaryIO = train) -> int:
        file.write(windows.tobytes())
        if spans is not None and len(windows):
            spans.add(source.text(windows[::order]), validation=file is validation)
        return len(windows)

    fitted = source.pass_reserved(reserved)
    first = source.take(8 * held)
    if len(first) < 2:  # the fit had it all
        first, fitted, order = np.concatenate([fitted, first])[::-1], fitted[:0], -1  # its end for validation
    held = min(held, max(1, len(first) // 8))
    if len(first) < held + 1:
        raise TextError(source.too_short())
    write(first[:held], validation)
    block, written = first[held:], 0
    while len(block) and written < wanted:
        written += write(block[: wanted - written])
        block = source.take(min(BLOCK, wanted - written))
    written += write(fitted[: wanted - written])
    return source.report() | {"validation_tokens": held * source.context, "tokens": written * source.context}


class _TextWindows:
    """The windows of a text, taken from the front."""

    def __init__(self, tokenizer: Any, documents: Documents, vocab_size: int, context: int):
        self._tokenizer, self._documents, self._vocab_size, self.context = tokenizer, documents, vocab_size, context
        self._bos = bos_of(tokenizer)
        self._width = text_width(context, self._bos)
        self._stream = TokenStream(tokenizer, documents.pieces())
        self._measured = (0, 0)

    def pass_reserved(self, reserved: Reserved) -> np.ndarray:
        """Pass what is reserved; return as windows what of it is not measured on."""
        ids = self._stream.take(max(reserved.stop, reserved.fitted))
        self._measured = (reserved.start, min(reserved.stop, len(ids)))
        return self._cut(np.concatenate([ids[: reserved.start], ids[reserved.stop :]]))

    def take(self, windows: int) -> np.ndarray:
        """Return the next windows (n, context), fewer where the text ends."""
        return self._cut(self._stream.take(windows * self._width))

    def _cut(self, ids: np.ndarray) -> np.ndarray:
        return stacked(ids, cut(len(ids), self._width), self._width, self._vocab_size, self._bos)

    def text(self, windows: np.ndarray) -> str:
        """Return the text of windows (n, context) that follow each other."""
        return text_of(self._tokenizer, windows[:, self.context - self._width :].flatten().tolist())

    def report(self) -> dict[str, Any]:
        """Return name, hash (of a file's bytes, of what was read of a dataset), and the tokens that are measured on."""
        read = self._documents
        return {
            "text": Path(read.name).name if read.is_file else read.name,
            "sha256": read.sha256,
            "read_as": read.read_as,
            "left_out": list(self._measured),
        }

    def too_short(self) -> str:
        kept = self._measured[1] - self._measured[0]
        apart = f"; less {kept}, which are kept for evaluation, that is" if kept else ","
        return (
            f"{self._documents.name} has {self._stream.taken} tokens{apart} fewer than the two windows of "
            f"{self._width} that training and validation need; give more text"
            + (", an --eval-text, fewer --eval-tokens" if kept else "")
            + " or a smaller --context"
        )
