"""Read nanoGPT checkpoints, those of the paper's repository among them, and write Hugging Face folders.

A checkpoint is a pickled dictionary whose `model_args` say the sizes and whose `model` is the state dict. Its
`query_mode` says what the queries are (x̂ is the hidden state after the norm):

    original       q = x̂ W_Q           a stock GPT-2
    identity       q = x̂               a reduced GPT-2 whose map is `identity`
    residual       q = x̂ + x̂ W_Q       a stock GPT-2 with W_Q + I
    residual_gelu  q = x̂ + gelu(x̂ W_Q) not linear in x̂: refused

The softmax scale s of a stock GPT-2 is 1/√K, so another one goes into W_Q as s √K; a reduced GPT-2 keeps it.
nanoGPT's GELU is the exact one. Only tensors and plain containers are unpickled (`weights_only`): no code runs.
Layouts: nanoGPT (out, in), GPT-2 (in, out). D d_model, K d_head, M d_mlp.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qectomy.errors import CheckpointError, NonFiniteError, UnsupportedArchitecture
from qectomy.surgery.architectures import FAMILIES
from qectomy.surgery.checkpoint import MAX_LAYERS, expected_tensors, open_checkpoint
from qectomy.surgery.config_files import TOKENIZER_FILES, copy_companions, copy_model_code, reduced_fields, write_config
from qectomy.surgery.family import flag, size
from qectomy.surgery.finite import all_finite
from qectomy.surgery.output import check_room, new_folder
from qectomy.surgery.query_maps import QueryMapSpec
from qectomy.surgery.writer import DTYPES, ShardWriter, TensorSpec

QUERY_MODES = ("original", "identity", "residual")
COMPILED = "_orig_mod."  # what torch.compile puts before every name
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
    def own_scale(self) -> float:
        """The softmax scale of a stock GPT-2, 1/√K."""
        return (self.n_embd // self.n_head) ** -0.5


def import_nanogpt(path: Path, out: Path, tokenizer: Path | None = None) -> dict[str, Any]:
    """Write the checkpoint in `path` to the folder `out`; return what was written.

    `tokenizer` is a folder whose tokenizer files are copied along: a nanoGPT checkpoint holds none. Raises
    CheckpointError for a pickle that holds more than tensors and plain containers, for missing, misshapen or
    unknown tensors and for sizes that make no sense, UnsupportedArchitecture for a query mode that is not linear.
    """
    args, state = read_nanogpt(path)
    check_state(args, state)
    dtype = safetensors_dtype(state["transformer.wte.weight"])
    family = FAMILIES["gpt2"]
    identity = args.query_mode == "identity"
    config = gpt2_config(args)
    dims = family.dimensions(config)
    recipe = (QueryMapSpec("identity" if identity else "dense"),) * dims.n_layers
    specs = {name: TensorSpec(shape, dtype) for name, shape in expected_tensors(family, dims, recipe).items()}
    check_room(out, sum(spec.nbytes for spec in specs.values()))
    with new_folder(out) as work:
        with ShardWriter(work, specs) as writer:
            for name, tensor in gpt2_tensors(args, state):
                stored = tensor.to(DTYPES[dtype])
                if not all_finite(stored):
                    raise NonFiniteError(f"{path}: {name} holds NaN or Inf; no output of this model would be usable")
                writer.write(name, stored)
            writer.finish()
        config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
        if identity:
            config |= {**reduced_fields(family, recipe), "softmax_scale": args.scale}
            copy_model_code(family, work)
        write_config(work, config)
        if tokenizer is not None:
            copy_companions(tokenizer, work, TOKENIZER_FILES)
        written = open_checkpoint(work, reduced=identity)
    return {
        "out": str(out),
        "model_type": config["model_type"],
        "query_mode": args.query_mode,
        "softmax_scale": args.scale,
        "parameters": written.parameters,
        "bytes": written.nbytes,
        "tokenizer": tokenizer is not None,
    }


def read_nanogpt(path: Path) -> tuple[ModelArgs, dict[str, torch.Tensor]]:
    """Return the sizes and the state dict, its names without torch.compile's prefix and without the causal mask."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"Unsupported (?:global: GLOBAL (\S+)|.*)", str(error))
        if named and named[1]:
            raise CheckpointError(
                f"{path} holds more than tensors and plain containers ({named[1]}); unpickling that can run code, "
                "so it is not read"
            ) from error
        raise CheckpointError(
            f"{path} is not a checkpoint of tensors and plain containers that PyTorch can unpickle safely"
            f"{f' ({named[0]})' if named else ''}"
        ) from error
    except FileNotFoundError as error:
        raise CheckpointError(f"no file {path}") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} cannot be read as a PyTorch checkpoint: {reason[:200]}") from error
    for key in ("model_args", "model"):
        if not isinstance(held, dict) or not isinstance(held.get(key), dict):
            raise CheckpointError(f"{path} is not a nanoGPT checkpoint: it holds no dictionary {key!r}")
    state = {str(name).removeprefix(COMPILED): tensor for name, tensor in held["model"].items()}
    if strange := [name for name, tensor in state.items() if not _is_plain(tensor)]:
        raise CheckpointError(f"{path}: model[{strange[0]!r}] is not a plain tensor")
    state = {name: tensor for name, tensor in state.items() if not name.endswith(MASK)}
    return model_args(held["model_args"], "transformer.ln_f.bias" in state), state


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
        raise UnsupportedArchitecture(f"model_args: unknown query_mode {mode!r}; known: {', '.join(QUERY_MODES)}")
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


def gpt2_tensors(args: ModelArgs, state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield GPT-2's tensors, stock or reduced, with their names, one layer at a time."""
    for name in ("transformer.wte.weight", "transformer.wpe.weight"):
        yield name, state[name]
    for layer in range(args.n_layer):
        prefix = f"transformer.h.{layer}."
        part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        for name, tensor in _gpt2_layer(args, part).items():
            yield prefix + name, tensor
    yield from _norm(state, "transformer.ln_f").items()
    if not args.tied:
        yield "lm_head.weight", state["lm_head.weight"]


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


def _gpt2_layer(args: ModelArgs, part: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return one layer's tensors, by name inside the layer; what changes is computed in float64 and cast once."""
    tensors = {**_norm(part, "ln_1"), **_norm(part, "ln_2")}
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        weight = part[f"{name}.weight"].T.contiguous()
        tensors[f"{name}.weight"] = weight
        tensors[f"{name}.bias"] = part.get(f"{name}.bias", weight.new_zeros(weight.shape[1]))
    W, b = tensors["attn.c_attn.weight"], tensors["attn.c_attn.bias"]
    if args.query_mode == "identity":  # softmax ignores the key's bias; the value's reaches the output as it is
        value_bias = b[args.n_embd :].double() @ tensors["attn.c_proj.weight"].double()
        tensors["attn.c_proj.bias"] = (tensors["attn.c_proj.bias"].double() + value_bias).to(b.dtype)
        del tensors["attn.c_attn.bias"]
        return tensors
    factor = args.scale / args.own_scale
    if args.query_mode == "original" and math.isclose(factor, 1.0, rel_tol=1e-12):
        return tensors
    identity = torch.eye(args.n_embd).double() if args.query_mode == "residual" else 0.0
    D = args.n_embd
    W_Q, b_Q = (W[:, :D].double() + identity) * factor, b[:D].double() * factor
    tensors["attn.c_attn.weight"] = torch.cat([W_Q.to(W.dtype), W[:, D:]], 1)
    tensors["attn.c_attn.bias"] = torch.cat([b_Q.to(b.dtype), b[D:]])
    return tensors


def _norm(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    weight = state[f"{name}.weight"]
    return {f"{name}.weight": weight, f"{name}.bias": state.get(f"{name}.bias", torch.zeros_like(weight))}


def check_state(args: ModelArgs, state: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError unless the state dict holds what `model_args` call for, and nothing else."""
    D, M = args.n_embd, args.n_inner
    expected: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (args.vocab_size, D),
        "transformer.wpe.weight": (args.n_positions, D),
        "transformer.ln_f.weight": (D,),
    }
    projections = {
        "attn.c_attn": ((2 if args.query_mode == "identity" else 3) * D, D),
        "attn.c_proj": (D, D),
        "mlp.c_fc": (M, D),
        "mlp.c_proj": (D, M),
    }
    for layer in range(args.n_layer):
        prefix = f"transformer.h.{layer}."
        expected |= {f"{prefix}{norm}.weight": (D,) for norm in ("ln_1", "ln_2")}
        expected |= {f"{prefix}{name}.weight": shape for name, shape in projections.items()}
    biased = [name for name in expected if not name.endswith(("wte.weight", "wpe.weight"))] if args.bias else []
    expected |= {f"{name.removesuffix('weight')}bias": expected[name][:1] for name in biased}
    if not args.tied:
        expected["lm_head.weight"] = (args.vocab_size, D)
    if missing := [name for name in expected if name not in state]:
        raise CheckpointError(f"{len(missing)} tensor(s) that model_args call for are missing, first {missing[0]}")
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"tensor {name} has shape {tuple(state[name].shape)}, model_args (query_mode {args.query_mode!r}) call "
                f"for {shape}"
            )
        safetensors_dtype(state[name])
    wte, head = state["transformer.wte.weight"], state.get("lm_head.weight")
    if args.tied and head is not None and not torch.equal(head.nan_to_num(), wte.nan_to_num()):
        raise CheckpointError("model_args say tie_weights, but lm_head.weight is not transformer.wte.weight")
    if extra := [name for name in state if name not in expected and name != "lm_head.weight"]:
        raise CheckpointError(f"{len(extra)} tensor(s) have no place in a GPT-2 and would be lost, first {extra[0]}")


def _is_plain(tensor: Any) -> bool:
    """Whether this is a tensor whose numbers all lie in the file: a stride of 0 can make terabytes of a few bytes."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_nested:
        return False
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _number(fields: dict[str, Any], name: str, default: float, least: float, below: float) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < below:
        got = repr(value)[:80]
        raise CheckpointError(f"model_args: {name} must be a number from {least:g} to below {below:g}, got {got}")
    return float(value)
