"""Evaluate checkpoints, original or reduced, by one recorded protocol: `qectomy eval`."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import locate
from qectomy.checkpoint.file_identity import fingerprint
from qectomy.checkpoint.headers import TORCH_NAMES
from qectomy.errors import QectomyError, TextError
from qectomy.eval.layerwise_model import StreamedModel, open_any, score_streamed
from qectomy.eval.loading import check_dtype, load_model, naming_dtype, read_config
from qectomy.eval.metrics import compare, summarize
from qectomy.eval.protocol import (
    Protocol,
    ScoringWindows,
    check_positions,
    common_context,
    positions_of,
    scoring_windows,
)
from qectomy.eval.published import ROLLING_CONTEXT, published, read_text
from qectomy.eval.score_windows import score_model
from qectomy.eval.token_scores import TokenScores
from qectomy.progress import Progress
from qectomy.record.evaluation import Evaluated, PairedWith
from qectomy.record.reduced import Exact, Fitted, read_if_can
from qectomy.record.texts import Overlap
from qectomy.text.documents import Reading
from qectomy.text.overlap import Sketch, overlap
from qectomy.text.text import Source, load_tokenizer, read_source

OTHER_TOKENIZER = (
    "it has another tokenizer or vocabulary than {reference}, so their predictions cannot be compared token by token; "
    "bits per byte and word perplexity still compare"
)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How checkpoints are evaluated. `streamed`: one layer in memory at a time, for models of any size."""

    protocol: Protocol = field(default_factory=Protocol)
    dtype: str | None = None
    device: str = "cpu"
    reference: str | None = None
    streamed: bool = False


@dataclass(frozen=True)
class _Found:
    windows: ScoringWindows
    scores: TokenScores


def evaluate_all(
    names: Sequence[str], text: str | None, measure: Measure, progress: Any | None = None, field: str | None = None
) -> list[Evaluated]:
    """Return one result a checkpoint, each also compared with the first on the same windows.

    `text`: a file or dataset; None only for a published protocol that has its own. `field`: of its records, the one
    with the text; chats are written by the first checkpoint's template. `progress(name)` is given each
    checkpoint's name and gives the function that its windows are reported to.
    """
    reading = Reading(field=field, tokenizer=lambda: load_tokenizer(locate(names[0])))
    if measure.protocol.name is not None:
        source = read_text(text, measure.protocol.name, reading)
    elif text is not None:
        source = read_source(text, reading)
    else:
        raise TextError("no text to measure on: give --text FILE, or a --protocol that has a text of its own")
    for name in names:
        read_config(name)  # a folder that is none is found before the first one is evaluated
    results: list[Evaluated] = []
    first: _Found | None = None
    for name in names:
        result, found = _evaluate(name, source, measure, progress(name) if progress else None)
        if first is None:
            first = found
        elif torch.equal(found.windows.tokens, first.windows.tokens):
            pair = compare(first.scores, found.scores, found.windows)
            result.paired = PairedWith(against=names[0], **dict(pair))
        else:
            result.paired_refused = OTHER_TOKENIZER.format(reference=names[0])
        results.append(result)
    return results


def evaluate(
    name: str, source: Source, protocol: Protocol, progress: Progress | None = None, **options: Any
) -> Evaluated:
    """Return perplexity, bits per byte and the protocol of one checkpoint on one text; `options`: Measure's others.

    With a reference, also mean KL(reference || checkpoint) in nats a token and top-1 agreement.
    """
    return _evaluate(name, source, Measure(protocol=protocol, **options), progress)[0]


def _evaluate(name: str, source: Source, measure: Measure, progress: Progress | None) -> tuple[Evaluated, _Found]:
    check_dtype(measure.dtype)
    config, windows = read_config(name), _windows(name, source, measure)
    reference = measure.reference
    itself = reference is not None and locate(reference).samefile(locate(name))
    refused = None
    if reference is not None and not itself:
        refused = _not_comparable(reference, config, windows, source, measure)
    if refused is not None:
        reference = None
    other = None if itself else reference
    run = _streamed if measure.streamed else _resident
    scores, dtype_name, seconds = run(name, other, windows, measure, progress)
    if itself:
        scores = _of_itself(scores)
    result = Evaluated(
        checkpoint=name,
        fingerprint=fingerprint(locate(name)),
        reference=reference,
        reference_refused=refused,
        **dict(summarize(scores, windows)),
        seconds=round(seconds, 3),
        tokens_per_second=round(windows.report.scored_tokens / seconds, 1) if other is None else None,
        device=measure.device,
        streamed=measure.streamed,
        overlap=_overlap(windows, path) if (path := locate(name) / "qectomy.json").is_file() else None,
        protocol=windows.report.model_copy(update={"dtype": dtype_name}),
    )
    return result, _Found(windows, scores)


def _overlap(windows: ScoringWindows, path: Path) -> Overlap | None:
    """Return how much of the measured text stands in what a checkpoint was fitted on; None of a fold: in nothing."""
    report = read_if_can(path)
    if isinstance(report, Exact):
        return None
    same_text = report is not None and windows.report.text_sha256 in report.fitted_hashes
    return Overlap(**overlap(windows.text, fitted_on(report)), fitted_text=same_text or None)


def fitted_on(report: Fitted | Exact | None) -> Sketch | None:
    """Return the sketch of what a checkpoint was fitted on, by its report: of a fold the empty one; None: unknown."""
    if isinstance(report, Exact):
        return Sketch()
    return Sketch.of_record(report.fitted_spans.model_dump()) if report and report.fitted_spans else None


def _not_comparable(
    reference: str, config: Any, windows: ScoringWindows, source: Source, measure: Measure
) -> str | None:
    """Say why a reference does not read the text as the same tokens, of the same vocabulary; None: it does."""
    try:
        theirs = _windows(reference, source, measure)
    except TextError as error:
        return f"{reference} cannot be the reference on these windows: {error}"
    same = torch.equal(theirs.tokens, windows.tokens) and read_config(reference).vocab_size == config.vocab_size
    return None if same else OTHER_TOKENIZER.format(reference=reference)


def _of_itself(scores: TokenScores) -> TokenScores:
    """The scores of a model that is its own reference."""
    return TokenScores(scores.nll, torch.zeros_like(scores.nll), torch.ones_like(scores.nll), scores.nll)


def _resident(
    name: str, reference: str | None, windows: ScoringWindows, measure: Measure, progress: Progress | None
) -> tuple[TokenScores, str, float]:
    model, _, dtype_name = load_model(name, measure.dtype, measure.device)
    other = None if reference is None else load_model(reference, measure.dtype, measure.device)[0]
    begun = time.perf_counter()
    with naming_dtype(name, measure.dtype, dtype_name):
        return score_model(model, windows, progress, other, name), dtype_name, time.perf_counter() - begun


def _streamed(
    name: str, reference: str | None, windows: ScoringWindows, measure: Measure, progress: Progress | None
) -> tuple[TokenScores, str, float]:
    opened = [open_any(each) for each in _some(reference, name)]
    dtype_name = measure.dtype or TORCH_NAMES[opened[-1].dtype]
    begun = time.perf_counter()
    models = [StreamedModel(checkpoint, getattr(torch, dtype_name), measure.device) for checkpoint in opened]
    with naming_dtype(name, measure.dtype, dtype_name):
        return score_streamed(models, windows, progress)[-1], dtype_name, time.perf_counter() - begun


def _windows(name: str, source: Source, measure: Measure) -> ScoringWindows:
    """Cut the text into windows of a checkpoint's tokens."""
    config, protocol = read_config(name), measure.protocol
    fixed = protocol.name is not None and published(protocol.name).context is not None
    check_positions(name, config, protocol.context, protocol.name if fixed else None)
    tokenizer = load_tokenizer(locate(name))
    if protocol.name is not None:
        return published(protocol.name).windows(tokenizer, source, protocol, config.vocab_size)
    return scoring_windows(tokenizer, source, protocol, config.vocab_size)


def settle(
    name: str | None, context: int | None, stride: int | None, tokens: int | None, models: list[str]
) -> Protocol:
    """Return the protocol that these options mean for these models. Raises QectomyError where they contradict it."""
    if name is None:
        return Protocol(context=context or common_context(models), stride=stride, tokens=tokens)
    chosen = published(name)
    if stride is not None:
        raise QectomyError(f"--protocol {name} says how windows follow each other; leave --stride out")
    if chosen.context is not None and context not in (None, chosen.context):
        raise QectomyError(f"--protocol {name} means windows of {chosen.context} tokens; leave --context out")
    made_for = min((found for found in map(positions_of, models) if found), default=ROLLING_CONTEXT)
    return Protocol(name=name, context=chosen.context or context or made_for, tokens=tokens)


def _some(*names: str | None) -> list[str]:
    return [name for name in names if name is not None]
