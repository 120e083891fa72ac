"""Write Hugging Face folders of nanoGPT checkpoints, those of the paper's repository among them.

`query_mode` in a checkpoint's `model_args` says what the queries are (x̂ is the hidden state after the norm):

    original       q = x̂ W_Q           a stock GPT-2
    identity       q = x̂               a reduced GPT-2 whose map is `identity`
    residual       q = x̂ + x̂ W_Q       a stock GPT-2 with W_Q + I
    residual_gelu  q = x̂ + gelu(x̂ W_Q) not linear in x̂: refused

The softmax scale s of a stock GPT-2 is 1/√K, so another one goes into W_Q as s √K; a reduced GPT-2 keeps it.
nanoGPT's GELU is the exact one. Layouts: nanoGPT (out, in), GPT-2 (in, out). D d_model, K d_head.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import expected_tensors, open_checkpoint
from qectomy.checkpoint.config_files import (
    TOKENIZER_FILES,
    copied_companions,
    copy_companions,
    copy_model_code,
    reduced_fields,
    write_config,
)
from qectomy.checkpoint.finite import all_finite
from qectomy.checkpoint.headers import TORCH_NAMES
from qectomy.checkpoint.nanogpt import GPT2, ModelArgs, check_state, read_nanogpt, safetensors_dtype
from qectomy.checkpoint.shards import DTYPES, ShardWriter, TensorSpec
from qectomy.errors import NonFiniteError
from qectomy.models.family import Dimensions
from qectomy.models.linear_views import add_through, read_view, with_query
from qectomy.runs.input_hashes import FileWatch
from qectomy.runs.produce import produce
from qectomy.runs.run_dir import GoOn, finished

GPT2_END = 50256  # <|endoftext|> of GPT-2's own tokenizer, which nanoGPT uses by default


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
    if resume and finished(out, told):
        return report

    def finish(folder: Path, _: dict[str, str]) -> dict[str, Any]:
        if args.reduced:
            copy_model_code(GPT2, folder)
        write_config(folder, config)
        if tokenizer is not None:
            copy_companions(tokenizer, folder, TOKENIZER_FILES)
        open_checkpoint(folder, reduced=args.reduced)
        return report

    steps = [partial(_write_step, step, path, dtype) for step in gpt2_steps(args, dims, state)]
    return produce(out, told, specs, steps, finish, unchanged, resume=resume, clean=clean)


def _write_step(tensors: Callable[[], dict[str, torch.Tensor]], path: Path, dtype: str, writer: ShardWriter) -> None:
    for name, tensor in tensors().items():
        stored = tensor.to(DTYPES[dtype])
        if not all_finite(stored):
            raise NonFiniteError(f"{path}: {name} holds NaN or Inf; no output of this model would be usable")
        writer.write(name, stored)


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
