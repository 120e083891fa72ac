"""How long each stage of a conversion takes: its first layer fitted for real, on few windows and steps, and scaled.

The pass itself converts a model cut to one layer for each query map, on two numbers of random windows: what grows with
the windows lies on the line through both. Of each Adam it takes a few steps, and the middle one stands for the rest.
Stages have the names under which the conversion's own report gives their seconds.
"""

import hashlib
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from qectomy.calibrate.few_steps import few_steps
from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.calibrate.refine import RefineSettings
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.sizes import totals
from qectomy.conversion.at_once import SCORED_TOKENS
from qectomy.conversion.forecast.work import Work
from qectomy.conversion.layerwise import KL_WINDOWS, LayerPass
from qectomy.conversion.settings import ConvertSettings
from qectomy.conversion.stopwatch import Stopwatch
from qectomy.eval.protocol import ScoringWindows
from qectomy.eval.samples import MOST_BYTES, NEW_TOKENS, PROMPTS
from qectomy.models.query_maps import QueryMapSpec
from qectomy.record.texts import TextProtocol
from qectomy.runs.input_hashes import FileWatch
from qectomy.runs.run_dir import RunDir
from qectomy.text.windows import Windows

STEPS = 8  # of each Adam
BATCHES = 4  # of fitted windows, at least, in the larger of both runs
IMPORTS = 5.0  # seconds in which a new process has torch and transformers loaded, where they were loaded before
TOKENIZER, MODEL = 0.8, 0.3  # of those seconds: what loading a tokenizer and a model's class imports besides
PAGE = 3.0  # the report, its page and the sample of tokens
TOKENS_A_SECOND = 300_000  # of text that a tokenizer makes
HASHED = 16_000_000  # bytes
MEASURES = ("teacher", "steps taken", "all steps")  # seconds inside the stages "forward" and "fitting"

Seconds = dict[str, float]


@dataclass(frozen=True)
class Trial:
    """The seconds of a short conversion: of each layer by stage, and of everything by stage."""

    fitted: int  # windows
    held: int
    layers: dict[QueryMapSpec, Seconds]
    whole: Seconds


def stage_seconds(source: Checkpoint, work: Work, settings: ConvertSettings, imports: float | None) -> Seconds:
    """Return {stage: seconds}; `imports` are those that loading the libraries took, if that was seen."""
    started = IMPORTS if imports is None else imports
    a_byte, written = _hash_speed(), totals(source, work.recipe, settings.stored_dtype)["bytes"]["after"]
    most = min(work.fitted, max(BATCHES * work.batch, work.step_windows))
    held = min(work.held, max(work.batch, SCORED_TOKENS // work.context))
    _, small, large = (try_out(source, work, settings, n, held) for n in (1, -(-most // 4), most))  # 1: warms up
    stages = {
        "start": started,
        "text": TOKENIZER * started + work.windows * work.context / TOKENS_A_SECOND,
        "hashing": source.nbytes * a_byte + MODEL * started,
    }
    stages |= scaled(work, small, large)
    stages["reload"] = written * a_byte + (1 + MODEL) * started
    if max(source.nbytes, written) <= MOST_BYTES:  # both models write
        tokens = 2 * len(PROMPTS) * NEW_TOKENS
        stages["reload"] += tokens * _token_seconds(source, work) + (TOKENIZER + MODEL) * started
    return stages | {"page": PAGE}


def try_out(source: Checkpoint, work: Work, settings: ConvertSettings, fitted: int, held: int) -> Trial:
    """Convert the first layers, one for each map of the recipe, on so many windows of random tokens."""
    maps = sorted(dict.fromkeys(work.recipe), key=lambda spec: spec.name == "dense")  # those are refitted after others
    cut = first_layers(source, len(maps))
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = torch.randint(source.dims.vocab_size, (fitted + held, work.context), generator=generator)
    texts = (
        Windows(tokens[:fitted], False, []),
        ScoringWindows(tokens[fitted:], torch.ones(held).long(), TextProtocol.model_construct(scored_bytes=1)),
    )
    refine = RefineSettings(steps=RefineSettings().steps_for(work.fitted * work.context))
    runner, watch, marks = LayerRunner(cut, tuple(maps), work.context, settings.device), Stopwatch(), list[Seconds]()
    with ExitStack() as stack:
        folder = RunDir(Path(stack.enter_context(TemporaryDirectory())) / "trial")
        stack.callback(folder.release)
        folder.start({}, False)
        few, unchanged = stack.enter_context(few_steps(STEPS)), FileWatch({})
        run = LayerPass(cut, tuple(maps), settings, runner, *texts, unchanged, folder, watch, refine=refine)

        def mark(*_: object) -> None:
            inside = zip(MEASURES, (run.teacher_seconds, few.taken, few.whole), strict=True)
            marks.append({**watch.seconds, **dict(inside)})

        run.run(mark)
        mark()
    *ends, whole = marks
    pairs = zip([Seconds(), *ends[:-1]], ends, strict=True)
    layers = [{stage: end[stage] - before.get(stage, 0.0) for stage in end} for before, end in pairs]
    return Trial(fitted, held, dict(zip(maps, layers, strict=True)), whole)


def first_layers(source: Checkpoint, count: int) -> Checkpoint:
    """Return the checkpoint of a model that has only the first so many layers, and what lies outside of them."""
    config, dims = source.family.shortened(source.config, count), replace(source.dims, n_layers=count)
    others = tuple(source.prefix(layer) for layer in range(count, source.dims.n_layers))
    tensors = {name: info for name, info in source.tensors.items() if not name.startswith(others)} if others else None
    return replace(source, config=config, dims=dims, recipe=source.recipe[:count], tensors=tensors or source.tensors)


def scaled(work: Work, small: Trial, large: Trial) -> Seconds:
    """Return the seconds by stage of the whole pass, from those of two that differ in their fitted windows alone."""
    n_layers, tried = work.dims.n_layers, len(large.layers)

    def whole(stage: str) -> float:
        n_small, n_large = small.fitted + small.held, large.fitted + large.held
        return _line((n_small, small.whole[stage]), (n_large, large.whole[stage]), work.windows)

    stages = {"embedding": whole("embedding"), "keeping": whole("keeping") * (n_layers + 1) / (tried + 1)}
    for spec, drifted in zip(work.recipe, work.drifting, strict=True):
        for stage, seconds in _layer(work, spec, small, large).items():
            stages[stage] = stages.get(stage, 0.0) + seconds * (drifted or stage != "refitting")
    at_once = max(1, SCORED_TOKENS // work.context)
    return stages | {"scores": large.whole["scores"] * -(-work.held // at_once) / -(-large.held // at_once)}


def _layer(work: Work, spec: QueryMapSpec, small: Trial, large: Trial) -> Seconds:
    """Return the seconds by stage of one layer of a map."""
    few, many = small.layers[spec], large.layers[spec]

    def line(of: Callable[[Seconds], float]) -> float:
        return _line((small.fitted, of(few)), (large.fitted, of(many)), work.fitted)

    measured = sum(min(KL_WINDOWS, n) for n in (large.fitted, large.held))
    return {
        "reading": many["reading"],
        "forward": line(lambda took: took["forward"] - 2 * took["teacher"])
        + 2 * many["teacher"] * work.held / large.held,
        "fitting": line(lambda took: took.get("fitting", 0.0) - took["steps taken"]) + many["all steps"],
        "measuring": many["measuring"] * sum(min(KL_WINDOWS, n) for n in (work.fitted, work.held)) / measured,
        "refitting": line(lambda took: took.get("refitting", 0.0)),
        "writing": many["writing"],
    }


def _line(small: tuple[int, float], large: tuple[int, float], n: int) -> float:
    """Return the seconds at n on the line through two points, which does not fall; no less than 0."""
    slope = max(0.0, large[1] - small[1]) / max(1, large[0] - small[0])
    return max(0.0, large[1] + slope * (n - large[0]))


def _hash_speed() -> float:
    """Return the seconds in which a byte is hashed."""
    data, since = bytes(HASHED), time.perf_counter()
    hashlib.sha256(data).hexdigest()
    return (time.perf_counter() - since) / HASHED


@torch.no_grad()
def _token_seconds(source: Checkpoint, work: Work) -> float:
    """Return the seconds in which a model writes a token: its layers and its head on one, on the processor."""
    runner = LayerRunner(source, source.recipe, 1, "cpu")
    layer, x = runner.build(0, source.read_layer(0, torch.float32)), torch.ones(1, 1, source.dims.d_model)
    took = []
    for _ in range(STEPS):
        since = time.perf_counter()
        runner.forward(layer, x)
        took.append(time.perf_counter() - since)
    return min(took) * (source.dims.n_layers + source.dims.vocab_size * source.dims.d_model / work.layer)
