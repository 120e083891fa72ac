"""Write safetensors shards tensor by tensor: the header first, then each tensor straight to its place.

The safetensors library writes a file from tensors that are all in memory. A pass over a checkpoint makes them
one at a time, so the layout is planned from names, shapes and types, and the bytes go where the header says.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from qectomy.checkpoint.checkpoint import digest_at
from qectomy.checkpoint.headers import INDEX, SINGLE, TORCH_NAMES

DTYPES = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}
MAX_SHARD_BYTES = 5_000_000_000
Self = TypeVar("Self", bound="ShardWriter")


@dataclass(frozen=True)
class TensorSpec:
    """Shape and safetensors type of a tensor to be written."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


class ShardWriter:
    """Write planned tensors, in any order, into one or several safetensors files.

    Use as a context manager; `finish` checks that every tensor was written once, syncs the files to disk and
    writes the index. Nothing but the folder given is touched. `digests` has the sha256 of every tensor that is whole.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorSpec],
        max_shard_bytes: int = MAX_SHARD_BYTES,
        written: dict[str, str] | None = None,
    ):
        """Begin the shards anew, or go on with those that hold `written` already, as `digests` was."""
        self._folder = folder
        self._tensors = tensors
        self.digests: dict[str, str] = dict(written or {})
        self._rows = {name: tensors[name].shape[0] for name in self.digests}  # rows written so far
        self._hashes: dict[str, Any] = {}  # of the rows written so far
        self._layout = ShardLayout(tensors, max_shard_bytes)
        self._files: list[Any] = []
        for shard, name in enumerate(self._layout.names):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | (os.O_EXCL if written is None else 0)
            file = os.fdopen(os.open(folder / name, flags, 0o666), "r+b", buffering=0)
            self._files.append(file)
            write_all(file.fileno(), memoryview(self._layout.headers[shard]), 0)
            file.truncate(self._layout.sizes[shard])

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor, cast to its planned type."""
        self.write_rows(name, 0, tensor)

    def write_rows(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write a tensor's rows from `start` on, cast to its planned type; rows come in order, each once."""
        spec = self._tensors[name]
        assert rows.shape[1:] == spec.shape[1:], f"{name}: rows of {tuple(rows.shape)} are not rows of {spec.shape}"
        assert start == self._rows.get(name, 0), f"{name}: row {start} comes out of order"
        assert start + rows.shape[0] <= spec.shape[0], f"{name}: more rows than the {spec.shape[0]} planned"
        data = rows.detach().to("cpu", DTYPES[spec.dtype]).contiguous().view(-1).view(torch.uint8).numpy()
        shard, offset = self._layout.places[name]
        row_bytes = spec.nbytes // spec.shape[0]
        write_all(self._files[shard].fileno(), memoryview(data.data), offset + start * row_bytes)
        self._hashes.setdefault(name, hashlib.sha256()).update(data.data)
        self._rows[name] = start + rows.shape[0]
        if self._rows[name] == spec.shape[0]:
            self.digests[name] = self._hashes.pop(name).hexdigest()

    def sync(self) -> None:
        """Bring what was written to the disk."""
        for file in self._files:
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Sync all shards and write the index. Every planned tensor must have been written."""
        missing = [name for name in self._tensors if name not in self.digests]
        assert not missing, f"not written whole: {missing[:3]}"
        self.sync()
        for file in self._files:
            file.close()
        if len(self._files) > 1:
            places, names = self._layout.places, self._layout.names
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._tensors.values())},
                "weight_map": {name: names[places[name][0]] for name in sorted(self._tensors)},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()


class ShardLayout:
    """Which shard each tensor lies in and where, and the shards' names, headers and sizes."""

    def __init__(self, tensors: dict[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES):
        shards = plan_shards(tensors, max_shard_bytes)
        count = len(shards)
        self.names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self.places: dict[str, tuple[int, int]] = {}  # name -> (shard, offset in the file)
        self.headers, self.sizes = list[bytes](), list[int]()
        for shard, names in enumerate(shards):
            header, offsets, size = layout(names, tensors)
            self.headers.append(header)
            self.sizes.append(size)
            self.places.update((name, (shard, offsets[name])) for name in names)


def damaged(
    folder: Path, tensors: dict[str, TensorSpec], digests: dict[str, str], max_shard_bytes: int = MAX_SHARD_BYTES
) -> Iterator[str]:
    """Yield the names in `digests` whose bytes in the shards of `folder` are not those that were written.

    The disk itself is read where the system can be asked to forget what it holds in memory.
    """
    planned = ShardLayout(tensors, max_shard_bytes)
    by_shard: dict[int, list[str]] = {}
    for name in digests:
        by_shard.setdefault(planned.places[name][0], []).append(name)
    for shard, names in by_shard.items():
        path = folder / planned.names[shard]
        if not path.is_file():
            yield from names
            continue
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            for name in names:
                if digest_at(file.fileno(), planned.places[name][1], tensors[name].nbytes) != digests[name]:
                    yield name


def plan_shards(tensors: dict[str, TensorSpec], max_shard_bytes: int) -> list[list[str]]:
    """Split names, in order, into runs of at most max_shard_bytes; a larger tensor stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in tensors.items():
        if shards[-1] and filled + spec.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    return shards


def layout(names: list[str], tensors: dict[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """Return (header bytes, {name: offset in the file}, file size) of one shard.

    Wide types come first, so that every tensor starts at a multiple of its item size.
    """
    ordered = sorted(names, key=lambda name: -DTYPES[tensors[name].dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in ordered:
        spec = tensors[name]
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + header[name]["data_offsets"][0] for name in ordered}
    return len(text).to_bytes(8, "little") + text, offsets, start + at


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """pwrite until every byte is written; a short write is continued, an error is raised."""
    while len(data):
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
