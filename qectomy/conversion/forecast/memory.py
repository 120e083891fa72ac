"""How many bytes a conversion holds at the worst moment of each stage, from sizes alone. Torch is not loaded.

Each function counts what `layer_pass.py` and what it calls keep at one moment. Entries are 4 bytes (float32) or 8
(float64). Libraries and the kernels that they compile come on top.
Dimensions: D d_model, M d_mlp, Q n_heads * d_head, S n_kv_heads * d_head, G n_kv_heads, T context.
"""

import math

from qectomy.calibrate.at_once import BLOCK_LOGITS, COLUMNS, EIGEN_CHANNELS
from qectomy.conversion.at_once import SCORED_TOKENS
from qectomy.conversion.forecast.work import Work
from qectomy.eval.at_once import RELOAD_TOKENS, SLICE
from qectomy.models.family import Dimensions
from qectomy.models.query_maps import QueryMapSpec

LIBRARIES = 400_000_000  # Python, torch, transformers and a tokenizer, loaded (docs/SCALE.md)
KERNELS = 120_000_000  # code that a conversion compiles, and what its heap keeps in small pieces (docs/SCALE.md)
EIGH = 3  # matrices beside its argument: the vectors, and two of work
SVD = 6  # the copy of its argument, both sides of vectors, and the work of three
ADAM = 10  # arrays of a parameter's size: origin, u, two moments, value, two gradients, the move, mean and scale
BLOCK_COPIES = 6  # arrays of a block of logits in the attention KL
SLICE_COPIES = 6  # arrays of a slice of logits in the scores
STREAMS_A_TOKEN = 6  # arrays of D a token while a layer runs
MLP_A_TOKEN = 3  # arrays of M a token in a gated MLP: gate, up and their product
FULL_TURNS = 4  # arrays of W_Q's size while `select` and `identity` turn its pairs


def peak(work: Work) -> tuple[int, str, dict[str, int]]:
    """Return the largest resident set in bytes, the stage in which it falls, and every stage's own."""
    stages = {stage: n_bytes + LIBRARIES + KERNELS for stage, n_bytes in held_by_stage(work).items()}
    worst = max(stages, key=lambda stage: stages[stage])
    return stages[worst], worst, stages


def held_by_stage(work: Work) -> dict[str, int]:
    """Return {stage: bytes held at its worst moment}, the libraries not counted; a recipe's worst layer counts."""
    found = {"embedding": _embedding(work), "scores": _scores(work), "reload": _reload(work)}
    for spec, drifted in dict.fromkeys(zip(work.recipe, work.drifting, strict=True)):
        for stage, n_bytes in layer_stages(work, spec, drifted).items():
            found[stage] = max(found.get(stage, 0), n_bytes)
    always = 16 * work.windows * work.context  # token ids, twice
    if work.turned:
        always += 8 * work.dims.d_model**2  # Θ
    return {stage: n_bytes + always for stage, n_bytes in found.items()}


def layer_stages(work: Work, spec: QueryMapSpec, drifted: bool = True) -> dict[str, int]:
    """Return {stage: bytes} of one layer of a query map."""
    teacher = 4 * work.layer * (2 if work.turned else 1)  # turned: the first layer that is fitted is another one
    stages = {"reading": _reading(work), "teacher": teacher + batch_bytes(work) + _fast_weights(work)}
    if spec.name != "dense":
        projections = 8 * work.dims.d_model * (work.n_query + work.n_key)  # the teacher's W_Q and W_K
        fitting = teacher + projections + _resident(work)
        stages["collecting"] = fitting + _collecting(work)
        if spec.query_map.of_keys:
            stages["attended moments"] = fitting + _attended(work)
        stages["start"] = fitting + _start(work, spec)
        stages["refining"] = fitting + _refining(work, spec)
    stored = 4 * work.reduced[spec] * (work.written_itemsize < 4)  # rounded, and wide again; else no copy is made
    stages["measuring"] = teacher + 8 * work.dims.d_model * work.n_key + stored + _measuring(work)
    student = 4 * work.reduced[spec]
    if drifted:
        stages["refitting"] = student + _refitting(work)
    stages["writing"] = student + stored + _writing(work)
    return stages


def host_peak(work: Work) -> int:
    """Return the largest resident set of a process that computes on an accelerator, whose driver is not counted.

    The layer as it was read, its reduced one as it comes from there, and that rounded; two states of each window pass.
    """
    passing = 2 * 4 * work.batch_tokens * work.dims.d_model
    return LIBRARIES + KERNELS + 4 * work.layer + 2 * 4 * max(work.reduced.values()) + passing


def _resident(work: Work) -> int:
    """What the fit looks at, which lies in files where the processor computes."""
    a_token = work.dims.d_model + work.n_query + work.n_key
    return work.fast_itemsize * work.fitted * work.context * a_token * work.on_device


def _block(work: Work, logits: int) -> int:
    """Entries of logits that are made at a time; an accelerator makes all."""
    return logits if work.on_device else min(BLOCK_LOGITS, logits)


def batch_bytes(work: Work, itemsize: int = 4) -> int:
    """Return the bytes of what a layer computes of a batch, all of it float32 by default."""
    streams, heads = STREAMS_A_TOKEN * work.dims.d_model, 2 * (work.n_query + work.n_key)
    mlp = (MLP_A_TOKEN if work.mlp_readers > 1 else 2) * work.dims.d_mlp
    return work.batch_tokens * (4 * streams + itemsize * (heads + mlp))


def _fast_weights(work: Work) -> int:
    """A projection cast to the fast type for each product, and as the kernel lays it out."""
    return 2 * work.fast_itemsize * work.largest * (work.fast_itemsize < 4)


def _embedding(work: Work) -> int:
    """A few rows at a time, the batch's states; where the stream is turned, the basis while it is drawn, by QR."""
    d_model = work.dims.d_model
    drawn = 8 * 5 * d_model**2 if work.turned else 0  # Θ of ones, the draw, its factors, and their product
    rows = 4 * 4_000_000 + 4 * 4 * work.batch_tokens * d_model
    return max(drawn, rows)


def _reading(work: Work) -> int:
    """The layer in float32 and one tensor as it is stored; where it is turned, the old one too, and the first twice."""
    if not work.turned:
        return 4 * work.layer + work.read_itemsize * work.largest * (work.read_itemsize < 4)
    return 3 * 4 * work.layer + _turning(work)


def _turning(work: Work) -> int:
    """The turn with a gain in it, and one tensor in float64 before and after."""
    return 16 * work.dims.d_model**2 + 2 * 8 * work.largest


def _collecting(work: Work) -> int:
    """Sums of x̂ᵀx̂ and x̂ᵀx̂_teacher in float64, then both divided; or a batch's product in float32 and float64."""
    square = work.dims.d_model**2
    return max(16 * square + 12 * square + batch_bytes(work), 16 * square + 16 * square)


def _attended(work: Work) -> int:
    """Both moments, G matrices of D x D, three in the making; where there are few, one head's eigendecomposition."""
    d_model, groups = work.dims.d_model, work.dims.n_kv_heads
    making = 3 * 4
    if groups * d_model <= EIGEN_CHANNELS:
        making = max(making, 8 * (1 + EIGH))
    return (16 + 4 * groups + making) * d_model**2


def _start(work: Work, spec: QueryMapSpec) -> int:
    """Both moments, W_Q and W_K carried over in float64, and what a map's closed form takes."""
    dims, square, query = work.dims, work.dims.d_model**2, work.dims.d_model * work.n_query
    key = work.dims.d_model * work.n_key
    held = 16 * square * (2 if dims.attention_bias else 1)  # centred too
    held += 4 * dims.n_kv_heads * square * spec.query_map.of_keys
    carrying = 8 * square + 16 * query  # the Gram matrix, its right side and the solution
    carried = 8 * (query + key)
    if spec.query_map.of_keys:
        # the basis of C, W_Q and W_K in it, float32; C W_Q, a copy, W_K for every head and its gradient; Adam
        made = 4 * square + 4 * (query + key) + 4 * 4 * query + 4 * ADAM * key
    elif spec.query_map.ranked:
        made = 8 * (1 + EIGH) * square + 8 * (2 + SVD) * query
    else:
        made = 8 * square * (not spec.query_map.plain) + 8 * FULL_TURNS * query
    if not dims.rope:  # the closed forms go head by head, but join what they make
        made += 8 * 2 * square + 8 * 2 * query
    return held + max(carrying, carried + made)


def _refining(work: Work, spec: QueryMapSpec) -> int:
    """Both moments; C, W_Q and the eigenbasis of C in float32 while it is made; then the basis, Adam and a step."""
    dims, square = work.dims, work.dims.d_model**2
    making = 4 * square + 4 * dims.d_model * work.n_query + 4 * EIGH * square
    parameters = dims.d_model * work.n_key + sum(_free(spec, dims))
    tokens = work.part_windows * work.context
    a_token = 2 * dims.d_model + 2 * work.n_query + 6 * work.n_key
    logits = _block(work, work.part_windows * dims.n_heads * work.context**2 // 4)
    step = work.fast_itemsize * (tokens * a_token + BLOCK_COPIES * logits + 2 * dims.d_model * work.n_key)
    return 16 * square + max(making, 4 * square + 4 * ADAM * parameters + step)


def _free(spec: QueryMapSpec, dims: Dimensions) -> list[int]:
    """Return the sizes of what a map's fit moves beside W_K."""
    return [math.prod(shape) for kind, shape in spec.stored(dims).values() if kind == "weight"]


def _measuring(work: Work) -> int:
    """One window's x̂, queries and keys of both models, and blocks of their logits."""
    a_token = 4 * work.dims.d_model + 4 * (work.n_query + work.n_key)
    return 4 * (work.context * a_token + BLOCK_COPIES * _block(work, work.dims.n_heads * work.context**2))


def _refitting(work: Work) -> int:
    """The Gram matrix of what W_down (or W_O) reads, in float32 and in float64 at once, and its right side.

    Before that, batches of what the student computes; where the MLP's readers follow a turned stream, they in float64.
    """
    d_model, worst = work.dims.d_model, 0
    for n in (work.dims.d_mlp, work.n_query):
        right = 4 * n * d_model
        summing = 4 * n**2 + right + 6 * COLUMNS * n + batch_bytes(work, work.fast_itemsize) + _fast_weights(work)
        last = work.batch_tokens * (work.fast_itemsize * n + 4 * 3 * d_model)  # of the batches
        solving = right + last + max(12 * n**2, 8 * n**2 + right)
        worst = max(worst, summing, solving)
    if work.turned:
        readers = (16 + 8) * d_model**2 + (8 + 8 + 4) * d_model * work.dims.d_mlp
        worst = max(worst, 28 * d_model**2 + batch_bytes(work), readers)
    return worst


def _writing(work: Work) -> int:
    """One tensor as it is written, or as it was; in a turned stream the old layer and it turned; then a batch.

    Or W_Q in float64 and its singular values.
    """
    query = work.dims.d_model * work.n_query
    one = work.written_itemsize * work.largest * (work.written_itemsize < 4)
    old = 2 * 4 * work.layer + _turning(work) if work.turned else work.read_itemsize * work.largest
    return max(one, old, batch_bytes(work) + _fast_weights(work), 8 * query + 4 * 2 * query)


def _scores(work: Work) -> int:
    """States of the scored windows, slices of both models' logits, and the last ones for the reload check, twice."""
    d_model, vocab = work.dims.d_model, work.dims.vocab_size
    tokens = max(SCORED_TOKENS, work.context)
    states = (4 * 4 + 8 * 2 * work.turned) * tokens * d_model
    slices = 4 * SLICE_COPIES * tokens * SLICE + 2 * (4 + work.read_itemsize) * SLICE * d_model
    return states + max(slices, 2 * 4 * RELOAD_TOKENS * vocab)


def _reload(work: Work) -> int:
    """Another process: the last logits, a layer as it is stored, one projection in float32, and a window's states."""
    wanted = 4 * RELOAD_TOKENS * work.dims.vocab_size
    stored = work.written_itemsize * max(work.reduced.values())
    wide = (4 + work.written_itemsize) * work.largest
    mlp = MLP_A_TOKEN * work.dims.d_mlp
    return wanted + stored + wide + 4 * work.context * (STREAMS_A_TOKEN * work.dims.d_model + mlp)
