"""What the other commands that pass over a checkpoint hold at their worst moment, stage by stage. Torch is not loaded.

All of them keep a layer as it is stored and widen one projection at a time. Bytes as in `memory.py`, libraries not
counted there either: `largest` adds them.
Dimensions: D d_model, M d_mlp, Q n_heads * d_head, S n_kv_heads * d_head, T context, V vocabulary.
"""

from qectomy.conversion.forecast.memory import KERNELS, LIBRARIES, MLP_A_TOKEN, SLICE_COPIES, SVD
from qectomy.conversion.forecast.work import Work
from qectomy.eval.at_once import (
    RELOAD_TOKENS,
    ROWS_A_HEAD,
    SAMPLED,
    SAMPLED_WINDOWS,
    SLICE,
    STATES_BYTES,
    STREAMED_TOKENS,
)
from qectomy.surgery.at_once import ROWS_AT_ONCE

RESIDUALS = 3  # arrays of D a token in an MLP: what enters the layer and it, and that normed
SQUARES = 6  # arrays of W_Q's size while it is seen whether it can go: W, its columns, their Gram, what it is off by


def largest(stages: dict[str, int]) -> tuple[int, str]:
    """Return the largest resident set in bytes, libraries counted, and its stage."""
    worst = max(stages, key=lambda stage: stages[stage])
    return stages[worst] + LIBRARIES + KERNELS, worst


def exact(work: Work) -> dict[str, int]:
    """Return {stage: bytes} of `convert --query exact` where norms let no change of basis pass: W_V's gauge alone."""
    dims, stored = work.dims, work.read_itemsize * work.layer
    query, key = dims.d_model * work.n_query, dims.d_model * work.n_key
    attention = 8 * (2 * query + 2 * key)  # W_Q, W_K, W_V and W_O in float64
    mlp = 0 if dims.norms else 8 * (work.mlp_readers + 1) * dims.d_model * dims.d_mlp * 2  # and what they become
    basis = 0 if dims.norms else 8 * 2 * 2 * dims.d_model**2  # two layers' changes of basis, and their inverses
    solving = 0 if dims.norms else 8 * SVD * dims.d_model**2
    return {
        "choosing": 8 * SQUARES * query + solving,
        "pivots": stored + basis + attention + 8 * 4 * key,
        "folding": stored + basis + attention + mlp + 8 * 2 * (query + key),
        "embedding": basis + 8 * 3 * ROWS_AT_ONCE * dims.d_model,
        "measuring": _streamed(work, 8, work.context, work.context),
    }


def materialize(work: Work) -> dict[str, int]:
    """Return {stage: bytes} of `materialize`: what lies outside the layers is read whole; W_Q is made on the basis."""
    dims, query = work.dims, work.dims.d_model * work.n_query
    largest_outside = work.read_itemsize * dims.vocab_size * dims.d_model
    inputs = 8 * (dims.d_model**2 + dims.d_model * work.n_key)
    making = 8 * 4 * query  # each head's key, the rows, their difference to that of 0, and laid out as it is stored
    return {
        "outside the layers": largest_outside,
        "layers": work.written_itemsize * max(work.reduced.values()) + inputs + making,
    }


def verify(work: Work) -> dict[str, int]:
    """Return {stage: bytes} of `verify`; what each layer's W_down reads is kept of both models, at a few positions."""
    dims = work.dims
    sampled = 2 * 8 * SAMPLED * dims.d_mlp * dims.n_layers
    tokens = SAMPLED_WINDOWS * work.context
    return {
        "proving": exact(work)["folding"] + 8 * 3 * work.largest,
        "in float64": sampled + _streamed(work, 8, tokens, tokens),
        "scoring": streamed_eval(work)["layers"],
    }


def streamed_eval(work: Work) -> dict[str, int]:
    """Return {stage: bytes} of `eval --streamed` with a reference."""
    tokens = work.held * work.context
    states = min(STATES_BYTES, 4 * tokens * work.dims.d_model)
    scored = min(ROWS_A_HEAD, tokens)
    slices = 4 * SLICE_COPIES * scored * SLICE + 2 * (4 + work.read_itemsize) * SLICE * work.dims.d_model
    batch = min(STREAMED_TOKENS, tokens)
    return {
        "layers": states + _streamed(work, 4, tokens=min(tokens, STATES_BYTES // (4 * work.dims.d_model)), batch=batch),
        "head": 3 * states + slices,
    }


def _streamed(work: Work, itemsize: int, tokens: int, batch: int) -> int:
    """A layer as it is stored, the states, and a batch in its MLP: before W_down, or in it, which is wide then.

    Or at the end a few rows of logits.
    """
    dims = work.dims
    inside = max(MLP_A_TOKEN * dims.d_mlp * batch, dims.d_mlp * batch + work.largest)
    layer = work.read_itemsize * work.layer + itemsize * (RESIDUALS * dims.d_model * batch + inside)
    logits = itemsize * RELOAD_TOKENS * dims.vocab_size
    return itemsize * tokens * dims.d_model + max(layer, logits)
