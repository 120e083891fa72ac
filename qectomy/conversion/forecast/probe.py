"""Time the repeated pieces of a conversion on this machine, on random numbers, within seconds.

Each piece is the function that a conversion calls, at the model's own sizes where that is quick. Where it is not,
widths and heads are halved until it is, and the time grows back as the piece's work does (`costs.py`). What the time
left does not allow is taken from the rate of one product.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from qectomy.calibrate.attention_kl import attention_kl
from qectomy.calibrate.hidden_states import WindowFile
from qectomy.calibrate.init import make_start
from qectomy.calibrate.key_shared import joint_start
from qectomy.calibrate.layer_fit import attended_moments
from qectomy.calibrate.moments import MomentSums, ridge
from qectomy.calibrate.precision import fast_math
from qectomy.calibrate.refine import RefineSettings, refine
from qectomy.calibrate.refit import Regression
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.conversion.final_scores import SCORED_TOKENS
from qectomy.conversion.forecast import costs
from qectomy.conversion.forecast.random_layer import RandomLayer, at_most
from qectomy.conversion.forecast.timer import Speeds, Timer
from qectomy.conversion.forecast.work import Work
from qectomy.distributed.window_shard import whole
from qectomy.eval.token_scores import SLICE, score_tokens
from qectomy.models.query_maps import QueryMapSpec

BUDGET = 8.0  # seconds after which nothing is begun any more; of these ...
WIDE_SHARE = 0.3  # ... the layer at its largest may take so much
FIT_WIDTH = 1024  # D, at most, of the pieces that decompose a D x D matrix on the way
START_WIDTH = 512  # likewise, of the closed forms, which decompose several
SOLVED, DECOMPOSED = 1024, 512  # inputs, at most, of a ridge regression, and of an eigendecomposition
REFINED, JOINT, ATTENDED = 4, (2, 6), (1, 3)  # steps, and windows, that are timed


def probe(
    source: Checkpoint,
    work: Work,
    device: str = "cpu",
    budget: float = BUDGET,
    clock: Callable[[], float] = time.perf_counter,
) -> Speeds:
    """Return the speeds of this machine for a conversion of `source`, after `budget` seconds at most or little more."""
    timer = Timer(source, work, device, budget, clock)
    with torch.no_grad():
        with tempfile.TemporaryDirectory() as folder:
            _states(timer, Path(folder))
        _layers(timer)
        for spec in dict.fromkeys(work.recipe):
            if spec.name != "dense":
                _fit(timer, spec)
        _regressions(timer)
        _scores(timer)
        _decompositions(timer)
        for spec in dict.fromkeys(work.recipe):  # last, for it is slow beside what it tells
            if spec.name == "key-shared" or (spec.name != "dense" and not work.dims.rope):
                _attended(timer, spec)
    timer.speeds.seconds = clock() - timer.begun
    return timer.speeds


def _layers(timer: Timer) -> None:
    """The layer in float32, in the fast type, and on one token, as a model that writes runs it."""
    work, dims = timer.work, timer.work.dims
    tokens, context, readers = work.batch_tokens, work.context, work.mlp_readers
    full = costs.layer(dims, readers, tokens, context)
    small, most = dims, WIDE_SHARE * timer.budget / 6 / timer.speeds.product
    while (
        costs.layer(small, readers, tokens, context) > most and (halved := at_most(small, small.d_model // 2)) != small
    ):
        small = halved
    layer = RandomLayer(timer.source, small, context, timer.device, timer.generator)
    x, works = layer.states(tokens // context), (full, costs.layer(small, readers, tokens, context))
    timer.piece("layer", works, lambda: layer.runner.forward(layer.teacher, x))
    with fast_math(timer.device):
        timer.piece("fast layer", works, lambda: layer.runner.forward(layer.teacher, x))
        works = costs.attention(dims, tokens, context), costs.attention(small, tokens, context)
        timer.piece("fast attention", works, lambda: layer.runner.attend(layer.teacher, x))

    def collect() -> None:
        hidden = layer.runner.read(layer.teacher, x)
        sums.add(hidden, layer.runner.read(layer.teacher, x))
        with fast_math(timer.device):
            layer.runner.queries_keys(layer.teacher, hidden)

    sums = MomentSums(small.d_model, timer.device)
    timer.piece("collecting", [costs.collecting(size, tokens) for size in (dims, small)], collect)
    one = RandomLayer(timer.source, small, 1, timer.device, timer.generator)
    token, weights = one.states(1), [costs.layer(size, readers, 1, 1) for size in (dims, small)]
    timer.piece("layer of one token", weights, lambda: one.runner.forward(one.teacher, token))


def _regressions(timer: Timer) -> None:
    """A batch's share of the refit's sums, and the solution in float64."""
    work, d_model = timer.work, timer.work.dims.d_model
    tokens, moving = work.batch_tokens, work.dims.attention_bias or work.dims.mlp_bias
    for name, n in (("W_O", work.n_query), ("W_down", work.dims.d_mlp)):
        full = costs.gram(n, d_model, tokens)
        most = WIDE_SHARE * timer.budget / 6 / timer.speeds.product
        halvings = 0
        while costs.gram(n >> halvings, d_model >> halvings, tokens) > most and min(n, d_model) >> halvings > 64:
            halvings += 1
        n_small, d_small = n >> halvings, d_model >> halvings
        inputs, lack = (_noise(timer, tokens // work.context, work.context, width) for width in (n_small, d_small))
        sums = Regression(inputs, lack, with_bias=moving, share=whole(len(inputs)))
        small = costs.gram(n_small, d_small, tokens)
        timer.piece(f"Gram of {name}", (full, small), lambda a=inputs, b=lack, s=sums: s.add(a, b))  # type: ignore[misc]
        del sums
    n = min(SOLVED, max(work.dims.d_mlp, work.n_query))
    a = _noise(timer, 2 * n, n)
    gram, right = (a.T @ a).double(), _noise(timer, n, min(n, d_model))
    timer.piece("ridge regression", (1.0, costs.solve(n, right.shape[1])), lambda: ridge(gram, right, 1.0))


def _decompositions(timer: Timer) -> None:
    """Eigendecompositions in both types and singular values, each of a matrix with one row: times n cubed."""
    n = min(DECOMPOSED, timer.work.dims.d_model)
    a = _noise(timer, 2 * n, n)
    gram, square = a.T @ a, a[:n]
    timer.piece("eigenvectors", (1.0, costs.cube(n)), lambda: torch.linalg.eigh(gram))
    timer.piece("eigenvectors in float64", (1.0, costs.cube(n)), lambda: torch.linalg.eigh(gram.double()))
    timer.piece("singular values", (1.0, costs.cube(n)), lambda: torch.linalg.svdvals(square))


def _scores(timer: Timer) -> None:
    """One slice of the vocabulary, scored under both models on as many tokens as are scored at a time."""
    work, slices = timer.work, 4
    tokens = max(1, SCORED_TOKENS // work.context) * (work.context - 1)
    states = _noise(timer, tokens, work.dims.d_model)
    rows = _noise(timer, min(slices * SLICE, work.dims.vocab_size), work.dims.d_model)
    targets = torch.zeros(tokens, dtype=torch.int64, device=timer.device)
    works = [float(states.numel() * size) for size in (SLICE, len(rows))]

    def logits(start: int, stop: int) -> torch.Tensor:
        return torch.nn.functional.linear(states, rows[start:stop])

    timer.piece("slice of scores", works, lambda: score_tokens(logits, targets, len(rows), logits))


def _states(timer: Timer, folder: Path) -> None:
    """A batch of hidden states, written to a file and read; and the same brought to the disk."""
    work = timer.work
    windows = work.batch_tokens // work.context
    states = _noise(timer, windows, work.context, work.dims.d_model).cpu()
    works = (costs.MOVED * states.numel(),) * 2
    file = WindowFile(folder / "states", windows, work.context, work.dims.d_model)

    def write() -> None:
        file[0:windows] = states

    def keep() -> None:
        write()
        file.sync()

    timer.piece("states written", works, write)
    timer.piece("states read", works, lambda: file[0:windows])
    timer.piece("states kept", works, keep)
    file.close()


def _fit(timer: Timer, spec: QueryMapSpec) -> None:
    """A window of what a layer's fit looks at, its start, and the steps of both Adams."""
    work, dims = timer.work, timer.work.dims
    small = at_most(dims, FIT_WIDTH)
    layer = RandomLayer(timer.source, small, work.context, timer.device, timer.generator)
    data, moments = layer.fit_data(work.step_windows), layer.moments()
    projections, rope = layer.projections(), layer.runner.rope()
    _refine(timer, spec, layer)
    one = layer.fit_data(1)
    windows = [layer.runner.queries_keys(layer.teacher, one.hidden[:].float()) for _ in range(2)]

    def kl() -> None:
        for _ in range(2):
            layer.runner.queries_keys(layer.teacher, layer.states(1))
        attention_kl(windows[0], windows[1], data.allowed)

    timer.piece("KL of a window", [costs.attention_kl(size, work.context) for size in (dims, small)], kl)
    if spec.name == "key-shared":
        C, key_moments = moments.student, moments.student.float().expand(small.n_kv_heads, -1, -1).contiguous()

        def join(steps: int) -> None:
            with torch.enable_grad():
                joint_start(C, key_moments, projections.W_Q, projections.W_K, rope, timer.generator, steps)

        timer.difference("joint step", [costs.joint_step(size) for size in (dims, small)], join, JOINT)
    else:
        _start(timer, spec)


def _attended(timer: Timer, spec: QueryMapSpec) -> None:
    """A window's share of the moments under the teacher's attention; the eigenvectors that follow are made twice."""
    work, dims = timer.work, timer.work.dims
    small = at_most(dims, FIT_WIDTH)
    layer = RandomLayer(timer.source, small, work.context, timer.device, timer.generator)
    W_K = None if spec.name == "key-shared" else layer.projections().W_K
    some = {count: layer.fit_data(count) for count in ATTENDED}
    works = [costs.attended(size, work.context) for size in (dims, small)]
    timer.difference(
        "attended window", works, lambda count: attended_moments(some[count], small.n_kv_heads, W_K), ATTENDED
    )


def _start(timer: Timer, spec: QueryMapSpec) -> None:
    """The closed form of a map that has no steps."""
    work, dims = timer.work, timer.work.dims
    small = at_most(dims, START_WIDTH)
    layer = RandomLayer(timer.source, small, work.context, timer.device, timer.generator)
    spec_small = layer.fitting(spec)
    moments, projections, rope = layer.moments(), layer.projections(), layer.runner.rope()
    own = None if dims.rope else attended_moments(layer.fit_data(1), small.n_kv_heads, projections.W_K)
    works = [costs.start(size, each) for size, each in ((dims, spec), (small, spec_small))]
    timer.piece(
        f"start of {spec}",
        works,
        lambda: make_start(spec_small, moments, own, projections, small, rope, timer.generator),
    )


def _refine(timer: Timer, spec: QueryMapSpec, layer: RandomLayer) -> None:
    """The time between the steps of Adam on the attention KL, seen where each step asks for its first rotation."""
    work, dims, small = timer.work, timer.work.dims, layer.runner.dims
    spec_small, seen, turns_a_step = layer.fitting(spec), list[float](), 2 * -(-work.step_windows // work.part_windows)
    data = layer.fit_data(work.step_windows)

    def turn(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        timer.wait()
        seen.append(timer.clock())
        return layer.runner.turn(heads, positions)

    def a_step() -> float:
        seen.clear()
        start = layer.start(spec_small)
        with torch.enable_grad():
            refine(
                start,
                layer.query_module(spec_small),
                replace(data, turn=turn),
                layer.moments().student,
                layer.projections().W_Q,
                layer.runner.rope(),
                RefineSettings(steps=REFINED),
                timer.generator,
            )
        steps = seen[::turns_a_step]
        return (steps[-1] - steps[1]) / (len(steps) - 2)  # the first one warms up

    sizes = (dims, spec), (small, spec_small)
    works = [costs.refine_step(*each, work.step_windows, work.context) for each in sizes]
    timer.timed(f"refine step of {spec}", works, a_step, REFINED)


def _noise(timer: Timer, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=timer.generator).to(timer.device)
