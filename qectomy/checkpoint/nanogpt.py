"""Read nanoGPT checkpoints, those of the paper's repository among them: sizes and state dict.

A checkpoint is a pickled dictionary whose `model_args` say the sizes and whose `model` is the state dict. Only tensors
and plain containers are unpickled (`weights_only`): no code runs.
"""

import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import MAX_LAYERS
from qectomy.checkpoint.headers import open_regular
from qectomy.checkpoint.nanogpt_relatives import about_pickled, check_binary, check_relatives, is_plain, unwrapped
from qectomy.checkpoint.shards import DTYPES
from qectomy.errors import CheckpointError, UnsupportedArchitecture, shown
from qectomy.models.architectures import FAMILIES
from qectomy.models.family import Dimensions, flag, size
from qectomy.models.query_maps import IDENTITY, QueryMapSpec

GPT2 = FAMILIES["gpt2"]
QUERY_MODES = ("original", "identity", "residual")
MASK = ".attn.bias"  # the causal mask, where flash attention was not to be had


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """What `model_args` says, under GPT-2's names."""

    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    vocab_size: int
    n_inner: int
    bias: bool
    tied: bool
    dropout: float
    scale: float  # on the logits before the softmax
    query_mode: str

    @property
    def reduced(self) -> bool:
        """Whether this is a model without W_Q."""
        return self.query_mode == "identity"

    @property
    def spec(self) -> QueryMapSpec:
        """Every layer's query map."""
        return QueryMapSpec(IDENTITY if self.reduced else "dense")


def read_nanogpt(path: Path) -> tuple[ModelArgs, dict[str, torch.Tensor]]:
    """Return the sizes and the state dict, its names without wrappers' prefixes and without the causal mask."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_archive(path))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        named = re.search(r"Unsupported (?:global: GLOBAL (\S+)|.*)", str(error))
        if named and named[1]:
            raise CheckpointError(
                f"{path} holds more than tensors and plain containers ({named[1]}); unpickling that can run code, "
                f"so it is not read{about_pickled(path, named[1])}"
            ) from error
        raise CheckpointError(
            f"{path} is not a checkpoint of tensors and plain containers that PyTorch can unpickle safely"
            f"{f' ({named[0]})' if named else ''}"
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"no file {path}") from error
    except Exception as error:  # PyTorch's unpickler raises whatever its opcodes meet
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint: {reason[:200]}") from error
    check_relatives(path, held)
    state = unwrapped(path, held["model"])
    if strange := [name for name, tensor in state.items() if not is_plain(tensor)]:
        raise CheckpointError(f"{path}: model[{shown(strange[0])}] is not a plain tensor")
    state = {name: tensor for name, tensor in state.items() if not name.endswith(MASK)}
    return model_args(held["model_args"], f"{GPT2.final_norm}.bias" in state), state


def _is_archive(path: Path) -> bool:
    """Whether this is PyTorch's zip and no older pickle. Raises ValueError for one whose parts unfold to more,
    CheckpointError for llm.c's file.
    """
    with open_regular(path) as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            check_binary(path, file.read(4))
            return False
        with zipfile.ZipFile(file) as archive:
            if sum(part.file_size for part in archive.infolist()) > os.fstat(file.fileno()).st_size:
                raise ValueError("its parts are compressed, which PyTorch never does")
    return True


def model_args(found: dict[str, Any], has_bias: bool) -> ModelArgs:
    """Read `model_args`; what plain nanoGPT does not say has nanoGPT's value. Raises CheckpointError naming a field."""
    fields = {name: value for name, value in found.items() if value is not None}
    read = partial(size, fields, where="model_args")
    heads = "num_heads" if "num_heads" in fields else "n_head"
    n_embd, n_head = read("n_embd"), read(heads)
    if n_embd % n_head:
        raise CheckpointError(f"model_args: n_embd {n_embd} is not a multiple of {heads} {n_head}")
    mode = fields.get("query_mode", "original")
    if mode == "residual_gelu":
        raise UnsupportedArchitecture(
            "model_args: query_mode 'residual_gelu' makes queries x̂ + gelu(x̂ W_Q), which is not linear in x̂: no query "
            f"map and no W_Q stands for it; known: {', '.join(QUERY_MODES)}"
        )
    if mode not in QUERY_MODES:
        raise UnsupportedArchitecture(f"model_args: unknown query_mode {shown(mode)}; known: {', '.join(QUERY_MODES)}")
    n_layer = read("n_layer")
    if n_layer > MAX_LAYERS:
        raise CheckpointError(f"model_args: n_layer {n_layer} is beyond any model ({MAX_LAYERS})")
    return ModelArgs(
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        n_positions=read("block_size"),
        vocab_size=read("vocab_size"),
        n_inner=read("mlp_hidden_size", 4 * n_embd),
        bias=flag(fields, "bias", has_bias, where="model_args"),
        tied=flag(fields, "tie_weights", True, where="model_args"),
        dropout=_number(fields, "dropout", 0.0, least=0.0, below=1.0),
        scale=_number(fields, "scale", (n_embd // n_head) ** -0.5, least=1e-12, below=1e6),
        query_mode=mode,
    )


def safetensors_dtype(tensor: torch.Tensor) -> str:
    """Return safetensors' name of a tensor's type. Raises CheckpointError for one that weights are not kept in."""
    for name, dtype in DTYPES.items():
        if tensor.dtype == dtype and dtype.is_floating_point:
            return name
    raise CheckpointError(f"the weights are stored as {tensor.dtype}; float32, bfloat16 or float16 can be read")


def check_state(args: ModelArgs, dims: Dimensions, state: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless the state dict holds what `model_args` call for, and nothing else."""
    expected = GPT2.outer_shapes(dims)
    for layer in range(dims.n_layers):
        shapes = {name: shape[::-1] for name, shape in GPT2.layer_shapes(dims, args.spec).items()}
        if args.reduced:
            shapes[f"{GPT2.roles.value.module}.bias"] = (2 * dims.d_model,)
        expected |= {GPT2.prefix(layer) + name: shape for name, shape in shapes.items()}
    if not args.bias:
        expected = {name: shape for name, shape in expected.items() if not name.endswith(".bias")}
    if missing := [name for name in expected if name not in state]:
        raise CheckpointError(f"{len(missing)} tensor(s) that model_args call for are missing, first {missing[0]}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"tensor {name} has shape {tuple(state[name].shape)}, model_args (query_mode {args.query_mode!r}) call "
                f"for {shape}"
            )
        safetensors_dtype(state[name])
    wte, head = state[GPT2.embedding], state.get(GPT2.head)
    if args.tied and head is not None and not torch.equal(head.nan_to_num(), wte.nan_to_num()):
        raise CheckpointError("model_args say tie_weights, but lm_head.weight is not transformer.wte.weight")
    if extra := [name for name in state if name not in expected and name != GPT2.head]:
        raise CheckpointError(f"{len(extra)} tensor(s) have no place in a GPT-2 and would be lost, first {extra[0]}")


def _number(fields: dict[str, Any], name: str, default: float, least: float, below: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < below:
        raise CheckpointError(
            f"model_args: {name} must be a number from {least:g} to below {below:g}, got {shown(value)}"
        )
    return float(value)
