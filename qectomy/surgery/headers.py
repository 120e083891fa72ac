"""The outside of a checkpoint folder: its JSON files, and the headers of its safetensors files.

Everything here comes from elsewhere and may be damaged or hostile: sizes are bounded, and names stay in the folder.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from qectomy.errors import CheckpointError

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
MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what it is, from the file's header."""

    file: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name, as in BF16
    stored_name: str = ""  # in the file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * {**FLOAT_BYTES, **INDEX_BYTES}[self.dtype]


def read_json(path: Path) -> Any:
    """Parse a JSON file of bounded size. Raises CheckpointError naming the file."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_JSON_BYTES:,} bytes; not a file of a checkpoint")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no {path.name}; it is not a checkpoint folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Return every tensor that the safetensors files of a folder hold, by name."""
    if (folder / INDEX).is_file():
        names = _read_index(folder / INDEX)
    elif (folder / SINGLE).is_file():
        names = [SINGLE]
    else:
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        also = f" {', '.join(sorted(pickles)[:3])} would be loaded by pickle, which can run code." if pickles else ""
        raise CheckpointError(
            f"{folder} holds no {SINGLE} and no {INDEX}.{also} Save it with transformers' save_pretrained "
            "(safetensors is the default) and give that folder."
        )
    found: dict[str, TensorInfo] = {}
    for file_name in names:
        try:
            with safe_open(folder / file_name, "np", backend="pread") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    if name in found:
                        raise CheckpointError(f"tensor {name} stands in both {found[name].file} and {file_name}")
                    view = file.get_slice(name)
                    found[name] = TensorInfo(file_name, tuple(view.get_shape()), view.get_dtype(), name)
        except FileNotFoundError as error:
            raise CheckpointError(f"{INDEX} names {file_name}, which is not in {folder}") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{folder / file_name}: not a whole safetensors file ({error}); it may be truncated, or a pointer "
                "that was never downloaded"
            ) from error
    return found


def data_offsets(path: Path) -> dict[str, int]:
    """Return {tensor name: offset of its first byte in the file}."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def _read_index(path: Path) -> list[str]:
    index = read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path}: no weight_map from tensor names to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name!r} is not the plain name of a safetensors file beside it")
    return names
