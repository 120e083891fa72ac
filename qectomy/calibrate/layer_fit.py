"""Fit one layer: from both hidden-state streams to the reduced layer's tensors."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from qectomy.calibrate.attention_kl import attention_logits
from qectomy.calibrate.layers import LayerRunner
from qectomy.calibrate.moments import Moments, MomentSums
from qectomy.calibrate.refine import FitData, RefineSettings, refine
from qectomy.calibrate.rope_pairs import Rope
from qectomy.calibrate.starts import Projections, Start, make_start
from qectomy.calibrate.states import HiddenStates, batches
from qectomy.surgery.query_maps import QueryMapSpec


@dataclass(frozen=True)
class Streams:
    """Teacher's and student's hidden states; windows [0, fitted) are fitted on, the rest only measured."""

    teacher: HiddenStates
    student: HiddenStates
    fitted: int
    batch: int  # windows handled at a time


def fit_layer(
    runner: LayerRunner,
    layer: int,
    spec: QueryMapSpec,
    tensors: dict[str, torch.Tensor],
    base: dict[str, torch.Tensor],
    teacher: nn.Module,
    streams: Streams,
    settings: RefineSettings,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """Return the reduced layer's tensors, by name inside the layer, float32.

    `tensors` are the teacher's, `base` those from which the reduced layer takes what the fit does not change.
    """
    dims, projections, rope = runner.dims, _projections(runner, tensors), _rope(runner)
    moments, data = _collect(runner, teacher, streams)
    attended = attended_moments(data, dims.n_kv_heads) if spec.name == "key-shared" else moments.student[None]
    start = make_start(spec, moments, attended, projections, dims, rope, generator)
    with torch.device("meta"):
        reduced = runner.family.reduced_layer(runner.reduced_config, layer)
        query_module = reduced.get_submodule(runner.family.roles.query_map)
    fitted, b_K = refine(
        start,
        projections.b_K,
        query_module,
        data,
        moments.student,
        projections.W_Q,
        rope,
        settings,
        generator,
    )
    return fold(runner, base, fitted, b_K)


def fold(
    runner: LayerRunner, tensors: dict[str, torch.Tensor], fitted: Start, b_K: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Return the layer's tensors with the fit put in: W_Q gone, and the identity's gain in the norm.

    x̂ ⊙ g is what the norm gives once its gain is γ ⊙ g; W_K and W_V divide their columns by g and read on as before.
    """
    roles = runner.family.roles
    out = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{roles.query.module}.")}
    key, value = f"{roles.key.module}.weight", f"{roles.value.module}.weight"
    out[key] = fitted.W_K.T.float()
    if b_K is not None:
        out[f"{roles.key.module}.bias"] = b_K.float()
    if fitted.norm_gain is not None:
        gain, norm = fitted.norm_gain.double().cpu(), f"{roles.attention_norm}.weight"
        out[norm] = (out[norm].double() * gain).float()
        out[key] = (out[key].double().cpu() / gain).float()
        out[value] = (out[value].double() / gain).float()
    for name, tensor in fitted.query.items():
        out[f"{roles.query_map}.{name}"] = tensor.float() if tensor.is_floating_point() else tensor
    return {name: tensor.cpu().contiguous() for name, tensor in out.items()}


def _collect(runner: LayerRunner, teacher: nn.Module, streams: Streams) -> tuple[Moments, FitData]:
    """Read the fitted windows once: moments, the student's x̂, and the teacher's turned queries and keys."""
    dims, device = runner.dims, runner.device
    sums = MomentSums(dims.d_model, device)

    def room(*shape: int) -> torch.Tensor:
        return torch.empty(streams.fitted, *shape, dtype=fast_dtype(device), device=device)

    data = FitData(
        room(runner.context, dims.d_model),
        room(dims.n_heads, runner.context, dims.d_head),
        room(dims.n_kv_heads, runner.context, dims.d_head),
        runner.causal(),
        runner.scaling(teacher),
        runner.turn,
    )
    for start, stop in batches(0, streams.fitted, streams.batch):
        theirs = runner.read(teacher, streams.teacher.read(start, stop).to(runner.device))
        ours = runner.read(teacher, streams.student.read(start, stop).to(runner.device))
        sums.add(ours, theirs)
        with fast_math(runner.device):
            query, key = runner.queries_keys(teacher, theirs)
        data.hidden[start:stop] = ours
        data.teacher_query[start:stop] = query
        data.teacher_key[start:stop] = key
    return sums.moments(), data


def attended_moments(data: FitData, n_kv_heads: int, windows: int = 12, stride: int = 8) -> torch.Tensor:
    """Return E_i Var_p_i(x̂_j), x̂'s covariance under the teacher's attention, for each KV head: (G, D, D) float32."""
    n, context, d_model = data.hidden.shape
    rows = torch.arange(stride - 1, context, stride, device=data.hidden.device)
    total = torch.zeros(n_kv_heads, d_model, d_model, device=data.hidden.device)
    chosen = range(0, n, max(1, n // windows))
    for i in chosen:
        logits = attention_logits(
            data.teacher_query[i : i + 1][:, :, rows], data.teacher_key[i : i + 1], data.allowed[rows]
        )
        p = logits.float().softmax(-1).view(n_kv_heads, -1, context)  # (G, H/G*R, T)
        hidden = data.hidden[i].float()
        hidden = hidden - hidden.mean(0)
        for g in range(n_kv_heads):
            mean = p[g] @ hidden
            spread = (hidden * p[g].sum(0)[:, None]).T @ hidden - mean.T @ mean
            total[g] += spread / len(p[g])
    for g in range(n_kv_heads):  # one at a time: a float64 copy of all of them would outweigh the layer
        values, vectors = torch.linalg.eigh(total[g].double() / len(chosen))
        total[g] = ((vectors * values.clamp_min(1e-3 * values.mean())) @ vectors.T).float()
    return total


def _projections(runner: LayerRunner, tensors: dict[str, torch.Tensor]) -> Projections:
    roles = runner.family.roles

    def get(name: str) -> torch.Tensor | None:
        return tensors[name].to(runner.device).double() if name in tensors else None

    query, key = get(f"{roles.query.module}.weight"), get(f"{roles.key.module}.weight")
    assert query is not None
    assert key is not None
    return Projections(query.T, get(f"{roles.query.module}.bias"), key.T, get(f"{roles.key.module}.bias"))


def _rope(runner: LayerRunner) -> Rope:
    dims = runner.dims
    return Rope(runner.cos[0].double(), runner.sin[0].double(), dims.n_kv_heads, dims.n_heads // dims.n_kv_heads)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    native = device.type == "cpu" and (
        torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    )
    return torch.bfloat16 if native else torch.float32


@contextmanager
def fast_math(device: torch.device) -> Iterator[None]:
    """Run matrix products in `fast_dtype`; the residual stream stays float32."""
    if fast_dtype(device) is torch.float32:
        yield
        return
    with torch.autocast(device.type, dtype=torch.bfloat16):
        yield
