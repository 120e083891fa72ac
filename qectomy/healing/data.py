"""Which text a run trains on, validates on and is measured on, and which of it the reduced model was fitted on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.errors import TextError
from qectomy.eval.evaluate import fitted_on
from qectomy.eval.protocol import Protocol, ScoringWindows, scoring_windows
from qectomy.healing.export import fitted_report
from qectomy.healing.settings import HealSettings
from qectomy.progress import Progress
from qectomy.record.texts import Overlap
from qectomy.text.documents import Documents, Reading, own_hash
from qectomy.text.overlap import FittedSpans, overlap
from qectomy.text.packing import Packed, Reserved, pack
from qectomy.text.text import Source, load_tokenizer, read_source, text_of
from qectomy.text.windows import Opening, first_tokens


def prepare(
    folder: Path, student: Checkpoint, settings: HealSettings, names: list[str], tokens: int, progress: Progress | None
) -> tuple[Packed, ScoringWindows]:
    """Pack at most `tokens` of the texts to train on into `folder`; return that, and the windows to measure on.

    What an earlier process packed there is kept.
    """
    vocab_size = student.dims.vocab_size
    tokenizer = load_tokenizer(student.folder)
    given = Reading(field=settings.field, tokenizer=lambda: tokenizer)
    # --field is of texts that are given: what the original wrote has a field of its own.
    reading = replace(given, field=None) if settings.self_generated else given
    hashes = [own_hash(name) or name for name in names]
    fitted = {name: fitted_span(student, name, own) for name, own in zip(names, hashes, strict=True)}
    reserved = {name: Reserved(fitted=stop) for name, (_, stop) in fitted.items()}
    if twice := [name for name, own in zip(names, hashes, strict=True) if hashes.count(own) > 1]:
        raise TextError(f"the same text is given twice ({', '.join(twice)}); give each once")
    measured, start = settings.eval_tokens, 0
    if settings.eval_text:
        source = read_source(settings.eval_text, given)
        for name, own in zip(names, hashes, strict=True):
            if own in (source.sha256, settings.eval_text):
                reserved[name] = replace(reserved[name], stop=measured)
    else:
        source, start, measured = _own_eval_text(settings, tokenizer, names[0], fitted[names[0]], reading)
        untouched = fitted[names[0]][0] if start == 0 else 0  # convert measured on all of it
        reserved[names[0]] = replace(reserved[names[0]], start=start, stop=max(start + measured, untouched))
    held = scoring_windows(tokenizer, source, Protocol(context=settings.context, tokens=measured), vocab_size)
    was_fitted = not settings.eval_text and start < fitted[names[0]][1] and fitted[names[0]][0] < start + measured
    packed = Packed.kept(folder) or pack(
        tokenizer,
        names,
        folder,
        context=settings.context,
        tokens=tokens,
        validation_tokens=settings.validation_tokens,
        vocab_size=vocab_size,
        reserved=reserved,
        reading=reading,
        spans=FittedSpans(held.text, fitted_on(fitted_report(student))),
        progress=progress,
    )
    found = Overlap(**packed.spans.get("overlap", overlap("", None)))
    told = held.report.model_copy(update={"first_token": start, "fitted_on": was_fitted, "overlap": found})
    return packed, replace(held, report=told)


def _own_eval_text(
    settings: HealSettings, tokenizer: Any, name: str, fitted: tuple[int, int], reading: Reading
) -> tuple[Source, int, int]:
    """Return (text to measure on, its first token, tokens), where none was given: the start of the first text.

    Where the reduced model was fitted on that start, what follows it; the start all the same where nothing does. An
    eighth of a short text at most.
    """
    untouched = fitted[0] >= settings.context
    start, most = (0, fitted[0]) if untouched else (fitted[1], settings.eval_tokens)
    wanted = 8 * max(settings.eval_tokens, settings.context)
    source, there = text_from(tokenizer, Documents(name, reading), start, wanted)
    if start and there < 8 * settings.context:
        start = 0
        source, there = text_from(tokenizer, Documents(name, reading), start, wanted)
    tokens = min(settings.eval_tokens, most, there // 8) // settings.context * settings.context
    return source, start, max(settings.context, tokens)


def text_from(tokenizer: Any, documents: Documents, start: int, tokens: int) -> tuple[Source, int]:
    """Return a text from its token `start` on, `tokens` tokens and some more or all that there is, and their number."""
    opening = Opening(documents.pieces())
    found = first_tokens(tokenizer, opening, start + tokens, places=True)
    text = opening.text
    if start:
        rest = found.ids[start:]
        text = "" if not rest else text[found.places[start][0] :] if found.places else text_of(tokenizer, rest)
    own = (Path(documents.name).name, documents.sha256) if documents.is_file else (documents.name, "")
    return Source(*own, text, documents.read_as), len(first_tokens(tokenizer, text, tokens).ids)


def fitted_span(student: Checkpoint, name: str, own: str) -> tuple[int, int]:
    """Return which tokens [start, stop) of a text the reduced checkpoint was fitted on, by its qectomy.json.

    `own`: a file's sha256; a dataset is known by its name alone.
    """
    report = fitted_report(student)
    for text in report.calibration.texts if report and report.calibration else ():
        if own == (text.file if own == name else text.sha256):
            return text.first_token, text.first_token + text.tokens
    return 0, 0
