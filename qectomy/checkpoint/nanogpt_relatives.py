"""Checkpoints that look like nanoGPT's and are not: what each one is, and two lines of Python that save it anew.

The lines give either nanoGPT's form, {"model": state dict, "model_args": sizes}, or a folder that transformers loads,
which every command of this package reads. Nothing of them is run here.
"""

import re
from pathlib import Path
from typing import Any

import torch

from qectomy.errors import CheckpointError, shown
from qectomy.models.architectures import FAMILIES

GPT2 = FAMILIES["gpt2"]
WRAPPERS = re.compile(r"(?:module\.|_orig_mod\.)*")  # what DDP and torch.compile put before every name
LLMC_MAGIC = (20240326).to_bytes(4, "little")
FORM = "nanoGPT's form is a dictionary of 'model', a state dict, and 'model_args', its sizes by name"
LOADED = "torch.load({path!r}, map_location='cpu', weights_only=True){key}"

GPT2_LAYER = re.compile(r"(?:transformer\.)?h\.(\d+)\.attn\.c_attn\.weight")
LLAMA_LAYER = re.compile(r"(?:model\.)?layers\.\d+\.self_attn\.k_proj\.weight")
LLAMA2C_LAYER = re.compile(r"layers\.\d+\.attention\.wk\.weight")
LITGPT_LAYER = re.compile(r"transformer\.h\.\d+\.attn\.(?:attn|qkv)\.weight")

# By transformers' own names: its class takes the state dict and saves a folder.
BY_TRANSFORMERS = """\
    import torch, transformers as t; model = t.AutoModelForCausalLM.from_config(t.AutoConfig.from_pretrained('ID'))
    model.load_state_dict({loaded}); model.save_pretrained('FOLDER')"""
BY_LLAMA2C = """\
    from export import hf_export, load_checkpoint  # of llama2.c; this turns W_Q and W_K to transformers' order for RoPE
    hf_export(load_checkpoint({path!r}), 'FOLDER')"""
BY_LITGPT = """\
    from pathlib import Path; from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
    convert_lit_checkpoint(Path({folder!r}), Path('converted'))  # gives model.pth: give that here again"""
WITH_SIZES = """\
    import torch; state = {loaded}
    torch.save({{'model': state, 'model_args': dict({sizes})}}, 'ckpt.pt')"""
BY_ITS_CODE = """\
    import torch; held = torch.load({path!r}, map_location='cpu', weights_only=False)  # this runs what the file says
    torch.save({{'model': held['model'], 'model_args': vars(held['config'])}}, 'ckpt.pt')"""
BY_LLMC = """\
    import torch; from train_gpt2 import GPT; model = GPT.from_pretrained('gpt2')  # or your own, at the end of training
    torch.save({'model': model.state_dict(), 'model_args': vars(model.config)}, 'ckpt.pt')"""
GELU = (
    "nanoGPT's GELU is the exact one. Where the model's is GPT-2's own (minGPT, llm.c), put \"gelu_new\" as "
    "activation_function into the config.json that import-nanogpt writes."
)


def unwrapped(path: Path, state: dict[Any, Any]) -> dict[str, Any]:
    """Return a state dict, its names without what DDP and torch.compile put before all. Raises for some alone."""
    names = [str(name) for name in state]
    found = {name: WRAPPERS.match(name)[0] for name in names}  # type: ignore[index]  # it matches nothing, too
    prefix = next(iter(found.values()), "")
    if other := next((name for name in names if found[name] != prefix), None):
        raise CheckpointError(
            f"{path}: the names of its tensors begin differently, {shown(names[0])} and {shown(other)}: DDP "
            "(module.) and torch.compile (_orig_mod.) stand before all or none, so these are of two models, "
            "and which one was meant cannot be told. Save the state dict of one"
        )
    return {name.removeprefix(prefix): tensor for name, tensor in zip(names, state.values(), strict=True)}


def check_relatives(path: Path, held: Any) -> None:
    """Raise CheckpointError, saying what it is, for what torch.load gave unless it has nanoGPT's form and names."""
    key, state = _state_dict(path, held)
    has_form = key == "model" and isinstance(held.get("model_args"), dict)
    loaded = LOADED.format(path=str(path), key=f"[{key!r}]" if key else "")
    first = next(iter(state), None)
    if _any(LLAMA2C_LAYER, state):
        lines, told = BY_LLAMA2C.format(path=str(path)), "is a Llama by the names of llama2.c"
    elif _any(LITGPT_LAYER, state):
        lines, told = BY_LITGPT.format(folder=str(path.parent)), "is a checkpoint by the names of LitGPT"
    elif _any(LLAMA_LAYER, state) or _is_conv1d(state):
        told = f"is a {'GPT-2' if _any(GPT2_LAYER, state) else 'Llama'} by transformers' names and layout"
        lines = BY_TRANSFORMERS.format(loaded=loaded) + "  # ID: its hub id, or a folder with its config.json"
    elif has_form:
        return
    elif (sizes := _sizes(held, state)) is not None:
        told = "has nanoGPT's names, but no dictionary 'model_args' with the model's sizes"
        lines = f"{WITH_SIZES.format(loaded=loaded, sizes=sizes)}\n{GELU}"
        if "N_HEAD" in sizes:
            lines += " N_HEAD is the number of heads, which no shape tells."
    else:
        found = f"tensors, first {shown(first)}" if state else _outline(held)
        raise CheckpointError(f"{path} is not a nanoGPT checkpoint: {FORM}, and this holds {found}")
    raise CheckpointError(
        f"{path} is not a nanoGPT checkpoint: it {told} ({len(state)} tensors, first {shown(first)}), and would be "
        f"read as another model. Two lines save it anew:\n{lines}"
    )


def about_pickled(path: Path, kind: str) -> str:
    """Return what to add of a checkpoint that pickles its sizes as an object of this class; nothing of another one."""
    if not kind.endswith(("Config", "Args")):
        return ""
    return (
        ". nanoGPT keeps its sizes as plain numbers, build-nanogpt as an object of its code's class. If you made the "
        f"file yourself, save it anew where that code is at hand:\n{BY_ITS_CODE.format(path=str(path))}\n{GELU}"
    )


def check_binary(path: Path, start: bytes) -> None:
    """Raise CheckpointError for a file that begins as llm.c's weights do."""
    if start == LLMC_MAGIC:
        raise CheckpointError(
            f"{path} holds llm.c's weights (they begin with 20240326), not a checkpoint of PyTorch's. Its "
            f"train_gpt2.py has them as a model; two lines save that in nanoGPT's form:\n{BY_LLMC}\n{GELU}"
        )


def is_plain(tensor: Any) -> bool:
    """Whether this is a tensor whose numbers all lie in the file: a stride of 0 can make terabytes of a few bytes."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_nested:
        return False
    return tensor.device.type == "cpu" and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _any(pattern: re.Pattern[str], state: dict[str, Any]) -> bool:
    return any(pattern.fullmatch(name) for name in state)


def _state_dict(path: Path, held: Any) -> tuple[str | None, dict[str, torch.Tensor]]:
    """Return the state dict and the key it lies under, None where it was saved alone; an empty one if there is none."""
    if not isinstance(held, dict):
        return None, {}
    for key, inner in [*((key, held.get(key)) for key in ("model", "model_state_dict", "state_dict")), (None, held)]:
        if isinstance(inner, dict) and any(isinstance(tensor, torch.Tensor) for tensor in inner.values()):
            state = unwrapped(path, inner)
            return key, {name: tensor for name, tensor in state.items() if is_plain(tensor)}
    return "model" if isinstance(held.get("model"), dict) else None, {}


def _is_conv1d(state: dict[str, torch.Tensor]) -> bool:
    """Whether a GPT-2's projections are stored (in, out), as transformers does; nanoGPT stores (out, in)."""
    shapes = [tuple(tensor.shape) for name, tensor in state.items() if GPT2_LAYER.fullmatch(name)]
    return bool(shapes) and all(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in shapes)


def _sizes(held: Any, state: dict[str, torch.Tensor]) -> str | None:
    """Return what model_args would say of these tensors, as arguments in Python; None where they are no GPT-2."""
    layers = [int(found[1]) for name in state if (found := GPT2_LAYER.fullmatch(name))]
    names = (
        GPT2.embedding,
        "transformer.wpe.weight",
        *(GPT2.prefix(0) + n for n in ("attn.c_attn.weight", "mlp.c_fc.weight")),
    )
    shapes = [tuple(state[name].shape) for name in names if name in state]
    if not layers or len(shapes) < len(names) or any(len(shape) != 2 for shape in shapes):
        return None
    (vocab_size, n_embd), (block_size, _), (projected, _), (n_inner, _) = shapes
    config = held.get("config")
    n_head = config.get("n_head") if isinstance(config, dict) else None
    sizes = dict(n_layer=1 + max(layers), n_head=n_head if type(n_head) is int else "N_HEAD", n_embd=n_embd)
    sizes |= dict(block_size=block_size, vocab_size=vocab_size)
    if n_inner != 4 * n_embd:
        sizes |= dict(mlp_hidden_size=n_inner)
    if projected == 2 * n_embd:
        sizes |= dict(query_mode="'identity'")
    if GPT2.head in state and not torch.equal(state[GPT2.head], state[GPT2.embedding]):
        sizes |= dict(tie_weights=False)
    return ", ".join(f"{name}={value}" for name, value in sizes.items())


def _outline(held: Any) -> str:
    if not isinstance(held, dict):
        return f"a {type(held).__name__}"
    return "an empty dictionary" if not held else f"a dictionary of {', '.join(shown(key) for key in list(held)[:5])}"
