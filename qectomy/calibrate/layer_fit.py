"""Fit one layer: from both hidden-state streams to the reduced layer's tensors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from qectomy.calibrate.attention_kl import attention_logits
from qectomy.calibrate.layers import LayerRunner
from qectomy.calibrate.memory import release_freed
from qectomy.calibrate.moments import Moments, MomentSums
from qectomy.calibrate.precision import fast_dtype, fast_math
from qectomy.calibrate.refine import FitData, RefineSettings, refine
from qectomy.calibrate.rope_pairs import Rope
from qectomy.calibrate.starts import Projections, Start, make_start
from qectomy.calibrate.states import Streams, WindowFile, batches, scratch_file
from qectomy.surgery.query_maps import QueryMapSpec


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
    with torch.device("meta"):
        reduced = runner.family.reduced_layer(runner.reduced_config, layer)
        query_module = reduced.get_submodule(runner.family.roles.query_map)
    with _collected(runner, teacher, streams) as (moments, data):
        attended = attended_moments(data, dims.n_kv_heads) if spec.name == "key-shared" else moments.student[None]
        release_freed()
        start = make_start(spec, moments, attended, projections, dims, rope, generator)
        del attended
        release_freed()
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


@contextmanager
def _collected(runner: LayerRunner, teacher: nn.Module, streams: Streams) -> Iterator[tuple[Moments, FitData]]:
    """Read the fitted windows once: moments, the student's x̂, and the teacher's turned queries and keys.

    They lie in files, or in the memory of an accelerator, until the block ends.
    """
    dims, context = runner.dims, runner.context
    shapes = {
        "hidden": (context, dims.d_model),
        "teacher_query": (dims.n_heads, context, dims.d_head),
        "teacher_key": (dims.n_kv_heads, context, dims.d_head),
    }
    with ExitStack() as stack:
        stores = {name: _store(stack, runner.device, streams, name, *shape) for name, shape in shapes.items()}
        data = FitData(**stores, allowed=runner.causal(), scaling=runner.scaling(teacher), turn=runner.turn)
        yield _collect(runner, teacher, streams, data), data


def _store(
    stack: ExitStack, device: torch.device, streams: Streams, name: str, *shape: int
) -> torch.Tensor | WindowFile:
    """Return room for the fitted windows of one kind."""
    if device.type != "cpu":
        return torch.empty(streams.fitted, *shape, dtype=fast_dtype(device), device=device)
    path = streams.scratch / f".{name}"
    return stack.enter_context(scratch_file(path, streams.fitted, *shape, dtype=fast_dtype(device)))


def _collect(runner: LayerRunner, teacher: nn.Module, streams: Streams, data: FitData) -> Moments:
    """Fill `data` from the fitted windows; return the moments of x̂."""
    sums = MomentSums(runner.dims.d_model, runner.device)
    for start, stop in batches(0, streams.fitted, streams.batch):
        theirs = runner.read(teacher, streams.teacher[start:stop].to(runner.device))
        ours = runner.read(teacher, streams.student[start:stop].to(runner.device))
        sums.add(ours, theirs)
        with fast_math(runner.device):
            query, key = runner.queries_keys(teacher, theirs)
        data.hidden[start:stop] = ours
        data.teacher_query[start:stop] = query
        data.teacher_key[start:stop] = key
    return sums.moments()


def attended_moments(data: FitData, n_kv_heads: int, windows: int = 12, stride: int = 8) -> torch.Tensor:
    """Return E_i Var_p_i(x̂_j), x̂'s covariance under the teacher's attention, for each KV head: (G, D, D) float32."""
    n, context, d_model = data.hidden.shape
    device = data.allowed.device
    rows = torch.arange(stride - 1, context, stride, device=device)
    total = torch.zeros(n_kv_heads, d_model, d_model, device=device)
    chosen = range(0, n, max(1, n // windows))
    for i in chosen:
        logits = attention_logits(
            data.teacher_query[i : i + 1][:, :, rows], data.teacher_key[i : i + 1], data.allowed[rows]
        )
        p = logits.float().softmax(-1).view(n_kv_heads, -1, context)  # (G, H/G*R, T)
        hidden = data.hidden[i : i + 1][0].float()
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
