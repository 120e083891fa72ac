"""How long each stage of a conversion takes: what the probe timed, times how often the conversion does it.

Stages have the names under which the conversion's own report gives their seconds. Torch is not loaded.
Dimensions: D d_model, M d_mlp, Q n_heads * d_head, S n_kv_heads * d_head, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.sizes import totals
from qectomy.conversion.forecast import costs
from qectomy.conversion.forecast.work import (
    EIGEN_CHANNELS,
    GENERATED,
    JOINT_STEPS,
    MOST_GENERATING,
    RELOAD_TOKENS,
    SLICE,
    Work,
)
from qectomy.models.query_maps import QueryMapSpec

if TYPE_CHECKING:
    from qectomy.conversion.forecast.timer import Speeds

IMPORTS = 5.0  # seconds in which a new process has torch and transformers loaded, where they were loaded before
TOKENIZER, MODEL = 0.8, 0.3  # of those seconds: what loading a tokenizer and a model's class imports besides
PAGE = 3.0  # the report, its page and the sample of tokens
TOKENS_A_SECOND = 300_000  # of text that a tokenizer makes
ROW = 2e-5  # seconds of opening a file for one row of the embedding
CAST = 2e-10  # seconds of a byte that is cast and looked through


def stage_seconds(
    source: Checkpoint, work: Work, speeds: Speeds, dtype: str | None = None, imports: float | None = None
) -> dict[str, float]:
    """Return {stage: seconds}; `imports` are those that loading the libraries took, if that was seen."""
    written = totals(source, work.recipe, dtype)["bytes"]["after"]
    started = IMPORTS if imports is None else imports
    stages = {
        "start": started,
        "text": TOKENIZER * started + work.windows * work.context / TOKENS_A_SECOND,
        "hashing": source.nbytes * speeds.checkpoint.hash + MODEL * started,
        "embedding": _embedding(work, speeds),
        "reading": 0.0,
        "forward": 0.0,
        "fitting": 0.0,
        "measuring": 0.0,
        "refitting": 0.0,
        "writing": 0.0,
        "keeping": (work.dims.n_layers + 1) * 2 * work.windows * speeds.pieces["states kept"] / _windows(work),
    }
    for spec, drifted in zip(work.recipe, work.drifting, strict=True):
        for stage, seconds in layer_seconds(work, speeds, spec, drifted).items():
            stages[stage] += seconds
    stages["scores"] = _scores(work, speeds)
    stages["reload"] = _reload(source, work, speeds, written, started)
    return stages | {"page": PAGE}


def layer_seconds(work: Work, speeds: Speeds, spec: QueryMapSpec, drifted: bool) -> dict[str, float]:
    """Return {stage: seconds} of one layer."""
    took, read = speeds.pieces, speeds.checkpoint.read
    stored = 4 * work.reduced[spec] * CAST
    student = 1.0 if spec.name == "dense" else _without_query(work)
    fitted, held = work.fitted_batches, work.held_batches
    found = {
        "reading": work.layer * work.read_itemsize * read,
        "forward": (1 + student) * (fitted * took["fast layer"] + held * took["layer"])
        + (3 * fitted + 2 * held) * took["states written"]
        + 2 * (fitted + held) * took["states read"],
        "fitting": 0.0 if spec.name == "dense" else fit_seconds(work, speeds, spec),
        "measuring": stored + (0.0 if spec.name == "dense" else work.kl_windows * took["KL of a window"]),
        "writing": 2 * stored + work.written_itemsize * work.reduced[spec] * (speeds.checkpoint.hash + CAST),
    }
    n = min(work.dims.d_model, work.n_query)
    longer = max(work.dims.d_model, work.n_query) / n
    found["writing"] += took["singular values"] * costs.cube(n) * longer
    found["refitting"] = refit_seconds(work, speeds, student) if drifted else 0.0
    return found


def fit_seconds(work: Work, speeds: Speeds, spec: QueryMapSpec) -> float:
    """Seconds of one layer's fit: what it looks at, its start, and Adam."""
    took, dims = speeds.pieces, work.dims
    d_model = dims.d_model
    seconds = work.fitted_batches * (took["collecting"] + 2 * took["states read"] + 2 * took["states written"])
    if "attended window" in took:
        seconds += work.attended * took["attended window"]
        width = d_model if spec.name == "key-shared" else dims.d_head
        if dims.n_kv_heads * width <= EIGEN_CHANNELS:
            seconds += dims.n_kv_heads * took["eigenvectors in float64"] * costs.cube(width)
    seconds += took["ridge regression"] * (costs.solve(d_model, work.n_query) + costs.solve(d_model, work.n_key))
    seconds += took["eigenvectors"] * costs.cube(d_model)  # the basis in which W_K moves
    if spec.name == "key-shared":
        seconds += JOINT_STEPS * took["joint step"] + took["eigenvectors"] * costs.cube(d_model)
        seconds += speeds.product * costs.joint_turn(dims)
    else:
        seconds += took[f"start of {spec}"]
    return seconds + work.refine_steps * took[f"refine step of {spec}"]


def refit_seconds(work: Work, speeds: Speeds, student: float) -> float:
    """Seconds of one layer's refit: W_O, then W_down, and in a turned stream the MLP's readers between them."""
    took, d_model = speeds.pieces, work.dims.d_model
    batch = took["fast attention"] + student * took["fast layer"] + 2 * took["states read"]
    seconds = work.fitted_batches * (batch + took["Gram of W_O"] + took["Gram of W_down"] + 2 * took["states read"])
    unknowns = [(work.n_query, d_model), (work.dims.d_mlp, d_model)]
    if work.turned:
        seconds += work.fitted_batches * (took["fast attention"] + took["collecting"])
        unknowns.append((d_model, d_model))
        seconds += 2 * speeds.product * work.mlp_readers * d_model**2 * work.dims.d_mlp  # in float64
    return seconds + took["ridge regression"] * sum(costs.solve(*each) for each in unknowns)


def _without_query(work: Work) -> float:
    """A reduced layer's work over a stock one's."""
    sizes = work.dims, work.mlp_readers, work.batch_tokens, work.context
    return costs.layer(*sizes, with_query=False) / costs.layer(*sizes)


def _windows(work: Work) -> int:
    """Windows of the batch whose states were timed."""
    return work.batch_tokens // work.context


def _embedding(work: Work, speeds: Speeds) -> float:
    """All rows read, twice, and written; both models' states; where the stream is turned, rows times Θ in float64."""
    rows = work.outside * (2 * speeds.checkpoint.read + speeds.checkpoint.hash + 4 * CAST)
    states = 2 * work.windows * (speeds.pieces["states written"] + speeds.pieces["states read"]) / _windows(work)
    turned = 3 * work.dims.vocab_size * work.dims.d_model**2 + 4 * work.dims.d_model**3
    return rows + states + (2 * speeds.product * turned if work.turned else 0.0)


def _scores(work: Work, speeds: Speeds) -> float:
    """Slices of both models' logits; each batch reads both heads anew."""
    vocab, d_model = work.dims.vocab_size, work.dims.d_model
    head = work.read_itemsize * vocab * d_model * speeds.checkpoint.read
    return work.score_batches * (math.ceil(vocab / SLICE) * speeds.pieces["slice of scores"] + 2 * head)


def _reload(source: Checkpoint, work: Work, speeds: Speeds, written: int, started: float) -> float:
    """The shards hashed; a new process that runs a window through all layers; and small models, both, write."""
    dims, took = work.dims, speeds.pieces
    head = dims.vocab_size * dims.d_model
    window = dims.n_layers * took["layer"] / _windows(work) + min(work.context, dims.vocab_size) * ROW
    window += RELOAD_TOKENS * head * speeds.product + written * (speeds.checkpoint.read + 4 * CAST)
    seconds = written * speeds.checkpoint.hash + (1 + MODEL) * started + window
    if max(source.nbytes, written) <= MOST_GENERATING:
        a_token = dims.n_layers * took["layer of one token"] + head * took["layer of one token"] / work.layer
        seconds += 2 * GENERATED * a_token + (TOKENIZER + MODEL) * started
    return seconds
