"""Read nanoGPT checkpoints, those of the paper's repository among them, and write Hugging Face folders.

A checkpoint is a pickled dictionary whose `model_args` say the sizes and whose `model` is the state dict. Its
`query_mode` says what the queries are (x̂ is the hidden state after the norm):

    original       q = x̂ W_Q           a stock GPT-2
    identity       q = x̂               a reduced GPT-2 whose map is `identity`
    residual       q = x̂ + x̂ W_Q       a stock GPT-2 with W_Q + I
    residual_gelu  q = x̂ + gelu(x̂ W_Q) not linear in x̂: refused

The softmax scale s of a stock GPT-2 is 1/√K, so another one goes into W_Q as s √K; a reduced GPT-2 keeps it.
nanoGPT's GELU is the exact one. Only tensors and plain containers are unpickled (`weights_only`): no code runs.
Layouts: nanoGPT (out, in), GPT-2 (in, out). D d_model, K d_head.
"""

import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import MAX_LAYERS, expected_tensors, open_checkpoint
from qectomy.checkpoint.config_files import (
    TOKENIZER_FILES,
    copied_companions,
    copy_companions,
    copy_model_code,
    reduced_fields,
    write_config,
)
from qectomy.checkpoint.finite import all_finite
from qectomy.checkpoint.headers import TORCH_NAMES, open_regular
from qectomy.checkpoint.nanogpt_relatives import about_pickled, check_binary, check_relatives, is_plain, unwrapped
from qectomy.checkpoint.shards import DTYPES, ShardWriter, TensorSpec
from qectomy.errors import CheckpointError, NonFiniteError, UnsupportedArchitecture, shown
from qectomy.models.architectures import FAMILIES
from qectomy.models.family import Dimensions, flag, size
from qectomy.models.linear_views import add_through, read_view, with_query
from qectomy.models.query_maps import QueryMapSpec
from qectomy.runs.input_hashes import FileWatch
from qectomy.runs.locked_folder import GoOn
from qectomy.runs.output import check_room
from qectomy.runs.step_writer import write_steps
from qectomy.runs.work_folder import WorkFolder, finished, without_report, work_folder

GPT2 = FAMILIES["gpt2"]
QUERY_MODES = ("original", "identity", "residual")
MASK = ".attn.bias"  # the causal mask, where flash attention was not to be had
GPT2_END = 50256  # <|endoftext|> of GPT-2's own tokenizer, which nanoGPT uses by default


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
        return QueryMapSpec("identity" if self.reduced else "dense")


def import_nanogpt(
    path: Path, out: Path, tokenizer: Path | None = None, *, resume: GoOn = False, clean: bool = False
) -> dict[str, Any]:
    """Write the checkpoint in `path` to the folder `out`; return what was written.

    `tokenizer` is a folder whose tokenizer files are copied along: a nanoGPT checkpoint holds none. Until the output is
    whole it lies in OUT.converting, whence `resume` goes on and which `clean` removes first. Raises
    CheckpointError for a pickle that holds more than tensors and plain containers, for missing, misshapen or
    unknown tensors and for sizes that make no sense, UnsupportedArchitecture for a query mode that is not linear.
    """
    args, state = read_nanogpt(path)
    config = gpt2_config(args)
    dims = GPT2.dimensions(config)
    check_state(args, dims, state)
    dtype = safetensors_dtype(state[GPT2.embedding])
    recipe = (args.spec,) * dims.n_layers
    specs = {name: TensorSpec(shape, dtype) for name, shape in expected_tensors(GPT2, dims, recipe).items()}
    config |= {"dtype": TORCH_NAMES[dtype]}
    if args.reduced:
        config |= {**reduced_fields(GPT2, recipe), "softmax_scale": args.scale}
    report = {
        "out": str(out),
        "model_type": config["model_type"],
        "query_mode": args.query_mode,
        "softmax_scale": args.scale,
        "parameters": sum(math.prod(spec.shape) for spec in specs.values()),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "tokenizer": tokenizer is not None,
    }
    beside = [] if tokenizer is None else copied_companions(tokenizer, TOKENIZER_FILES)
    unchanged = FileWatch({"weights": path} | {file.name: file for file in beside})
    told = {"command": "import-nanogpt"} | unchanged.fingerprint
    if resume and (done := finished(out, lambda: without_report(out), lambda: told)) is not None:
        return done
    check_room(out, report["bytes"] - WorkFolder(out).nbytes())
    steps = [partial(_write_step, step, path, dtype) for step in gpt2_steps(args, dims, state)]
    with work_folder(out, told, resume=resume, clean=clean) as work:
        write_steps(work, specs, steps, unchanged)
        if args.reduced:
            copy_model_code(GPT2, work.result)
        write_config(work.result, config)
        if tokenizer is not None:
            copy_companions(tokenizer, work.result, TOKENIZER_FILES)
        open_checkpoint(work.result, reduced=args.reduced)
        unchanged.check()
        work.publish(report)
    return report


def _write_step(tensors: Callable[[], dict[str, torch.Tensor]], path: Path, dtype: str, writer: ShardWriter) -> None:
    for name, tensor in tensors().items():
        stored = tensor.to(DTYPES[dtype])
        if not all_finite(stored):
            raise NonFiniteError(f"{path}: {name} holds NaN or Inf; no output of this model would be usable")
        writer.write(name, stored)


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


def gpt2_steps(
    args: ModelArgs, dims: Dimensions, state: dict[str, torch.Tensor]
) -> list[Callable[[], dict[str, torch.Tensor]]]:
    """Return what makes GPT-2's tensors, stock or reduced, by name: those outside the layers, then each layer's."""

    def outer() -> dict[str, torch.Tensor]:
        return {name: _or_zeros(state, name, shape) for name, shape in GPT2.outer_shapes(dims).items()}

    def layer(number: int) -> dict[str, torch.Tensor]:
        prefix = GPT2.prefix(number)
        part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        return {prefix + name: tensor for name, tensor in _gpt2_layer(args, dims, part).items()}

    return [outer, *(partial(layer, number) for number in range(dims.n_layers))]


def safetensors_dtype(tensor: torch.Tensor) -> str:
    """Return safetensors' name of a tensor's type. Raises CheckpointError for one that weights are not kept in."""
    for name, dtype in DTYPES.items():
        if tensor.dtype == dtype and dtype.is_floating_point:
            return name
    raise CheckpointError(f"the weights are stored as {tensor.dtype}; float32, bfloat16 or float16 can be read")


def gpt2_config(args: ModelArgs) -> dict[str, Any]:
    """Return the config.json of a stock GPT-2 of these sizes."""
    end = GPT2_END if args.vocab_size > GPT2_END else None
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu",
        "n_layer": args.n_layer,
        "n_head": args.n_head,
        "n_embd": args.n_embd,
        "n_positions": args.n_positions,
        "n_inner": args.n_inner,
        "vocab_size": args.vocab_size,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": args.tied,
        "bos_token_id": end,
        "eos_token_id": end,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), args.dropout),
    }


def _gpt2_layer(args: ModelArgs, dims: Dimensions, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return one layer's tensors, by name inside the layer; what changes is computed in float64 and cast once."""
    roles, shapes = GPT2.roles, GPT2.layer_shapes(dims, args.spec)
    tensors = {name: _or_zeros(part, name, shape[::-1]).t().contiguous() for name, shape in shapes.items()}
    if args.reduced:  # softmax ignores the key's bias; the value's reaches the output as it is
        if args.bias:
            tensors |= add_through(tensors, roles.output, part[f"{roles.value.module}.bias"][dims.d_model :])
        return tensors
    (W_Q, b_Q), factor = read_view(tensors, roles.query), args.scale * dims.d_head**0.5
    assert b_Q is not None
    identity = torch.eye(dims.d_model) if args.query_mode == "residual" else torch.zeros(())
    query = ((W_Q.double() + identity) * factor).to(W_Q.dtype), (b_Q.double() * factor).to(b_Q.dtype)
    return with_query(tensors, roles, query)


def _or_zeros(state: dict[str, torch.Tensor], name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor, or the zeros that a model without biases amounts to."""
    return state[name] if name in state else next(iter(state.values())).new_zeros(shape)


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
