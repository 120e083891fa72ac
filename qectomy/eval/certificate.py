"""A certificate that a reduced checkpoint is its original, exactly, or a statement of where it is not.

Three kinds of evidence, which do not lean on each other:
    proof      the streams of the original say which folds are exact; each is made anew from the original in float64,
               and every stored tensor must be what comes out, cast once
    bound      a product of a writer and a reader of a stream in a basis of condition κ moves by at most 2 eps κ of its
               factors' norms when both are rounded to a dtype of spacing eps
    measure    both models run on text, in float64 and in the stored dtype: what each layer's W_down reads, which no
               exact fold changes, and the logits
"""

from collections import defaultdict
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import Checkpoint, differing_sizes
from qectomy.checkpoint.config_files import DROPPED, VARIANT, has_model_code, load_config
from qectomy.checkpoint.headers import TORCH_NAMES
from qectomy.errors import CheckpointError, clean, shown
from qectomy.eval.at_once import SAMPLED, SAMPLED_WINDOWS
from qectomy.eval.layerwise_model import StreamedModel, random_tokens, relative_logit_error, score_streamed
from qectomy.eval.metrics import cost
from qectomy.eval.protocol import ScoringWindows
from qectomy.models.heads import split_heads
from qectomy.models.query_maps import IDENTITY, ranges
from qectomy.progress import Progress
from qectomy.record.base import read_record
from qectomy.record.reduced import Written
from qectomy.surgery.basis import Choice, Folds, Verdict, claim, read_query, rounding, standing_fold, usable_error
from qectomy.surgery.checkpoint import ExactPlan, folded_tensors, layer_plan
from qectomy.surgery.gauge import pivot_condition
from qectomy.surgery.layer import readers_in_basis
from qectomy.surgery.streams import HEAD, Place, derive_streams, mergeable

SLACK = 1e-9  # of a tensor's largest entry: float64 rounding, amplified by the condition of a fold
MARGIN = 10.0  # by how much the measured error of the logits may exceed the sum of the layers' bounds
EXACT_MAPS = (IDENTITY, "gauge", "dense")  # query maps that exact folding leaves


def verify(
    reduced: Checkpoint, original: Checkpoint, held: ScoringWindows | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Return the certificate; its `verdict` is `exact`, `not exact` (fitted, as declared) or `failed`, with `reasons`.

    `held`: text to measure on; without one, random tokens. Raises CheckpointError for two checkpoints that are not one
    model but for what qectomy changes.
    """
    wrong = _same_model(reduced, original)
    plan, fitted = _plan_of(reduced, original)
    deviations = {} if plan is None else _deviations(reduced, original, plan, progress)
    wrong += [f"{name} is in no exact fold" for name in reduced.tensors if plan and name not in deviations]
    if reduced.dims.tied and not original.dims.tied:
        wrong.append("embedding and head are tied, which the original's are not")
    as_written = _as_written(reduced) if fitted else {}
    wrong += [
        f"{name} was changed since it was fitted: qectomy.json has another sha256"
        for name, same in as_written.items()
        if not same
    ]
    wrong += [f"{name} is {units:.3g} roundings from the exact one" for name, units in deviations.items() if units > 1]
    if wrong and not (reduced.folder / "qectomy.json").is_file():
        wrong.append(
            "it holds no qectomy.json: if it was saved anew after loading, its gauges were written out, in other "
            "coordinates than the original's; verify the folder that convert wrote"
        )
    layers = _layer_records(reduced, original, plan, deviations)
    measured = measure(reduced, original, held, layers)
    bound = None if plan is None else sum(record["bound"] for record in layers)
    error, eps = measured["float64"]["logit_error"], rounding(reduced.dtype)
    most = usable_error(reduced.dtype)
    if bound is not None and not error <= min(most, MARGIN * max(bound, eps)):
        wrong.append(
            f"logits in float64 are off by {error:.1e} of the largest; rounding is bound by {bound:.1e} here, and "
            f"{most:.0e} is the most that {TORCH_NAMES[reduced.dtype]} excuses"
        )
    return {
        "reduced": str(reduced.folder),
        "original": str(original.folder),
        "verdict": "failed" if wrong else "not exact" if fitted else "exact",
        "reasons": [*wrong, *fitted],
        "tensors_proved": sum(units <= 1 for units in deviations.values()),
        "tensors_as_written": sum(as_written.values()) if as_written else None,
        "tensors": len(reduced.tensors),
        "dtype": TORCH_NAMES[reduced.dtype],
        "code_as_shipped": has_model_code(reduced.family, reduced.folder),  # which is what was run here
        "channel_numbers_told": reduced.indices_told,  # in config.json, so that loading notices other ones
        "bound": bound,
        **measured,
        "layers": layers,
    }


def _as_written(reduced: Checkpoint) -> dict[str, bool]:
    """Return whether each tensor is the one of which qectomy.json has the sha256; nothing where it has none."""
    report = reduced.folder / "qectomy.json"
    digests = read_record(report, Written).tensors_sha256 if report.is_file() else None
    return {} if digests is None else {name: digests.get(name) == reduced.digest(name) for name in reduced.tensors}


def measure(
    reduced: Checkpoint, original: Checkpoint, held: ScoringWindows | None, layers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Run both models in float64 and in the stored dtype; record each layer's error, return the logits'."""
    tokens = held.tokens if held else random_tokens(original.dims)
    text = held.report.as_dict() if held else {"text": "random tokens", "tokens": tokens.numel()}
    result: dict[str, Any] = {"text": text}
    for dtype in dict.fromkeys(("float64", TORCH_NAMES[reduced.dtype])):
        theirs, ours = (StreamedModel(checkpoint, getattr(torch, dtype)) for checkpoint in (original, reduced))
        (their_states, their_acts), (our_states, our_acts) = _sampled(theirs, tokens), _sampled(ours, tokens)
        for record, a, b in zip(layers, their_acts, our_acts, strict=True):
            record[f"error_{dtype}"] = float((a - b).abs().max() / a.abs().max())
        result[dtype] = {"logit_error": relative_logit_error(their_states, our_states, theirs, ours)}
        if held is not None and dtype == TORCH_NAMES[reduced.dtype]:
            before, after = score_streamed([theirs, ours], held)
            found = cost(before, after, held)
            result[dtype] |= {"ratio": found.perplexity.ratio, "kl": found.kl, "top1_agreement": found.top1_agreement}
    return result


def _sampled(model: StreamedModel, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return the last states (n, D) and what each layer's W_down reads, (n, M), at positions spread over the tokens."""
    tokens = tokens[:SAMPLED_WINDOWS]
    chosen = torch.linspace(0, tokens.numel() - 1, min(SAMPLED, tokens.numel())).long()
    acts: list[torch.Tensor] = []
    states = model.states(tokens, lambda read: acts.append(read.flatten(0, 1)[chosen]))
    return states.flatten(0, 1)[chosen], acts


def _same_model(reduced: Checkpoint, original: Checkpoint) -> list[str]:
    """Return the config fields that differ. Raises CheckpointError for another family or other sizes."""
    if reduced.family.model_type != original.family.model_type:
        raise CheckpointError(
            f"{reduced.folder} is of the family {reduced.family.model_type}, {original.folder} of "
            f"{original.family.model_type}: one cannot come from the other"
        )
    if sizes := differing_sizes(reduced, original):
        raise CheckpointError(f"{reduced.folder} cannot come from {original.folder}: they differ in {sizes}")
    # Both as the reduced class reads them, so that a field left out is its default.
    said, found = (load_config(c.family, c.config, reduced=True).to_dict() for c in (original, reduced))
    names = sorted(set(said) - ({*DROPPED, "dtype", "model_type", "tie_word_embeddings"} - set(VARIANT)))
    return [
        f"config.json: {clean(key)} is {shown(found.get(key))}, not {shown(said[key])}"
        for key in names
        if found.get(key) != said[key]
    ]


def _plan_of(reduced: Checkpoint, original: Checkpoint) -> tuple[ExactPlan | None, list[str]]:
    """Return the exact plan that a reduced checkpoint amounts to; or None, and why parts of it are not exact."""
    dims, roles, why = original.dims, original.family.roles, defaultdict[str, list[int]](list)
    eps = min(rounding(original.dtype), rounding(reduced.dtype))
    choice, pivots = Choice(derive_streams(dims), eps), {}
    choice.untied = dims.tied and not reduced.dims.tied
    for layer in range(dims.n_stored):
        spec = reduced.recipe[layer]
        if spec.name not in EXACT_MAPS:
            why[f"fitted ({spec})"].append(layer)
        if spec.name == IDENTITY:
            reason = _claimed(original, layer, choice)
            if reason is not None:
                why[reason].append(layer)
        if spec.output == "merged":
            choice.merged.add(layer)
        if spec.gauged:
            pivots[layer] = reduced.read(f"{reduced.prefix(layer)}{roles.gauge}.pivots").long()
    if wrongly := sorted(choice.merged - mergeable(choice.streams)):
        why["W_O cannot be merged exactly"] += wrongly
    if why:
        return None, [f"layer {ranges(layers)}: {reason}" for reason, layers in why.items()]
    folds, conditions = Folds(original, choice), dict[int, float]()
    plan = ExactPlan(choice, reduced.dims, reduced.recipe, pivots, conditions)
    for layer, chosen in pivots.items():
        W_Q, W_V = readers_in_basis(original.read_layer(layer), dims, roles, layer_plan(plan, folds, layer))
        spec = reduced.recipe[layer]
        gauged = [W for W, role in ((W_Q, "query"), (W_V, "value")) if role in spec.gauged]
        conditions[layer] = pivot_condition(torch.cat([split_heads(W, dims.d_head) for W in gauged]), chosen)
    return plan, []


def _claimed(original: Checkpoint, layer: int, choice: Choice) -> str | None:
    """Enter a layer whose queries are slices of x̂ into the choice; return why that is not exact, if it is not."""
    if standing_fold(read_query(original, layer), original.dims) is not None:
        choice.standing.add(layer)
        return None
    index = choice.streams.of(("attention", layer))
    stream = choice.streams.streams[index]
    if index in choice.claims:
        return f"its stream's one change of basis is layer {choice.claims[index]}'s"
    if choice.standing.intersection(stream.queries):
        return "its stream stays as it is, for another layer's W_Q is the identity there already"
    fold = claim(original, layer, stream, choice.eps)
    if fold is None:
        return f"fitted (identity): {stream.why} lets only {stream.group.value} pass"
    choice.claims[index] = layer
    choice.verdicts[layer] = Verdict("exact", stream.why, basis_condition=fold.condition)
    return None


def _deviations(
    reduced: Checkpoint, original: Checkpoint, plan: ExactPlan, progress: Progress | None
) -> dict[str, float]:
    """Return, by name, how far each stored tensor is from the exact one in units of what rounding allows."""
    worst: dict[str, float] = {}
    for name, start, exact in folded_tensors(original, plan, progress):
        stored = reduced.read_rows(name, start, start + len(exact))
        if not stored.is_floating_point():
            units = 0.0 if torch.equal(stored, exact.to(stored.dtype)) else float("inf")
        else:
            eps = rounding(reduced.tensors[name].dtype)
            step = torch.finfo(stored.dtype).smallest_normal * eps  # of numbers too small for the type's exponents
            allowed = eps * exact.abs() + SLACK * exact.abs().max() + step
            units = float(((stored.double() - exact).abs() / allowed).max())
        worst[name] = max(worst.get(name, 0.0), units)
    return worst


def _layer_records(
    reduced: Checkpoint, original: Checkpoint, plan: ExactPlan | None, deviations: dict[str, float]
) -> list[dict[str, Any]]:
    """Return what was done to each layer, the condition it rests on, its bound and its tensors' deviation."""
    records, eps, dims = [], rounding(reduced.dtype), original.dims
    for index, spec in enumerate(reduced.recipe):
        prefix = reduced.prefix(index)
        units = [units for name, units in deviations.items() if name.startswith(prefix)]
        condition = None if plan is None else _condition(plan, dims.stored_layer(index), dims.n_layers)
        records.append(
            {
                "index": index,
                "map": str(spec),
                "value_map": spec.value,
                "output_map": spec.output,
                "condition": condition,
                "bound": None if condition is None else 2 * eps * condition,
                "roundings": max(units) if units else None,
            }
        )
    return records


def _condition(plan: ExactPlan, layer: int, n_layers: int) -> float:
    """Return κ of a stored layer: of its worst stream's basis, times that of its pivots."""
    places: list[Place] = [("attention", layer), ("mlp", layer)]
    places.append(("attention", layer + 1) if layer + 1 < n_layers else HEAD)
    return max(map(plan.choice.condition, places)) * max(1.0, plan.pivot_conditions.get(layer, 1.0))
