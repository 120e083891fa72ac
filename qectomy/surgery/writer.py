"""Write safetensors shards tensor by tensor: the header first, then each tensor straight to its place.

The safetensors library writes a file from tensors that are all in memory. A pass over a checkpoint makes them
one at a time, so the layout is planned from names, shapes and types, and the bytes go where the header says.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from qectomy.surgery.headers import INDEX, SINGLE, TORCH_NAMES

DTYPES = {name: getattr(torch, torch_name) for name, torch_name in TORCH_NAMES.items()}
MAX_SHARD_BYTES = 5_000_000_000


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
    writes the index. Nothing but the folder given is touched.
    """

    def __init__(self, folder: Path, tensors: dict[str, TensorSpec], max_shard_bytes: int = MAX_SHARD_BYTES):
        self._folder = folder
        self._tensors = tensors
        self._rows: dict[str, int] = {}  # name -> rows written so far
        self._place: dict[str, tuple[int, int]] = {}  # name -> (shard, offset in the file)
        shards = plan_shards(tensors, max_shard_bytes)
        count = len(shards)
        self._names = [SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        self._files: list[Any] = []
        for shard, names in enumerate(shards):
            header, offsets, size = layout(names, tensors)
            file = (folder / self._names[shard]).open("xb", buffering=0)
            self._files.append(file)
            write_all(file.fileno(), memoryview(header), 0)
            file.truncate(size)
            self._place.update((name, (shard, offsets[name])) for name in names)

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
        shard, offset = self._place[name]
        row_bytes = spec.nbytes // spec.shape[0]
        write_all(self._files[shard].fileno(), memoryview(data.data), offset + start * row_bytes)
        self._rows[name] = start + rows.shape[0]

    def finish(self) -> None:
        """Sync all shards and write the index. Every planned tensor must have been written."""
        missing = [name for name, spec in self._tensors.items() if self._rows.get(name) != spec.shape[0]]
        assert not missing, f"not written whole: {missing[:3]}"
        for file in self._files:
            os.fsync(file.fileno())
            file.close()
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._tensors.values())},
                "weight_map": {name: self._names[self._place[name][0]] for name in sorted(self._tensors)},
            }
            (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()


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
