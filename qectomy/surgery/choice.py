"""Choose what of a checkpoint goes exactly: the layers whose W_Q each stream lets go, and every layer's verdict."""

import math
from collections.abc import Callable

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.surgery.audit import condition_number
from qectomy.surgery.basis import SINGULAR, Choice, Verdict, claim, read_query, rounding, standing_fold
from qectomy.surgery.streams import Stream, derive_streams, mergeable, structural_verdict

SPENT = 0.1  # rounding times condition beyond which a whole change of basis is not worth W_Q


def choose_folds(
    source: Checkpoint,
    dtype: str | None = None,
    kept: frozenset[int] = frozenset(),
    progress: Callable[[], None] = lambda: None,
) -> Choice:
    """Return what of a checkpoint goes exactly, reading each W_Q twice at most.

    `dtype` is the target's, as safetensors names it; layers in `kept` stay whole. `progress` is called for each layer.
    """
    eps = rounding(dtype or source.dtype)
    choice = Choice(derive_streams(source.dims), eps=min(eps, rounding(source.dtype)), kept=kept)
    choice.merged = mergeable(choice.streams) - kept
    for index, stream in enumerate(choice.streams.streams):
        if stream.queries:
            _choose_in(source, index, stream, choice, eps, progress)
    return choice


def _choose_in(
    source: Checkpoint, index: int, stream: Stream, choice: Choice, eps: float, progress: Callable[[], None]
) -> None:
    """Choose which of the layers that read a stream lose W_Q, and record each one's verdict."""
    dims, best = source.dims, None
    wanted = sorted(set(stream.queries) - choice.kept)
    choice.standing |= {layer for layer in wanted if standing_fold(read_query(source, layer), dims) is not None}
    conditions: dict[int, float] = {}  # of each layer's Θ
    open_to_claims = not choice.standing.intersection(wanted) and not _tie_forbids(source, stream)
    for layer in stream.queries:
        if open_to_claims and layer in wanted:
            fold = claim(source, layer, stream, choice.eps)
            if fold is not None and fold.basis is not None:
                conditions[layer] = fold.condition
                if fold.condition * eps <= SPENT and (best is None or fold.condition < best[0]):
                    best = (fold.condition, layer, fold.basis.orthogonal)
        progress()
    if best is not None:
        choice.claims[index] = best[1]
        choice.untied |= stream.breaks_tie and not best[2]
    for layer in stream.queries:
        choice.verdicts[layer] = _verdict(source, layer, stream, choice, conditions.get(layer), eps)


def _tie_forbids(source: Checkpoint, stream: Stream) -> bool:
    """Whether no claim of a stream keeps the tie: the tied head would have to take in the final norm's gain."""
    dims = source.dims
    if not (dims.norms and dims.tied and (stream.embedded or stream.headed)):
        return False
    gain = source.read(f"{source.family.final_norm}.weight")
    return not bool((gain == gain[0]).all())


def _verdict(
    source: Checkpoint,
    layer: int,
    stream: Stream,
    choice: Choice,
    basis_condition: float | None,
    eps: float,
) -> Verdict:
    dims = source.dims
    how, why = structural_verdict(choice.streams, layer)
    if layer in choice.kept:
        return Verdict("kept", "asked to stay dense")
    if how != "exact" and not choice.folded(layer):
        return Verdict(how, f"{why}, and W_Q is not one" if dims.norms else why)
    condition = condition_number(read_query(source, layer))
    if layer in choice.standing:
        return Verdict("exact", "W_Q is the identity up to each head's gauge and the norm's gain", condition, 1.0)
    if layer in choice.claims.values():
        if dims.norms or (stream.breaks_tie and not choice.untied):
            why = f"W_Q is {stream.group.value}: it passes the {'norm' if dims.norms else 'tie'}"
        return Verdict("exact", why, condition, basis_condition)
    if not condition < min(SINGULAR, 1 / rounding(source.dtype)):
        why = f"W_Q is singular to the precision of its type (condition number {condition:.1e})"
        return Verdict("refused", why, condition, ill=True)
    if standing := sorted(choice.standing.intersection(stream.queries)):
        why = f"its stream stays as it is, for there the W_Q of layer {standing[0]} is the identity already"
        return Verdict("gauge" if not dims.rope else "refused", why, condition)
    if basis_condition is None or basis_condition * eps > SPENT:
        shown = math.inf if basis_condition is None else basis_condition
        why = f"its change of basis has condition number {shown:.1e}, too much for the target dtype"
        why += ": try --dtype float32" if eps > rounding("F32") else ""
        return Verdict("refused", why, condition, basis_condition, ill=True)
    claimed = next(taker for index, taker in choice.claims.items() if choice.streams.streams[index] is stream)
    otherwise = "gauge" if not dims.rope else "refused"
    return Verdict(otherwise, f"its stream's one change of basis is layer {claimed}'s", condition, basis_condition)
