"""The outside of a checkpoint folder: its JSON files, and the headers of its safetensors files.

Everything here comes from elsewhere and may be damaged or hostile: sizes are bounded, and names stay in the folder.
A file that is parsed may be a link, as all are in the hub's cache: what it leads to must be a regular file.
"""

import json
import math
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from qectomy.errors import CheckpointError, shown

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
INDEX_BYTES = {"I64": 8, "I32": 4, "I16": 2}
TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
}
MAX_JSON_BYTES = 20_000_000  # the index of 10,000 layers has 10 MB
MAX_INNER = 1_000_000  # lists and objects in a file; the header of 10,000 layers has a third of that
MAX_DEPTH = 100  # of lists and objects inside each other; what reads or writes them again recurses


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the file's header."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, as in BF16
    stored_name: str = ""  # in the file
    start: int = 0  # of its bytes in the file
    indexed: str = ""  # the file in which the index says that it lies

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * {**FLOAT_BYTES, **INDEX_BYTES}[self.dtype]


def read_json(path: Path, once: bool = False) -> Any:
    """Parse a JSON file of bounded size and depth, as `parse_json` does. Raises CheckpointError naming the file."""
    try:
        data = read_regular(path, MAX_JSON_BYTES)
        if data is None:
            raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes; not a file of a checkpoint")
        return parse_json(data, once)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no {path.name}; it is not a checkpoint folder") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def read_regular(path: Path, most: int) -> bytes | None:
    """Return the bytes of a file, None where there are more than `most`. Raises OSError as `open_regular` does."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    return data if len(data) <= most else None


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read. Raises OSError for a pipe or a device, which would be waited on, or never end."""
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb")
    if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        return file
    file.close()
    raise OSError(f"{path.name} is not a regular file")


def parse_json(data: bytes, once: bool = False) -> Any:
    """Parse JSON. Raises ValueError, too, for deep nesting, for its bulk, and for a name that an object holds twice.

    The same value twice is let pass, unless each name has to stand there `once`.
    """
    if (count := data.count(b"[") + data.count(b"{")) > MAX_INNER:
        raise ValueError(f"it has {count:,} lists and objects, more than any model's")
    try:
        found = json.loads(data.decode(), object_pairs_hook=partial(_object, once))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    level, depth = [found], 0
    while level := [inner for value in level for inner in _inside(value)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")
    return found


def _object(once: bool, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    seen: dict[str, Any] = {}
    for name, value in pairs:
        if name in seen and (once or repr(value) != repr(seen[name])):  # 1 == True
            raise ValueError(f"{shown(name)} stands twice in one object{'' if once else ', with two values'}")
        seen[name] = value
    return found


def _inside(value: Any) -> Iterable[Any]:
    """The lists and objects that are in a list or an object."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (item for item in inner if isinstance(item, dict | list))


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor of the weights that `weight_files` finds in a folder, by the name it is stored under."""
    found: dict[str, TensorInfo] = {}
    names, places = weight_files(folder)
    for file_name in names:
        try:
            infos = read_header(folder / file_name)
        except FileNotFoundError as error:
            there = ", ".join(safetensors_in(folder)) or "none"
            raise CheckpointError(
                f"{INDEX} names {file_name}, which is not in {folder}, so the model is not whole. Fetch that file too "
                f"(safetensors files there: {there})"
            ) from error
        except (SafetensorError, OSError, ValueError, MemoryError) as error:
            raise CheckpointError(
                f"{folder / file_name}: not a whole safetensors file ({error}); it may be truncated, or a pointer "
                "that was never downloaded"
            ) from error
        for name, info in infos.items():
            if name in found:
                raise CheckpointError(f"tensor {name} stands in both {found[name].file} and {file_name}")
            found[name] = replace(info, indexed=places.get(name, ""))
    return found


def weight_files(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Return the names of the files that hold a folder's weights, and by the index which tensor lies in which.

    They are those that transformers reads: model.safetensors, if it is there, whatever an index beside it says. Raises
    CheckpointError, saying what there is, where there is neither.
    """
    if (folder / SINGLE).is_file():
        return [SINGLE], {}
    if not (folder / INDEX).is_file():
        raise CheckpointError(_no_weights(folder))
    places = read_index(folder / INDEX)
    return sorted(set(places.values())), places


def second_set(folder: Path) -> str:
    """Return what to tell of a folder with model.safetensors and, by an index, another set of weights; else ""."""
    if not ((folder / SINGLE).is_file() and (folder / INDEX).is_file()):
        return ""
    try:
        shards = sorted(set(read_index(folder / INDEX).values()) - {SINGLE})
    except CheckpointError:
        return ""  # nothing reads it
    if not (there := [name for name in shards if (folder / name).is_file()]):
        return ""
    return (
        f"{folder} holds two sets of weights, which may be of two models: {SINGLE} is read, as transformers does, and "
        f"{', '.join(there[:3])}{', ...' if there[3:] else ''} of {INDEX} not. Remove the set that you do not mean"
    )


def safetensors_in(folder: Path) -> list[str]:
    """Return the names of a folder's safetensors files, the first few."""
    return sorted(path.name for path in folder.glob("*.safetensors"))[:5]


def _no_weights(folder: Path) -> str:
    """Say what a folder without weights by the usual names has in their stead, and how to make them of it."""
    missing = f"{folder} holds no {SINGLE} and no {INDEX}"
    there = safetensors_in(folder)
    shards = [name for name in there if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)]
    if shards:
        return (
            f"{missing}. It holds shards, {', '.join(shards)}, but without the index nothing says that they are all, "
            f"and transformers does not load them. Fetch {INDEX} too, from where the shards came"
        )
    if there:
        told = f"{missing}; the safetensors files there, {', '.join(there)}, have other names, which transformers does "
        told += "not read."
        if any(name.startswith("consolidated") for name in there):
            return f"{told} Those called consolidated have other tensors' names too: fetch {SINGLE} beside them"
        return f"{told} If {there[0]} holds the whole model with transformers' names of tensors, rename it {SINGLE}"
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    also = f" {', '.join(pickles[:3])} would be loaded by pickle, which can run code." if pickles else ""
    saving = "Save it with transformers' save_pretrained (safetensors is the default) and give that folder."
    return f"{missing}.{also} {saving}"


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return what the header of one file says. Raises SafetensorError, OSError or ValueError saying what is wrong.

    The library holds offsets, shapes and sizes against each other and the file; of a name that stands twice it takes
    the last entry without a word.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= MAX_JSON_BYTES:
            raise ValueError(f"no model has a header of {length:,} bytes")
        text = file.read(length)
    with safe_open(path, "np", backend="pread") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (safe_open is not a mapping)
        sizes = {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in slices.items()}
    header = parse_json(text, once=True)
    starts = {name: 8 + length + header[name]["data_offsets"][0] for name in sizes}
    return {name: TensorInfo(path.name, *sizes[name], name, starts[name]) for name in sizes}


def read_index(path: Path) -> dict[str, str]:
    """Return {tensor name: name of the file beside the index that it says holds the tensor}."""
    index = read_json(path, once=True)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: no weight_map from tensor names to file names")
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            raise CheckpointError(f"{path}: {shown(name)} is not the plain name of a safetensors file beside it")
    return weight_map
