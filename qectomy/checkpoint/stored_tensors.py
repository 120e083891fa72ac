"""Which stored tensor is which of the model's: names, ties, types and shapes, as transformers takes them.

All is known from the headers, but for one thing: whether a head that config.json ties to the embedding, and that is
stored beside it, is the same matrix. Their bytes say so.
"""

import os
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from qectomy.checkpoint.headers import FLOAT_BYTES, INDEX, INDEX_BYTES, TORCH_NAMES, TensorInfo
from qectomy.errors import CheckpointError, UnreadableError, UnsupportedArchitecture, shown
from qectomy.models.family import Dimensions, Family, Shapes

BYTES_A_READ = 4_000_000
Same = Callable[[TensorInfo, TensorInfo], bool]


def settle_tie(
    found: dict[str, TensorInfo], family: Family, dims: Dimensions, same: Same
) -> tuple[dict[str, TensorInfo], Dimensions]:
    """Return the tensors and sizes of a tied model as transformers reads them.

    Where the head alone is stored, it is the embedding too. Where both are, and are not the `same`, they are not tied,
    whatever config.json says.
    """
    embedding, head = family.embedding, family.head
    if not dims.tied or head not in found:
        return found, dims
    if embedding not in found:
        return {embedding if name == head else name: info for name, info in found.items()}, dims
    return found, dims if same(found[embedding], found[head]) else replace(dims, tied=False)


def same_bytes(folder: Path, one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors of a folder are stored as the same bytes, read a few at a time and up to where they differ.

    Equal numbers of two types count as different: such a model is untied, which changes nothing.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    places = [(folder / info.file, info.start) for info in (one, other)]
    try:
        states = tuple((found.st_mtime_ns, found.st_size) for found in (os.stat(path) for path, _ in places))
        return _same_span(*places, one.nbytes, states)
    except OSError as error:
        raise UnreadableError(f"{folder}: head and embedding cannot be compared: {error.strerror}") from error


@lru_cache(maxsize=16)
def _same_span(one: tuple[Path, int], other: tuple[Path, int], nbytes: int, states: Any) -> bool:
    """Whether two spans of files hold the same bytes; kept for files in these `states`."""
    with one[0].open("rb", buffering=0) as first, other[0].open("rb", buffering=0) as second:
        for offset in range(0, nbytes, BYTES_A_READ):
            count = min(BYTES_A_READ, nbytes - offset)
            if os.pread(first.fileno(), count, one[1] + offset) != os.pread(second.fileno(), count, other[1] + offset):
                return False
    return True


def check_tensors(
    found: dict[str, TensorInfo], family: Family, dims: Dimensions, expected: Shapes
) -> dict[str, TensorInfo]:
    """Return the tensors the model needs, all present, of the right shape and a known type."""
    if normed := [name for name in found if ".q_norm." in name or ".q_layernorm." in name]:
        raise UnsupportedArchitecture(
            f"{normed[0]}: queries are normalised after W_Q (QK-norm), so no linear query map can stand in for it"
        )
    if missing := [name for name in expected if name not in found]:
        held = (
            f"It holds {len(found)} tensors, such as {shown(next(iter(found)))}." if found else "It holds no tensors."
        )
        raise CheckpointError(
            f"{len(missing)} tensor(s) that config.json calls for are missing, first {missing[0]}. {held}"
        )
    for name, shape in expected.items():
        info = found[name]
        if info.indexed not in ("", info.file):
            raise CheckpointError(f"{INDEX} says that {name} lies in {info.indexed}; it lies in {info.file}")
        if info.shape != shape:
            raise CheckpointError(f"{info.file}: tensor {name} has shape {info.shape}, config.json calls for {shape}")
        is_index = family.is_index(name)
        if info.dtype not in (INDEX_BYTES if is_index else FLOAT_BYTES):
            why = "channel numbers must be whole numbers" if is_index else "a quantized checkpoint cannot be converted"
            raise CheckpointError(f"{info.file}: tensor {name} is stored as {info.dtype}; {why}")
    skippable = {family.head} if dims.tied else set()
    extra = [n for n in found if n not in expected and n not in skippable and not n.endswith(family.ignored_suffixes)]
    if extra:
        raise CheckpointError(
            f"{len(extra)} tensor(s) have no place in a {family.model_type} model and would be lost, first {extra[0]}"
        )
    return {name: found[name] for name in expected}


def is_quantized(found: Collection[TensorInfo]) -> bool:
    """Whether some matrix is stored in a type that is none of floating point, as far as headers tell."""
    return any(len(info.shape) > 1 and info.dtype not in FLOAT_BYTES for info in found)


def refuse_quantized(config: dict[str, Any], found: Collection[TensorInfo] | None) -> None:
    """Raise UnsupportedArchitecture for a config.json with a quantization_config, saying whether the weights have it.

    `found`: the tensors, None where their headers cannot be read.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    called = f"a quantization_config (quant_method {shown(method)})" if method else "a quantization_config"
    if found and not is_quantized(found):
        types = ", ".join(sorted({TORCH_NAMES.get(info.dtype, info.dtype) for info in found}))
        raise UnsupportedArchitecture(
            f"config.json has {called}, but no weight is quantized: they are stored in {types}. Transformers would "
            "quantize them as it loads them, and so run another model than the one that is read here. Take the field "
            "quantization_config out of config.json to use the weights as they are stored"
        )
    raise UnsupportedArchitecture(
        f"the checkpoint is quantized (config.json has {called}); its weights cannot be refitted. "
        "Use the original float32, bfloat16 or float16 checkpoint."
    )
