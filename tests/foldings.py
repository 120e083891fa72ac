"""Exact folds of tiny checkpoints, and their logits in float64 with nothing rounded to float32 on the way."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tiny_models import load_reduced, tokens
from torch import nn

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import (
    copy_companions,
    copy_model_code,
    load_config,
    reduced_config,
    write_reduced_config,
)
from qectomy.runs.input_hashes import SourceWatch
from qectomy.runs.produce import run_dir
from qectomy.runs.step_writer import write_steps
from qectomy.surgery.checkpoint import ExactPlan, folding_steps, plan_exact


class Float64Norm(nn.Module):
    """RMSNorm that stays in float64; transformers' own casts to float32 and hides what lies below 3e-8."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def in_float64(model: Any) -> Any:
    """Put a model's parameters and RMSNorms in float64, in place; RoPE's frequencies stay float32, as transformers'."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, Float64Norm(child))
    return model.eval()


def fold(source: Path, out: Path, dtype: str | None = None, kept: frozenset[int] = frozenset()) -> ExactPlan:
    """Fold a checkpoint exactly into a new folder, as a user gets it; return the plan."""
    checkpoint = open_checkpoint(source)
    plan = plan_exact(checkpoint, dtype, kept)
    write_fold(source, out, plan, dtype)
    return plan


def write_fold(source: Path, out: Path, plan: ExactPlan, dtype: str | None = None) -> None:
    checkpoint = open_checkpoint(source)
    with run_dir(out, {}) as run:
        write_steps(
            run, plan.tensors(checkpoint, dtype), folding_steps(checkpoint, plan, dtype), SourceWatch(checkpoint)
        )
        run.publish()
    config = reduced_config(checkpoint, plan.recipe, dtype or checkpoint.dtype)
    write_reduced_config(out, {**config, "tie_word_embeddings": plan.dims.tied})
    copy_companions(source, out)
    copy_model_code(checkpoint.family, out)


def load_stock(folder: Path) -> Any:
    """Return transformers' own model of a folder, loaded without from_pretrained, strictly."""
    checkpoint = open_checkpoint(folder)
    model = checkpoint.family.causal_class()(load_config(checkpoint.family, checkpoint.config))
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    if checkpoint.dims.tied:
        state[checkpoint.family.head] = state[checkpoint.family.embedding]
    for parameter in model.parameters():  # before the weights, which are not to be rounded
        parameter.data = parameter.data.double()
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def logits(folder: Path, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the float64 logits of a folder, of ours or of transformers' own class."""
    ours = json.loads((folder / "config.json").read_text())["model_type"].startswith("qectomy_")
    model = in_float64(load_reduced(folder, torch.float64) if ours else load_stock(folder))
    return model(tokens() if ids is None else ids, use_cache=False).logits


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of what a folder's one weights file holds."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
