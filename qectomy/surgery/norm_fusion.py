"""Fold a norm's gain, shift and mean into the matrices around it. Each step is exact and can be used alone.

    gain    norm(x) γ W           = norm(x) (diag(γ) W)              into the readers; the gain becomes 1
    shift   (norm(x) γ + β) W + b = norm(x) γ W + (b + β W)          into the readers' biases; the shift becomes 0
    mean    LayerNorm(a W + b)    = LayerNorm((a W + b)(I - 11ᵀ/D))  out of the writers: LayerNorm takes it out anyway,
                                                                     and for states of mean 0 it is RMSNorm
Dimensions: D d_model; weights are (in, out), as in x W. All algebra in float64, cast once to the weight's type.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.config_files import copy_companions, copy_model_code, with_code, write_config
from qectomy.checkpoint.finite import all_finite
from qectomy.checkpoint.shards import ShardWriter, TensorSpec
from qectomy.errors import NonFiniteError, QectomyError, UnsupportedArchitecture
from qectomy.models.family import LayerRoles
from qectomy.models.linear_views import Projection, read_view, store_views
from qectomy.progress import Progress
from qectomy.runs.input_hashes import SourceWatch
from qectomy.runs.produce import produce
from qectomy.runs.run_dir import GoOn, finished
from qectomy.surgery.at_once import ROWS_AT_ONCE

PARTS = ("gain", "shift", "mean")
Tensors = dict[str, torch.Tensor]


def absorb_gain(gamma: torch.Tensor, reader: Projection) -> Projection:
    """Return W' with x W' = (γ x) W for every x; the bias stays."""
    W, bias = reader
    return (gamma.double()[:, None] * W.double()).to(W.dtype), bias


def absorb_shift(beta: torch.Tensor, reader: Projection) -> Projection:
    """Return b' with x W + b' = (x + β) W + b for every x. Raises UnsupportedArchitecture for want of a bias."""
    W, bias = reader
    if bias is None:
        raise UnsupportedArchitecture("a norm's shift cannot be folded into a projection that has no bias")
    return W, (bias.double() + beta.double() @ W.double()).to(bias.dtype)


def centre(writer: Projection) -> Projection:
    """Return the writer (in, D) whose output is that of `writer` less its mean over the channels."""
    W, bias = writer
    return centre_rows(W), None if bias is None else centre_rows(bias)


def centre_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows (..., D) less each one's mean: x (I - 11ᵀ/D)."""
    return (rows.double() - rows.double().mean(-1, keepdim=True)).to(rows.dtype)


def fold_layer_norms(tensors: Tensors, roles: LayerRoles, parts: Sequence[str]) -> Tensors:
    """Return a layer's tensors, by name inside the layer, with these `parts` of its norms folded; the same outputs."""
    out = dict(tensors)
    readers = {roles.attention_norm: (roles.query, roles.key, roles.value), roles.mlp_norm: roles.mlp_readers}
    for norm, views in readers.items():
        gamma, beta = tensors[f"{norm}.weight"], tensors.get(f"{norm}.bias")
        projections = [read_view(out, view) for view in views]
        if "shift" in parts and beta is not None:  # through W itself: the shift stands behind the gain
            projections = [absorb_shift(beta, projection) for projection in projections]
            beta = torch.zeros_like(beta)
        if "gain" in parts:
            projections = [absorb_gain(gamma, projection) for projection in projections]
            out[f"{norm}.weight"] = torch.ones_like(gamma)
            beta = None if beta is None else without_gain(beta, gamma, norm)
        out |= store_views(list(zip(views, projections, strict=True)))
        if beta is not None:
            out[f"{norm}.bias"] = beta
    if "mean" in parts:
        for view in (roles.output, roles.mlp_out):
            out |= store_views([(view, centre(read_view(out, view)))])
    return out


def without_gain(beta: torch.Tensor, gamma: torch.Tensor, norm: str) -> torch.Tensor:
    """Return β / γ, the shift of a norm whose gain its readers absorb. Raises UnsupportedArchitecture where γ is 0."""
    if bool(((gamma == 0) & (beta != 0)).any()):
        raise UnsupportedArchitecture(f"{norm} has a gain of 0 beside a shift: fold its shift first, or too")
    return torch.where(beta == 0, 0.0, beta.double() / gamma.double()).to(beta.dtype)


def fold_norms(
    source: Checkpoint,
    out: Path,
    only: Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    resume: GoOn = False,
    clean: bool = False,
) -> dict[str, Any]:
    """Write a stock checkpoint with the same logits whose norms have `only` these parts folded; one layer at a time.

    Default: all. What cannot be folded is left and said: the final norm's shift, for want of a bias in the head, and
    where the head is tied the final gain and the means of the embedding. Until it is whole it lies in OUT.converting,
    whence `resume` goes on and which `clean` removes first.
    Raises QectomyError for an unknown part or a model without norms.
    """
    family, dims, parts = source.family, source.dims, tuple(only or PARTS)
    if unknown := set(parts) - set(PARTS):
        raise QectomyError(f"unknown part of a norm {sorted(unknown)[0]!r}; known: {', '.join(PARTS)}")
    if not dims.norms:
        raise UnsupportedArchitecture(f"{source.folder} has no norms to fold")
    parts = tuple(part for part in parts if part == "gain" or dims.norm_shift)  # RMSNorm has a gain alone
    kept = {"gain": "the final norm's gain", "shift": "the final norm's shift", "mean": "the embedding's means"}
    left = [what for part, what in kept.items() if part in parts and (dims.tied or part == "shift")]
    report = {"out": str(out), "folded": list(parts), "left": left}

    unchanged = SourceWatch(source)
    told = {"command": "fold-norms", "parts": ", ".join(sorted(parts))} | unchanged.fingerprint
    if resume and finished(out, told):
        return report

    def finish(folder: Path, _: dict[str, str]) -> dict[str, Any]:
        write_config(folder, with_code(family, source.config, source.reduced))
        copy_companions(source.folder, folder)
        if source.reduced:
            copy_model_code(family, folder)
        return report

    specs = {name: TensorSpec(info.shape, info.dtype) for name, info in source.tensors.items()}
    layers = [partial(_write_layer, source, parts, layer) for layer in range(dims.n_stored)]
    steps = [partial(_write_outer, source, parts), *layers]
    return produce(
        out, told, specs, steps, finish, unchanged, resume=resume, clean=clean, progress=progress, doing="folding"
    )


def _write_layer(source: Checkpoint, parts: Sequence[str], layer: int, writer: ShardWriter) -> None:
    for name, tensor in fold_layer_norms(source.read_layer(layer), source.family.roles, parts).items():
        if not all_finite(tensor):
            raise NonFiniteError(f"layer {layer}: {name} does not fit in its type once the norm is folded in")
        writer.write(source.prefix(layer) + name, tensor)


def _write_outer(source: Checkpoint, parts: Sequence[str], writer: ShardWriter) -> None:
    """Write what lies outside the layers: a head that takes in the final gain, tables without their rows' means."""
    family, dims = source.family, source.dims
    final = {f"{family.final_norm}.{name}": tensor for name, tensor in source.read_module(family.final_norm).items()}
    gamma, absorbed = final[f"{family.final_norm}.weight"], "gain" in parts and not dims.tied
    if absorbed:
        beta = final.get(f"{family.final_norm}.bias")
        final[f"{family.final_norm}.weight"] = torch.ones_like(gamma)
        if beta is not None:
            final[f"{family.final_norm}.bias"] = without_gain(beta, gamma, family.final_norm)
    centred = ({family.positions} | (set() if dims.tied else {family.embedding})) if "mean" in parts else set()
    for name in family.outer_shapes(dims):
        if name in final:
            writer.write(name, final[name])
            continue
        for start in range(0, source.tensors[name].shape[0], ROWS_AT_ONCE):
            rows = source.read_rows(name, start, min(start + ROWS_AT_ONCE, source.tensors[name].shape[0]))
            rows = centre_rows(rows) if name in centred else rows
            rows = absorb_gain(gamma, (rows.T, None))[0].T if absorbed and name == family.head else rows
            if not all_finite(rows):
                raise NonFiniteError(f"{name} overflows its type with the norm folded in")
            writer.write_rows(name, start, rows)
