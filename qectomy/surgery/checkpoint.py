"""Exact folding of a whole checkpoint, a layer at a time: plan what goes, then write what is left.

The plan reads every layer once, to choose which W_Q each stream lets go (`folding.py`) and the pivots of each layer's
gauge (`gauge.py`); the pass reads it again, folds it in float64 and writes it, cast once. Two layers' changes of basis
are in memory beside the layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.finite import all_finite
from qectomy.checkpoint.memory import release_freed
from qectomy.checkpoint.shards import DTYPES, ShardWriter, TensorSpec
from qectomy.checkpoint.sizes import planned_tensors
from qectomy.errors import NonFiniteError, QueryMapError
from qectomy.models.family import Dimensions
from qectomy.models.heads import split_heads
from qectomy.models.linear_views import read_view
from qectomy.models.query_maps import IDENTITY, QueryMapSpec
from qectomy.progress import Progress
from qectomy.surgery.at_once import ROWS_AT_ONCE
from qectomy.surgery.basis import LOST, Choice, Folds, rounding
from qectomy.surgery.choice import choose_folds
from qectomy.surgery.gauge import MAX_PIVOT_CONDITION, choose_pivots, fold_pivots, pivot_rows
from qectomy.surgery.layer import LayerPlan, fold_layer, fold_norm, query_shift, readers_in_basis
from qectomy.surgery.streams import HEAD


@dataclass(frozen=True)
class ExactPlan:
    """What exact folding makes of a checkpoint. Pivots by stored layer; `recipe` has one entry a layer."""

    choice: Choice
    dims: Dimensions  # of the result: untied where a fold breaks the tie
    recipe: tuple[QueryMapSpec, ...]
    pivots: dict[int, torch.Tensor]
    pivot_conditions: dict[int, float]
    left: dict[int, str] = field(default_factory=dict)  # why the heads of a stored layer have no gauge

    def tensors(self, source: Checkpoint, dtype: str | None) -> dict[str, TensorSpec]:
        """Return what is written, by name; `dtype` None keeps each tensor's own type."""
        planned = planned_tensors(replace(source, dims=self.dims), self.recipe, dtype)
        return {name: TensorSpec(info.shape, info.dtype) for name, info in planned.items()}


def plan_exact(
    source: Checkpoint,
    dtype: str | None = None,
    kept: frozenset[int] = frozenset(),
    progress: Progress | None = None,
) -> ExactPlan:
    """Return what goes exactly. Layers in `kept` stay whole; `dtype` is the target's, as safetensors names it.

    Raises QueryMapError naming the layer where a W_Q that could go is singular or too ill-conditioned for the dtype,
    and where nothing would go at all.
    """
    stored = source.dims.n_stored
    steps = iter(range(1, 2 * stored + 1))

    def step(note: str) -> None:
        if progress:
            progress(next(steps), 2 * stored, note)

    choice = choose_folds(source, dtype, kept, lambda: step("conditioning of W_Q"))
    _check_conditions(source, choice)
    folds, eps = Folds(source, choice), rounding(dtype or source.dtype)
    specs, pivots, conditions, left = [], {}, {}, {}
    for layer in range(stored):
        spec, chosen, condition = _gauge_of(source, choice, folds, layer, eps)
        if isinstance(chosen, str):
            left[layer] = chosen
        else:
            pivots[layer], conditions[layer] = chosen, condition
        specs.append(spec)
        step("pivots")
    dims = source.dims
    recipe = tuple(specs[dims.stored_layer(layer)] for layer in range(dims.n_layers))
    plan = ExactPlan(choice, replace(dims, tied=dims.tied and not choice.untied), recipe, pivots, conditions, left)
    after = sum(torch.Size(spec.shape).numel() for spec in plan.tensors(source, dtype).values())
    if after >= source.parameters:
        reasons = "; ".join(sorted({f"{v.how}: {v.reason}" for v in choice.verdicts.values()}))
        raise QueryMapError(f"nothing of this checkpoint goes exactly ({reasons})")
    return plan


def layer_plan(plan: ExactPlan, folds: Folds, layer: int) -> LayerPlan:
    """Return what happens to one stored layer."""
    dims = folds.source.dims
    following = ("attention", layer + 1) if layer + 1 < dims.n_layers else HEAD
    shift = None if following == HEAD or dims.shared_layers else writer_shift(folds, layer + 1)
    return LayerPlan(
        spec=plan.recipe[layer],
        before=folds.basis(("attention", layer)),
        middle=None if plan.recipe[layer].output == "merged" else folds.basis(("mlp", layer)),
        after=folds.basis(following),
        fold=folds.query(layer),
        pivots=plan.pivots.get(layer),
        shift_after=shift,
    )


def writer_shift(folds: Folds, layer: int) -> torch.Tensor | None:
    """Return c (D,) that what writes the state a layer's attention reads must add to it, for the layer's query bias."""
    source, fold = folds.source, folds.query(layer)
    if fold is None or source.dims.norms or not source.dims.absorbs_query_bias:
        return None
    roles = source.family.roles
    b_Q = source.read(f"{source.prefix(layer)}{roles.query.module}.bias", torch.float64)
    index, parts = roles.query.part
    return query_shift(b_Q.chunk(parts)[index], fold, source.dims)


def folding_steps(source: Checkpoint, plan: ExactPlan, dtype: str | None) -> list[Callable[[ShardWriter], None]]:
    """Return what writes the weights that `plan` leaves of `source`, a few at a time.

    They raise NonFiniteError where one does not fit `dtype`.
    """
    specs = plan.tensors(source, dtype)
    return [partial(_write_step, step, specs) for step in _steps(source, plan)]


def _write_step(
    step: Callable[[], Iterator[tuple[str, int, torch.Tensor]]], specs: dict[str, TensorSpec], writer: ShardWriter
) -> None:
    for name, start, rows in step():
        stored = rows.to(DTYPES[specs[name].dtype])
        if not all_finite(stored):
            raise NonFiniteError(f"{name} does not fit in {specs[name].dtype} once folded; use --dtype float32")
        writer.write_rows(name, start, stored)


def folded_tensors(
    source: Checkpoint, plan: ExactPlan, progress: Progress | None = None
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield (name, first row, rows) of every tensor of the folded model, in float64."""
    steps = _steps(source, plan)
    for number, step in enumerate(steps):
        yield from step()
        if progress:
            progress(number + 1, len(steps), "folding")


def _steps(source: Checkpoint, plan: ExactPlan) -> list[Callable[[], Iterator[tuple[str, int, torch.Tensor]]]]:
    """Return what makes the tensors of the embedding, of each stored layer and of the head, in that order."""
    folds = Folds(source, plan.choice)

    def layer_tensors(layer: int) -> Iterator[tuple[str, int, torch.Tensor]]:
        tensors = source.read_layer(layer)
        folded = fold_layer(tensors, source.dims, source.family.roles, layer_plan(plan, folds, layer))
        del tensors
        for name in list(folded):  # what was written is let go
            yield source.prefix(layer) + name, 0, folded.pop(name)
        release_freed()

    layers = [partial(layer_tensors, layer) for layer in range(source.dims.n_stored)]
    return [partial(_embedding, source, folds), *layers, partial(_head, source, folds, plan.dims.tied)]


def _embedding(source: Checkpoint, folds: Folds) -> Iterator[tuple[str, int, torch.Tensor]]:
    family, basis = source.family, folds.basis(("attention", 0))
    for start, rows in _rows(source, family.embedding):
        yield family.embedding, start, rows if basis is None else rows @ basis.theta
    if family.positions is not None:
        shift = writer_shift(folds, 0)
        for start, rows in _rows(source, family.positions):
            rows = rows if basis is None else rows @ basis.theta
            yield family.positions, start, rows if shift is None else rows + shift


def _head(source: Checkpoint, folds: Folds, tied: bool) -> Iterator[tuple[str, int, torch.Tensor]]:
    family, basis = source.family, folds.basis(HEAD)
    norm = source.read_module(family.final_norm, torch.float64) if source.dims.norms else {}
    absorbed = None
    if norm and basis is not None:
        gain, shift, absorbed = fold_norm(norm["weight"], norm.get("bias"), basis, keep=True)
        norm = {"weight": gain} | ({} if shift is None else {"bias": shift})
    for name, tensor in norm.items():
        yield f"{family.final_norm}.{name}", 0, tensor
    if tied:
        return
    for start, rows in _rows(source, family.embedding if source.dims.tied else family.head):
        rows = rows if absorbed is None else rows * absorbed
        yield family.head, start, rows if basis is None else rows @ basis.inverse.mT


def _rows(source: Checkpoint, name: str) -> Iterator[tuple[int, torch.Tensor]]:
    n_rows = source.tensors[name].shape[0]
    for start in range(0, n_rows, ROWS_AT_ONCE):
        yield start, source.read_rows(name, start, min(start + ROWS_AT_ONCE, n_rows), torch.float64)


def _check_conditions(source: Checkpoint, choice: Choice) -> None:
    """Raise QueryMapError where a stream could let a W_Q go and none of its layers' is fit to, naming all of them."""
    if source.dims.norms:
        return
    refused: list[int] = []
    for stream in choice.streams.streams:
        if not any(choice.folded(layer) for layer in stream.queries):
            refused += [layer for layer in stream.queries if choice.verdicts[layer].ill]
    if not refused:
        return
    reasons = "; ".join(f"layer {layer}: {choice.verdicts[layer].reason}" for layer in sorted(refused))
    if not source.dims.shared_layers:
        them, kept = "it" if len(refused) == 1 else "them", choice.kept | set(refused)
        reasons += f". To fold the others, leave {them} whole: --query {_leaving(kept, source.dims.n_layers)}"
    raise QueryMapError(reasons)


def _leaving(kept: frozenset[int], n_layers: int) -> str:
    """Return the recipe that leaves some layers dense."""
    runs: list[tuple[str, list[int]]] = []
    for layer in range(n_layers):
        name = "dense" if layer in kept else "exact"
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(layer)
    return ",".join(f"{run[0]}-{run[-1]}={name}" if len(run) > 1 else f"{run[0]}={name}" for name, run in runs)


def _gauge_of(
    source: Checkpoint, choice: Choice, folds: Folds, layer: int, eps: float
) -> tuple[QueryMapSpec, torch.Tensor | str, float]:
    """Return what a layer stores, its gauge's pivots, or why it has none, and their condition number."""
    dims = source.dims
    output = "merged" if layer in choice.merged else "dense"
    query = IDENTITY if choice.folded(layer) else "dense"
    if layer in choice.kept or not dims.gauge_pays:
        why = "asked to stay dense" if layer in choice.kept else "a gauge of its heads saves nothing"
        return QueryMapSpec(query, output=output), why, 0.0
    before, middle = folds.basis(("attention", layer)), folds.basis(("mlp", layer))
    plan = LayerPlan(spec=QueryMapSpec("dense"), before=before, fold=folds.query(layer))
    tensors = source.read_layer(layer)
    W_Q, W_V = readers_in_basis(tensors, dims, source.family.roles, plan)
    gauged = [W_V] if dims.rope or query == IDENTITY else [W_Q, W_V]
    blocks = torch.cat([split_heads(W, dims.d_head) for W in gauged])
    pivots, condition = choose_pivots(blocks)
    if condition > MAX_PIVOT_CONDITION:
        return QueryMapSpec(query, output=output), "a head of it has no full rank", condition
    strain = condition
    if before is not None or middle is not None:  # W[P] goes into W_O, or W_K, which the basis multiplies once more
        bases = max(choice.condition(("attention", layer)), choice.condition(("mlp", layer)))
        strain = float(torch.linalg.cond(pivot_rows(blocks, pivots)).max()) * bases
    if len(gauged) == 2:
        strain *= _bias_strain(W_Q, read_view(tensors, source.family.roles.query)[1], pivots[: dims.n_heads])
    if strain * eps > LOST:
        why = f"with its basis and bias a gauge has condition number {strain:.1e}, too much for the target dtype"
        return QueryMapSpec(query, output=output), why, condition
    query = "gauge" if len(gauged) == 2 else query
    return QueryMapSpec(query, value="gauge", output=output), pivots, condition


def _bias_strain(W_Q: torch.Tensor, b_Q: torch.Tensor | None, pivots: torch.Tensor) -> float:
    """Return how much larger b_Q W[P]⁻¹ is than W W[P]⁻¹, 1 at least: a head that hardly reads makes it huge."""
    if b_Q is None:
        return 1.0
    blocks = split_heads(W_Q, pivots.shape[1])
    rest, inverse = fold_pivots(blocks, pivots)
    bias = torch.linalg.solve(inverse, b_Q.double().view(len(blocks), 1, -1), left=False)
    size = (rest.square().sum((1, 2)) + pivots.shape[1]).sqrt()  # of all of W A, its identity block too
    return max(1.0, float((bias.square().sum((1, 2)).sqrt() / size).max()))
