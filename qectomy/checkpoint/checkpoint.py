"""Read a checkpoint folder: config, safetensors headers, and one tensor at a time.

Only safetensors are read, never a pickle, and no code in the folder is run. Torch is loaded by the methods
that return tensors; opening a checkpoint and reading its headers need none.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from qectomy.checkpoint.finite import all_finite
from qectomy.checkpoint.headers import TORCH_NAMES, TensorInfo, read_headers, read_json, second_set
from qectomy.checkpoint.stored_tensors import (
    BYTES_A_READ,
    Same,
    check_tensors,
    refuse_quantized,
    same_bytes,
    settle_tie,
)
from qectomy.errors import (
    CheckpointError,
    NonFiniteError,
    QueryMapError,
    UnreadableError,
    nearest,
    note,
    reason_of,
    shown,
)
from qectomy.models.architectures import find_family, find_reduced_family
from qectomy.models.config_fields import known_fields
from qectomy.models.family import Dimensions, Family, Shapes
from qectomy.models.query_maps import QueryMapSpec, stored_maps

if TYPE_CHECKING:
    import torch

MAX_LAYERS = 10_000
ADAPTER = "adapter_config.json"
HUB_PATTERNS = [
    "README.md",
    "*.json",
    "*.safetensors",
    "*.model*",
    "*.tiktoken",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "NOTICE*",
]
HUB_IGNORED = ["consolidated*", "*/*"]  # a second copy of the weights in another layout; other formats and sizes


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: the fields of its config that the family knows, its sizes, and its weights' headers.

    `recipe` is one query map a layer; all `dense` for an original checkpoint.
    """

    name: str  # the hub id, or the folder's own name
    folder: Path
    config: dict[str, Any]
    family: Family
    dims: Dimensions
    recipe: tuple[QueryMapSpec, ...]
    tensors: dict[str, TensorInfo] = field(repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)  # what was read otherwise than the files say

    @property
    def reduced(self) -> bool:
        return self.config["model_type"] == self.family.reduced_model_type

    @property
    def parameters(self) -> int:
        """How many numbers the checkpoint's model stores, indices included."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def files(self) -> list[str]:
        return sorted({info.file for info in self.tensors.values()})

    @cached_property
    def dtype(self) -> str:
        """The dtype that holds most of the weights, as safetensors names it."""
        bytes_of: dict[str, int] = {}
        for info in self.tensors.values():
            bytes_of[info.dtype] = bytes_of.get(info.dtype, 0) + info.nbytes
        return max(bytes_of, key=lambda dtype: bytes_of[dtype])

    def layer_tensors(self, layer: int) -> Iterator[tuple[str, TensorInfo]]:
        """Yield (name inside the layer, info) of one layer."""
        prefix = self.prefix(layer)
        for name in expected_layer(self.family, self.dims, self.recipe[layer]):
            yield name, self.tensors[prefix + name]

    def prefix(self, layer: int) -> str:
        """Return what the names of a layer's stored tensors begin with."""
        return self.family.prefix(self.dims.stored_layer(layer))

    def read(self, name: str, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return one whole tensor on the CPU. Raises NonFiniteError naming it if it holds NaN or Inf."""
        info = self.tensors[name]
        try:
            with safe_open(self.folder / info.file, "pt", backend="pread") as file:
                tensor = file.get_tensor(info.stored_name)
        except (SafetensorError, OSError) as error:
            raise UnreadableError(f"{info.file}: cannot read tensor {name}: {error}") from error
        return self._checked(name, tensor, dtype)

    def read_rows(self, name: str, start: int, stop: int, dtype: "torch.dtype | None" = None) -> "torch.Tensor":
        """Return rows [start, stop) of a matrix on the CPU, checked like `read`; only their bytes are read.

        (safe_open's slices read the whole tensor first where files are not mapped.)
        """
        import torch

        info = self.tensors[name]
        assert 0 <= start <= stop <= info.shape[0], (name, start, stop)
        row_bytes = info.nbytes // info.shape[0]
        data = bytearray((stop - start) * row_bytes)
        try:
            with (self.folder / info.file).open("rb") as file:
                file.seek(info.start + start * row_bytes)
                got = file.readinto(data)
        except OSError as error:
            raise UnreadableError(f"{info.file}: cannot read tensor {name}: {error}") from error
        if got != len(data):
            raise UnreadableError(f"{info.file}: ended inside tensor {name}; the file has changed since it was opened")
        rows = torch.frombuffer(data, dtype=getattr(torch, TORCH_NAMES[info.dtype]))
        return self._checked(name, rows.view(stop - start, *info.shape[1:]), dtype)

    def digest(self, name: str) -> str | None:
        """Return the sha256 of a tensor's bytes as they are stored; None where the file ends before."""
        info = self.tensors[name]
        try:
            with (self.folder / info.file).open("rb", buffering=0) as file:
                return digest_at(file.fileno(), info.start, info.nbytes)
        except OSError as error:
            raise UnreadableError(f"{info.file}: cannot read tensor {name}: {error}") from error

    def read_layer(self, layer: int, dtype: "torch.dtype | None" = None) -> "dict[str, torch.Tensor]":
        """Return {name inside the layer: tensor} of one layer."""
        prefix = self.prefix(layer)
        return {name: self.read(prefix + name, dtype) for name, _ in self.layer_tensors(layer)}

    def read_module(self, module: str, dtype: "torch.dtype | None" = None) -> "dict[str, torch.Tensor]":
        """Return {name inside the module: tensor} of a module outside the layers."""
        names = [name for name in self.tensors if name.startswith(f"{module}.")]
        return {name.removeprefix(f"{module}."): self.read(name, dtype) for name in names}

    def _checked(self, name: str, tensor: "torch.Tensor", dtype: "torch.dtype | None") -> "torch.Tensor":
        info = self.tensors[name]
        if tensor.is_floating_point() and not all_finite(tensor):
            raise NonFiniteError(
                f"{info.file}: tensor {name} holds NaN or Inf; no output of this model would be usable"
            )
        if not tensor.is_floating_point() and ((tensor < 0) | (tensor >= self.dims.d_model)).any():
            raise CheckpointError(f"{info.file}: tensor {name} names channels beyond the model's {self.dims.d_model}")
        if name.endswith(f"{self.family.roles.gauge}.pivots") and not tensor.sort().values.diff().all():
            raise CheckpointError(f"{info.file}: tensor {name} names a channel twice for one head")
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def index_digests(self) -> list[str | None]:
        """Return the sha256 of each layer's channel numbers, as 32-bit integers; None where it stores none."""
        return [self._index_digest(self.dims.stored_layer(layer)) for layer in range(self.dims.n_layers)]

    @property
    def indices_told(self) -> bool:
        """Whether config.json has the sha256 of the channel numbers, if there are any."""
        return self.config.get("index_sha256") is not None or not any(map(self.family.is_index, self.tensors))

    def _index_digest(self, layer: int) -> str | None:
        places = (f"{self.family.roles.query_map}.index", f"{self.family.roles.gauge}.pivots")
        names = [name for place in places if (name := self.prefix(layer) + place) in self.tensors]
        numbers = b"".join(self.read(name).numpy().astype("<i4").tobytes() for name in names)
        return hashlib.sha256(numbers).hexdigest() if names else None

    def hashes(self) -> dict[str, str]:
        """Return {file name: sha256} of the config and every weights file."""
        return {name: sha256(self.folder / name) for name in ["config.json", *self.files]}


def differing_sizes(one: Checkpoint, other: Checkpoint) -> str:
    """Return in words which sizes of two checkpoints differ, their ties aside; empty where none does."""
    ours, theirs = (replace(checkpoint.dims, tied=False) for checkpoint in (one, other))
    names = [name for name in ours.__dataclass_fields__ if getattr(ours, name) != getattr(theirs, name)]
    return ", ".join(f"{name} ({getattr(ours, name)} and {getattr(theirs, name)})" for name in names)


def locate(name: str | os.PathLike[str], patterns: Sequence[str] = HUB_PATTERNS) -> Path:
    """Return the folder of a checkpoint given as a local folder or a hub id.

    A hub id is fetched into the hub's cache (weights as safetensors and text files only).
    """
    path = Path(name)
    try:
        if path.is_dir():
            return path
        is_file = path.is_file()
    except OSError as error:
        raise CheckpointError(f"{str(name)[:100]!r} is not a path: {error.strerror}") from error
    if is_file:
        raise CheckpointError(f"{path} is a file; give the folder that holds config.json and the safetensors files")
    if near := nearest(str(name), holding="config.json"):
        raise CheckpointError(f"no folder {path}; did you mean {near}? A model of the hub: its full id, OWNER/NAME")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)) or str(name).startswith("."):
        raise CheckpointError(f"no folder {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=list(patterns), ignore_patterns=HUB_IGNORED))
    except Exception as error:  # the hub raises a dozen kinds; each means: not there, or not reachable
        raise CheckpointError(f"no folder {path}, and the hub did not give {name!r}: {reason_of(error)}") from error


def open_checkpoint(name: str | os.PathLike[str], *, reduced: bool = False) -> Checkpoint:
    """Open an original checkpoint (or, with `reduced`, one that qectomy wrote) and check every tensor's header.

    What is read is what transformers reads; where that is not all that the files say, it is told on stderr. Raises
    CheckpointError for missing or damaged files, tensors missing, misshapen or of an integer type where weights are
    due, and UnsupportedArchitecture for a model whose W_Q cannot be taken out.
    """
    folder = locate(name)
    config = read_config_json(folder)
    own = folder.resolve().name if Path(name).is_dir() else str(name)
    opened = assemble(own, folder, config, partial(read_headers, folder), partial(same_bytes, folder), reduced=reduced)
    if reduced:
        _check_indices(opened)
    for told in filter(None, (second_set(folder), *opened.notes)):
        note(told)
    return opened


def read_config_json(folder: Path) -> dict[str, Any]:
    """Parse a folder's config.json. Raises CheckpointError, too, for a folder with an adapter's files."""
    if (folder / ADAPTER).is_file():
        raise CheckpointError(
            f"{folder} holds an adapter ({ADAPTER}): where peft is installed, transformers adds it to the weights, and "
            "elsewhere it does not, so the folder is two models. Merge it (peft's merge_and_unload, then "
            f"save_pretrained into a new folder) and give that one; or take {ADAPTER} away to use the weights alone"
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: not a JSON object")
    return config


def assemble(
    name: str,
    folder: Path,
    raw: dict[str, Any],
    headers: Callable[[], dict[str, TensorInfo]],
    same: Same,
    *,
    reduced: bool = False,
) -> Checkpoint:
    """Return the checkpoint that a parsed config.json and the `headers` of its weights amount to, all checked.

    `same` says whether two stored tensors are equal. Raises what `open_checkpoint` does.
    """
    if raw.get("quantization_config") is not None:
        refuse_quantized(raw, _values_or_none(headers))
    family = find_reduced_family(raw) if reduced else find_family(raw)
    family.check_fields(raw)
    config, left_out = known_fields(raw, _known(family, raw), family.model_type)
    dims = family.dimensions(config)
    if dims.n_layers > MAX_LAYERS:
        raise CheckpointError(f"config.json: num_hidden_layers {dims.n_layers} is beyond any model ({MAX_LAYERS})")
    recipe = _read_recipe(config, dims) if reduced else (QueryMapSpec("dense"),) * dims.n_layers
    found = headers()
    all_names = family.full_names(found, expected_tensors(family, replace(dims, tied=False), recipe))
    found, settled = settle_tie({full: found[stored] for full, stored in all_names.items()}, family, dims, same)
    if settled.tied != dims.tied:
        config["tie_word_embeddings"] = False
    tensors = check_tensors(found, family, settled, expected_tensors(family, settled, recipe))
    opened = Checkpoint(name, folder, config, family, settled, recipe, tensors)
    return replace(opened, notes=tuple(_notes(opened, raw, left_out, dims.tied and not settled.tied)))


def _values_or_none(headers: Callable[[], dict[str, TensorInfo]]) -> list[TensorInfo] | None:
    try:
        return list(headers().values())
    except CheckpointError:
        return None


def _known(family: Family, raw: dict[str, Any]) -> tuple[str, ...]:
    """Return the fields of config.json that are read: the family's, and in a config of ours those that we write."""
    from qectomy.checkpoint.config_files import DROPPED  # which itself speaks of checkpoints

    return (*family.fields, *DROPPED) if raw["model_type"] == family.reduced_model_type else family.fields


def _notes(opened: Checkpoint, raw: dict[str, Any], left_out: list[str], untied: bool) -> Iterator[str]:
    """Yield what was read otherwise than config.json says."""
    family, stored = opened.family, TORCH_NAMES[opened.dtype]
    if untied:
        yield (
            f"{opened.folder}: config.json ties head and embedding, and the weights hold two that differ. Both are "
            "read, untied, as transformers does, and written so; set tie_word_embeddings to false there"
        )
    said = {str(raw[key]).removeprefix("torch.") for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    if other := sorted(said - {stored}):
        yield (
            f"{opened.folder}: config.json says {shown(' and '.join(other))}, and the weights are stored in {stored}. "
            f"{stored} is taken, in every command, for it is what the numbers have; --dtype takes another"
        )
    if left_out:
        yield (
            f"{opened.folder}: config.json has fields that a {family.model_type} model does not know, which are "
            f"neither read nor written into an output: {', '.join(map(shown, left_out[:8]))}"
            f"{', ...' if left_out[8:] else ''}"
        )
    if raw.get("auto_map") is not None and not opened.reduced:
        yield (
            f"{opened.folder}: config.json names code of its own (auto_map), which is not run: the weights are read as "
            f"those of transformers' {family.model_type}"
        )


def expected_layer(family: Family, dims: Dimensions, spec: QueryMapSpec) -> Shapes:
    """Return {name inside the layer: shape} of a layer whose query map is `spec`."""
    query = {f"{family.roles.query_map}.{name}": shape for name, (_, shape) in spec.stored(dims).items()}
    return family.layer_shapes(dims, spec) | query


def expected_tensors(family: Family, dims: Dimensions, recipe: tuple[QueryMapSpec, ...]) -> Shapes:
    """Return {tensor name: shape} of a whole checkpoint, in the order in which a pass writes it."""
    outer = family.outer_shapes(dims)
    shapes = {family.embedding: outer.pop(family.embedding)}
    for layer, spec in enumerate(recipe[: dims.n_stored]):
        prefix = family.prefix(layer)
        shapes.update((prefix + name, shape) for name, shape in expected_layer(family, dims, spec).items())
    return {**shapes, **outer}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def digest_at(descriptor: int, offset: int, nbytes: int) -> str | None:
    """Return the sha256 of bytes of a file, read a few at a time; None where it ends before."""
    digest = hashlib.sha256()
    while nbytes:
        data = os.pread(descriptor, min(nbytes, BYTES_A_READ), offset)
        if not data:
            return None
        digest.update(data)
        offset, nbytes = offset + len(data), nbytes - len(data)
    return digest.hexdigest()


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _read_recipe(config: dict[str, Any], dims: Dimensions) -> tuple[QueryMapSpec, ...]:
    """Read each layer's maps from the config of a reduced model; a field that is left out means dense."""
    columns = []
    for field_name in ("query_maps", "value_maps", "output_maps"):
        names = config.get(field_name) or (None if field_name == "query_maps" else ["dense"] * dims.n_layers)
        if not isinstance(names, list) or len(names) != dims.n_layers or not all(isinstance(n, str) for n in names):
            kind = field_name.removesuffix("s").replace("_", " ")
            raise CheckpointError(f"config.json: {field_name} must name one {kind} for each of {dims.n_layers} layers")
        columns.append(names)
    recipe = []
    for layer, names in enumerate(zip(*columns, strict=True)):
        try:
            recipe.append(stored_maps(*names))
        except QueryMapError as error:
            raise QueryMapError(f"config.json, layer {layer}: {error}") from error
        if recipe[-1].name == "gauge" and dims.rope:
            raise QueryMapError(f"config.json, layer {layer}: a model with RoPE has no query map 'gauge'")
    return tuple(recipe)


def _check_indices(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for channel numbers other than those of which config.json has the sha256."""
    wanted = checkpoint.config.get("index_sha256")
    if wanted is None:  # as in folders written before there was one
        return
    n_layers = checkpoint.dims.n_layers
    if not isinstance(wanted, list) or len(wanted) != n_layers:
        raise CheckpointError(f"config.json: index_sha256 must hold one sha256 or null for each of {n_layers} layers")
    for layer, (said, found) in enumerate(zip(wanted, checkpoint.index_digests(), strict=True)):
        if said != found:
            raise CheckpointError(
                f"{checkpoint.folder}: the channel numbers of layer {layer} ({checkpoint.prefix(layer)}*.index or "
                "*.pivots) are not those of which config.json has the sha256 (index_sha256): they were changed, or "
                "averaged with another model's, and every query would read other channels. Take the folder as it was "
                "written"
            )
