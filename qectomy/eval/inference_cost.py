"""What inference costs with two checkpoints, side by side: load, memory, prefill, decoding, next to what bytes allow.

The two are run in turn, A B A B, and compared within a round, so that a machine whose speed drifts slows both alike.
Every ratio is the original's cost over the reduced one's: above 1 is in the reduced one's favour.

A step of decoding reads all weights and the cache once, and hardly computes. Where nothing else takes time, its speed
is that of the memory, and the ratio of two models is that of the bytes they read: the limit given here.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import comb
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import locate
from qectomy.checkpoint.file_identity import fingerprint
from qectomy.errors import QectomyError
from qectomy.eval.fresh_start import FreshStart, fresh_start, warm_files
from qectomy.eval.inference_bytes import (
    bytes_read_per_step,
    cached_tokens,
    kv_bytes_by_config,
    kv_bytes_in_cache,
    weight_bytes,
)
from qectomy.eval.inference_loops import InferenceLoop, Timing, random_tokens
from qectomy.eval.loading import load_model
from qectomy.eval.protocol import common_context, table_of_positions
from qectomy.progress import Progress
from qectomy.record.base import made
from qectomy.record.bench import (
    Bench,
    BenchModel,
    BenchRatios,
    BenchRun,
    Decode,
    DecodeRatio,
    Prefill,
    PrefillRatio,
    Spread,
)

COVERAGE = 0.95  # of the interval around a median
EAGER_NOTE = (
    "decoding in eager mode on a GPU is bound by launching kernels, not by bytes: the share of the limit then says "
    "little about the memory; --compile captures each step in a graph"
)


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is run. Equal settings on the same machine give comparable numbers."""

    batches: tuple[int, ...] = (1, 16)
    rounds: int = 7
    starts: int | None = None  # rounds of fresh processes, for load and memory; None: as many; 0: neither is measured
    prompt_tokens: int | None = None  # None: 512, or what both models were made for less the new tokens
    new_tokens: int = 32
    device: str = "cpu"
    dtype: str | None = None  # None: the original's
    threads: int | None = None
    compile: bool = False
    seed: int = 0


def compare(
    original: str, reduced: str, settings: BenchSettings, progress: Progress | None = None, command: str = ""
) -> Bench:
    """Return the costs of both checkpoints, their ratios, and the limits that bytes set.

    Raises QectomyError for more positions than a model has, and when memory is short, naming batch and size.
    """
    names = (original, reduced)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    prompt = settings.prompt_tokens or max(1, min(512, common_context(list(names)) - settings.new_tokens))
    empty = [load_model(name, settings.dtype, "meta") for name in names]
    dtype = empty[0][2]
    for name, (model, _, _) in zip(names, empty, strict=True):
        check_positions(name, model.config, prompt, settings.new_tokens)
    n_starts = settings.rounds if settings.starts is None else settings.starts
    report = _counted(progress, 2 * n_starts + 2 * len(settings.batches) * (settings.rounds + 1))
    starts = _start_rounds(names, settings, n_starts, dtype, prompt, report)
    loops = [InferenceLoop(name, _loaded(name, dtype, settings.device), settings.compile) for name in names]
    models, warnings = [_model_record(loop, place, starts) for place, loop in enumerate(loops)], mismatches(loops)
    ratios = _ratios(models[0], models[1], starts)
    warnings += _time_batches(loops, models, ratios, settings, prompt, report)
    on_cuda = settings.device.startswith("cuda")
    return Bench(
        **made(command),
        device=settings.device,
        device_name=torch.cuda.get_device_name(settings.device) if on_cuda else None,
        dtype=dtype,
        threads=torch.get_num_threads(),
        settings=BenchRun(
            batches=list(settings.batches),
            rounds=settings.rounds,
            starts=n_starts,
            prompt_tokens=prompt,
            new_tokens=settings.new_tokens,
            compile=settings.compile,
            seed=settings.seed,
        ),
        models=models,
        ratios=ratios,
        warnings=list(dict.fromkeys(warnings)),
        notes=[EAGER_NOTE] if on_cuda and not settings.compile else [],
    )


def alternate(
    runs: Sequence[Callable[[], Any]], rounds: int, tell: Callable[[int], None] | None = None
) -> list[tuple[Any, ...]]:
    """Return what each run gave in each round: A B A B ..., after one round of both that is not counted."""
    results = []
    for _ in range(rounds + 1):
        row = []
        for place, run in enumerate(runs):
            row.append(run())
            if tell:
                tell(place)
        results.append(tuple(row))
    return results[1:]


def spread(values: Sequence[float]) -> Spread:
    """Return the median and an interval that holds the true median with a probability of 95 %, whatever the noise.

    The interval runs between two of the values (order statistics); fewer than six are too few for 95 %, and it is all
    of their range.
    """
    ordered, n = sorted(values), len(values)
    cut = 0  # values left out at either end: the true median lies outside with 2 P(Binomial(n, 1/2) <= cut)
    while 2 * sum(comb(n, k) for k in range(cut + 2)) / 2**n <= 1 - COVERAGE:
        cut += 1
    return Spread(median=statistics.median(ordered), low=ordered[cut], high=ordered[n - 1 - cut])


def check_positions(name: str, config: Any, prompt: int, new: int) -> None:
    """Raise QectomyError if a model with a table of positions, not RoPE, has fewer than the run needs."""
    rows = table_of_positions(config)
    if rows is not None and prompt + new > rows:
        raise QectomyError(
            f"{prompt} prompt tokens and {new} new ones are more than the {rows} positions of {name}; use "
            f"--prompt-tokens {max(1, rows - new)} or less, or fewer --new-tokens"
        )


def mismatches(loops: Sequence[InferenceLoop]) -> list[str]:
    """Say in what the two models differ so that a comparison of their speed may mean little."""
    a, b = (loop.model.config for loop in loops)
    fields = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    found = []
    for field in fields:
        ours, theirs = getattr(a, field, None), getattr(b, field, None)
        if ours != theirs and None not in (ours, theirs):
            found.append(f"the two do not belong together: {field} is {ours} in {loops[0].name}, {theirs} in the other")
    return found


def _loaded(name: str, dtype: str, device: str) -> Any:
    """Load a model whose weights lie where the allocator puts them.

    On a CPU they are mapped from the file, aligned as the length of its header left them, which makes two files of the
    same tensors differ in speed by some per cent.
    """
    model = load_model(name, dtype, device)[0]
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()
    return model


def _counted(progress: Progress | None, total: int) -> Callable[[str], None]:
    done = 0

    def report(note: str) -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total, note)

    return report


def _start_rounds(
    names: Sequence[str],
    settings: BenchSettings,
    n_rounds: int,
    dtype: str,
    prompt: int,
    report: Callable[[str], None],
) -> list[tuple[FreshStart, ...]]:
    """Load both in fresh processes, in turn, before this process holds a model and takes the device's memory."""
    for name in names if n_rounds else ():
        warm_files(locate(name))
    rounds = []
    for _ in range(n_rounds):
        row = []
        for name in names:
            row.append(
                fresh_start(
                    name,
                    dtype=dtype,
                    device=settings.device,
                    batch=settings.batches[0],
                    prompt=prompt,
                    threads=settings.threads,
                    seed=settings.seed,
                )
            )
            report(f"loading, {name}")
        rounds.append(tuple(row))
    return rounds


def _model_record(loop: InferenceLoop, place: int, starts: Sequence[tuple[FreshStart, ...]]) -> BenchModel:
    """What a loaded model is, before it runs; `place`: where in a round of fresh processes it stands."""
    folder: Path = locate(loop.name)
    return BenchModel(
        checkpoint=loop.name,
        fingerprint=fingerprint(folder),
        parameters=sum(parameter.numel() for parameter in loop.model.parameters()),
        bytes=weight_bytes(loop.model),
        bytes_on_disk=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        load_seconds=spread([row[place].load_seconds for row in starts]) if starts else None,
        peak_memory_bytes=statistics.median(row[place].peak_memory_bytes for row in starts) if starts else None,
    )


def _ratios(a: BenchModel, b: BenchModel, starts: Sequence[tuple[FreshStart, ...]]) -> BenchRatios:
    """Return the first model's cost over the second's, of what is known before they run."""
    peaks = a.peak_memory_bytes, b.peak_memory_bytes
    return BenchRatios(
        parameters=a.parameters / b.parameters,
        bytes=a.bytes / b.bytes,
        bytes_on_disk=a.bytes_on_disk / b.bytes_on_disk,
        load=spread([one.load_seconds / other.load_seconds for one, other in starts]) if starts else None,
        peak_memory=peaks[0] / peaks[1] if peaks[0] and peaks[1] else None,
    )


def _time_batches(
    loops: Sequence[InferenceLoop],
    models: list[BenchModel],
    ratios: BenchRatios,
    settings: BenchSettings,
    prompt: int,
    report: Callable[[str], None],
) -> list[str]:
    """Run both at each batch, in turn, and add what came out; return warnings."""
    vocab_size = min(loop.model.config.vocab_size for loop in loops)
    warnings = []
    for batch in settings.batches:
        if settings.compile:
            torch.compiler.reset()  # only so many shapes of one function are compiled
        ids = random_tokens(vocab_size, batch, prompt, settings.new_tokens, settings.seed)
        steps = []
        for loop, model in zip(loops, models, strict=True):
            step, model.kv_cache_bytes_per_token, warned = _count(loop, ids, batch)
            steps.append(step)
            warnings += warned
        notes = [f"batch {batch}, {loop.name}" for loop in loops]
        runs = [partial(loop.run, *ids) for loop in loops]
        rounds = alternate(runs, settings.rounds, lambda place, notes=notes: report(notes[place]))  # type: ignore[misc]
        _add_speeds(models, ratios, steps, rounds, batch, prompt, settings.new_tokens)
    return warnings


def _count(
    loop: InferenceLoop, ids: tuple[torch.Tensor, torch.Tensor], batch: int
) -> tuple[tuple[int, float], float, list[str]]:
    """Return (operations of a step of decoding, bytes it reads a token), bytes of the cache a token, and warnings."""
    prompt, new = ids
    config = loop.model.config
    cache, operations = loop.look(prompt, new)
    kv_bytes = kv_bytes_in_cache(cache)
    attended = cached_tokens(config, prompt.shape[1], new.shape[1])
    step = operations, bytes_read_per_step(loop.model, batch, attended, kv_bytes) / batch
    expected = kv_bytes_by_config(config, cache.layers[0].keys.dtype)
    if kv_bytes == expected:
        return step, kv_bytes, []
    return step, kv_bytes, [f"{loop.name}: its cache holds {kv_bytes:,.0f} bytes a token, {expected:,} by its config"]


def _add_speeds(
    models: list[BenchModel],
    ratios: BenchRatios,
    steps: list[tuple[int, float]],
    rounds: Sequence[tuple[Timing, Timing]],
    batch: int,
    prompt: int,
    new: int,
) -> None:
    """Add tokens a second of both models and the ratios within the rounds."""
    for place, (model, (operations, read)) in enumerate(zip(models, steps, strict=True)):
        filling = spread([batch * prompt / row[place].prefill for row in rounds])
        model.prefill.append(Prefill(batch=batch, tokens=prompt, tokens_per_second=filling))
        decoding = spread([batch * new / row[place].decode for row in rounds])
        model.decode.append(
            Decode(
                batch=batch,
                operations_per_step=operations,
                bytes_read_per_token=read,
                tokens_per_second=decoding,
                bytes_per_second=decoding.median * read,
            )
        )
    ratios.prefill.append(PrefillRatio(batch=batch, ratio=spread([a.prefill / b.prefill for a, b in rounds])))
    ratio, limit = spread([a.decode / b.decode for a, b in rounds]), steps[0][1] / steps[1][1]
    ratios.decode.append(DecodeRatio(batch=batch, ratio=ratio, byte_limit=limit, share_of_limit=ratio.median / limit))
