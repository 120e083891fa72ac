"""Fit one layer: from both hidden-state streams to the reduced layer's tensors."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from qectomy.calibrate.at_once import EIGEN_CHANNELS
from qectomy.calibrate.attention_kl import attention_logits
from qectomy.calibrate.hidden_states import Streams, WindowFile, batches, scratch_file
from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.calibrate.maps import fitted_map
from qectomy.calibrate.moments import Moments, MomentSums
from qectomy.calibrate.precision import fast_dtype, fast_math
from qectomy.calibrate.problem import LayerProblem, Projections, QueryKeyParams
from qectomy.calibrate.refine import FitData, RefineSettings, refine
from qectomy.checkpoint.memory import release_freed
from qectomy.distributed.window_shard import WindowShard
from qectomy.models.family import Family
from qectomy.models.linear_views import add_through, read_view, store_views, without_views
from qectomy.models.query_maps import QueryMapSpec


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
    dims, fitted = runner.dims, fitted_map(spec)
    with torch.device("meta"):
        reduced = runner.family.reduced_layer(runner.reduced_config, layer)
        query_module = reduced.get_submodule(runner.family.roles.query_map)
    with _collected(runner, teacher, streams) as (moments, data):
        problem = LayerProblem(dims=dims, rope=runner.rope(), teacher=_projections(runner, tensors), moments=moments)
        if spec.query_map.of_keys or not dims.rope:
            W_K = None if spec.query_map.of_keys else problem.teacher.W_K
            problem = replace(problem, key_moments=attended_moments(data, dims.n_kv_heads, W_K))
        release_freed()
        init = fitted.init if dims.rope else fitted.init_without_rope
        params = init(problem, spec, generator)
        _broadcast_(params, streams.share)
        problem = replace(problem, key_moments=None)  # without what the start alone derived
        release_freed()
        parameters = fitted.preconditioned(params, problem, settings)
        params = refine(params, parameters, query_module, data, settings, generator)
        _broadcast_(params, streams.share)
    return fold(runner.family, base, params)


def fold(family: Family, tensors: dict[str, torch.Tensor], fitted: QueryKeyParams) -> dict[str, torch.Tensor]:
    """Return the layer's tensors with the fit put in: W_Q gone, and the identity's gain and shift in the norm.

    x̂ ⊙ g is what an RMSNorm gives once its gain is γ ⊙ g, x̂ + b what a LayerNorm gives once its shift is β + b; W_K and
    W_V divide by g and read on as before. What b adds to all keys of a head, softmax does not see; what it adds to all
    values, and the value's own bias in a family that stores none, goes through W_O into the output's bias.
    """
    roles = family.roles
    out = without_views(tensors, (roles.query, roles.key, roles.value))
    W_V, b_V = read_view(tensors, roles.value)
    W_K, b_K, W_V = fitted.W_K.double().cpu(), fitted.b_K, W_V.double()
    added = b_V.double() if family.folds_kv_bias and b_V is not None else None
    norm = roles.attention_norm
    if fitted.norm_gain is not None:
        gain = fitted.norm_gain.double().cpu()
        out[f"{norm}.weight"] = (out[f"{norm}.weight"].double() * gain).float()
        W_K, W_V = W_K / gain[:, None], W_V / gain[:, None]
    if fitted.norm_shift is not None:
        assert fitted.norm_gain is None, "a gain would multiply β too"
        assert added is not None
        shift = fitted.norm_shift.double().cpu()
        out[f"{norm}.bias"] = (out[f"{norm}.bias"].double() + shift).float()
        added = added - shift @ W_V
    if added is not None:
        out |= add_through(tensors, roles.output, added)
        b_V = None
    out |= store_views([(roles.reduced_key, (W_K.float(), b_K)), (roles.reduced_value, (W_V.float(), b_V))])
    for name, tensor in fitted.query.items():
        out[f"{roles.query_map}.{name}"] = tensor.float() if tensor.is_floating_point() else tensor
    return {name: tensor.cpu().contiguous() for name, tensor in out.items()}


def _broadcast_(params: QueryKeyParams, share: WindowShard) -> None:
    """Let all processes have the first one's: rounding alone may make another choose other channels."""
    parts = (params.W_K, *params.query.values(), params.b_K, params.norm_gain, params.norm_shift)
    share.processes.broadcast_(*(part for part in parts if part is not None))


@contextmanager
def _collected(runner: LayerRunner, teacher: nn.Module, streams: Streams) -> Iterator[tuple[Moments, FitData]]:
    """Read the fitted windows once: moments, the student's x̂, and the teacher's rotated queries and keys.

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
        data = FitData(
            **stores,
            allowed=runner.causal(teacher),
            scaling=runner.scaling(teacher),
            rotate=runner.rotate,
            share=streams.share,
        )
        yield _collect(runner, teacher, streams, data), data


def _store(
    stack: ExitStack, device: torch.device, streams: Streams, name: str, *shape: int
) -> torch.Tensor | WindowFile:
    """Return room for the fitted windows of one kind."""
    if device.type != "cpu":
        return torch.empty(streams.fitted, *shape, dtype=fast_dtype(device), device=device)
    path = streams.scratch / name
    return stack.enter_context(scratch_file(path, streams.fitted, *shape, dtype=fast_dtype(device)))


def _collect(runner: LayerRunner, teacher: nn.Module, streams: Streams, data: FitData) -> Moments:
    """Fill `data` from the fitted windows; return the moments of x̂."""
    sums = MomentSums(runner.dims.d_model, runner.device)
    for start, stop in batches(0, streams.fitted, streams.batch):
        read, student = (
            runner.read(teacher, states[start:stop].to(runner.device)) for states in (streams.teacher, streams.student)
        )
        sums.add(student, read)
        with fast_math(runner.device):
            query, key = runner.queries_keys(teacher, read)
        data.hidden[start:stop] = student
        data.teacher_query[start:stop] = query
        data.teacher_key[start:stop] = key
    return sums.moments(streams.share.processes)


def attended_moments(
    data: FitData, n_kv_heads: int, W_K: torch.Tensor | None = None, windows: int = 12, stride: int = 8
) -> torch.Tensor:
    """Return E_i Var_p_i(x̂_j), x̂'s covariance under the teacher's attention, for each KV head: (G, D, D) float32.

    With W_K (D, G*K), of that head's keys x̂ W_K instead: (G, K, K).
    """
    (_, context, d_model), n = data.hidden.shape, data.windows.n_fitted
    device = data.allowed.device
    rows = torch.arange(stride - 1, context, stride, device=device)
    width = d_model if W_K is None else W_K.shape[1] // n_kv_heads
    total = torch.zeros(n_kv_heads, width, width, device=device)
    chosen = range(0, n, max(1, n // windows))
    for _, i in data.windows.fitted_here(chosen):
        logits = attention_logits(
            data.teacher_query[i : i + 1][:, :, rows], data.teacher_key[i : i + 1], data.allowed[rows]
        )
        p = logits.float().softmax(-1).view(n_kv_heads, -1, context)  # (G, H/G*R, T)
        hidden = data.hidden[i : i + 1][0].float()
        hidden = hidden - hidden.mean(0)
        keys = None if W_K is None else (hidden @ W_K.float()).chunk(n_kv_heads, 1)
        for g in range(n_kv_heads):
            seen = hidden if keys is None else keys[g]
            mean = p[g] @ seen
            spread = (seen * p[g].sum(0)[:, None]).T @ seen - mean.T @ mean
            total[g] += spread / len(p[g])
    data.windows.processes.all_reduce_(total)
    for own in total:  # one at a time: a float64 copy of all of them would outweigh the layer
        own /= len(chosen)
        least = 1e-3 * own.diagonal().mean()
        if n_kv_heads * width > EIGEN_CHANNELS:
            own.diagonal().add_(least)  # an eigendecomposition for every head would take longer than the fit
            continue
        values, vectors = torch.linalg.eigh(own.double())
        own.copy_((vectors * values.clamp_min(least)) @ vectors.T)
    return total


def _projections(runner: LayerRunner, tensors: dict[str, torch.Tensor]) -> Projections:
    """Return the teacher's query and key. Without RoPE a key's bias is the same for all keys: softmax ignores it."""
    roles = runner.family.roles
    parts = [*read_view(tensors, roles.query), *read_view(tensors, roles.key)]
    W_Q, b_Q, W_K, b_K = (None if part is None else part.to(runner.device).double() for part in parts)
    assert W_Q is not None
    assert W_K is not None
    return Projections(W_Q, b_Q, W_K, b_K if runner.dims.rope else None)
