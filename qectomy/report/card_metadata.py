"""The YAML block of a model card, as the Hub reads it: base model, licence, tags and measured results.

What is carried over from the source's own card is data of strangers: each field is checked for the shape that the
Hub allows, and a card that cannot be read counts as none.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.record.reduced import Exact, Reduced

CARD_BYTES = 256_000  # read of the source's card; the fields that matter stand at its top
SHORT = 200  # characters of a field that is carried over


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What is known of where the source comes from."""

    hub_id: str | None = None  # None: a local folder, whose name is no hub id
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | list[str] | None = None


def origin(source: Checkpoint) -> Origin:
    """Return the source's hub id, if it is known, and what its card says of licence and language."""
    fields, hub_id = _card_fields(source.folder / "README.md"), _hub_id(source)
    return Origin(
        hub_id=hub_id,
        license=_names(fields.get("license"), r"[a-z0-9][a-z0-9.+-]*"),
        license_name=_text(fields.get("license_name"), r"[\w.+ -]+"),
        license_link=_link(fields.get("license_link"), source.folder, hub_id),
        language=_names(fields.get("language"), r"[A-Za-z]{2,12}(-[A-Za-z0-9]+)*"),
    )


def card_metadata(report: Reduced, name: str, known: Origin) -> str:
    """Return the lines between a card's two `---`."""
    from huggingface_hub import ModelCardData

    exact, results = isinstance(report, Exact), eval_results(report)
    more: dict[str, Any] = {}
    if known.hub_id is not None and not exact:
        # Of the Hub's four relations the one that is true: weights were fitted on text. None is of an exact folding.
        more["base_model_relation"] = "finetune"
    data = ModelCardData(
        base_model=known.hub_id,
        language=known.language,
        license=known.license,  # type: ignore[arg-type]  # the Hub takes several, too
        license_name=known.license_name,
        license_link=known.license_link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["qectomy"] if exact else ["qectomy", "query-free-attention"],
        model_name=name if results else None,
        eval_results=results or None,
        **more,
    )
    return data.to_yaml()


def eval_results(report: Reduced) -> list[Any]:
    """Return what was measured of the reduced model, for the card's model-index; nothing without perplexity."""
    from huggingface_hub import EvalResult

    if report.perplexity is None:
        return []
    protocol, perplexity = report.perplexity.protocol, report.perplexity
    measured = {
        "perplexity": ("Perplexity", perplexity.after),
        "perplexity_ratio": ("Perplexity, as a multiple of the original's", perplexity.ratio),
        "word_perplexity": ("Word perplexity", report.word_perplexity and report.word_perplexity.after),
        "bits_per_byte": ("Bits per byte", report.bits_per_byte and report.bits_per_byte.after),
        "kl_divergence": ("Mean KL to the original, nats a token", report.kl),
        "top1_agreement": ("Share of tokens with the original's most likely next token", report.top1_agreement),
    }
    text = one_line(protocol.text)
    config, split = _dataset(text)[1:]
    conditions = {
        "sha256": protocol.text_sha256,
        "context": protocol.context,
        "stride": protocol.stride,
        "scored_tokens": protocol.scored_tokens,
        "dtype": protocol.dtype,
    }
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=_dataset(text)[0],
            dataset_name=text,
            dataset_config=config,
            dataset_split=split,
            dataset_args=conditions,
            metric_type=kind,
            metric_name=name,
            metric_value=value,
        )
        for kind, (name, value) in measured.items()
        if value is not None
    ]


def one_line(text: str) -> str:
    """Return a name without line breaks, control characters and what is no Unicode."""
    text = text.encode("utf-8", errors="replace").decode()
    return " ".join("".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in text).split())


def _dataset(text: str) -> tuple[str, str | None, str | None]:
    """Return (dataset id, config, split) of a text given as a dataset of the Hub; `text` for a file of one's own.

    A file is reported by its name alone, so a slash is a dataset's.
    """
    repo, _, rest = text.partition(":")
    config, _, split = rest.partition(":")
    if "/" not in repo or not is_hub_id(repo):
        return "text", None, None
    return repo, config or None, split or "train"


def _hub_id(source: Checkpoint) -> str | None:
    """Return the id under which the source was asked of the Hub, or lies in its cache as models--ORG--NAME.

    A local folder's own name has no slash, and is no id even where a model is called the same. The config's
    `_name_or_path` is none either: it is where whoever saved the model once had it, or another one, from.
    """
    snapshots = source.folder.resolve().parent
    name = source.name
    if "/" not in name:
        cached = snapshots.name == "snapshots" and snapshots.parent.name.startswith("models--")
        name = snapshots.parent.name.removeprefix("models--").replace("--", "/") if cached else ""
    return name if is_hub_id(name) else None


def is_hub_id(name: str) -> bool:
    """Whether this is the form of a model's or dataset's id on the Hub, NAME or ORG/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _card_fields(path: Path) -> dict[str, Any]:
    """Return licence and language of a card's YAML block, as they are; none if there is no card, or a broken one."""
    from huggingface_hub import RepoCard  # ModelCard refuses all of a card for one odd result in its model-index

    try:
        if not path.is_file():
            return {}
        with path.open("rb") as file:
            text = file.read(CARD_BYTES).decode("utf-8", errors="replace").removeprefix("\ufeff")
        if not text.lstrip().startswith("---"):
            return {}
        data = RepoCard(text).data
        return {name: data.get(name) for name in ("license", "license_name", "license_link", "language")}
    except Exception:  # YAML fails in many ways, and no conversion should with it
        return {}


def _link(value: Any, folder: Path, hub_id: str | None) -> str | None:
    """Return a web address; a licence file goes along by its name, another file is where the Hub has it."""
    if (address := _text(value, r"https?://[^\s<>\"'`()\[\]]+")) is not None:
        return address
    name = _text(value, r"[\w-][\w.-]*")
    if name is None or (name.startswith(("LICENSE", "NOTICE")) and (folder / name).is_file()):
        return name
    return None if hub_id is None else f"https://huggingface.co/{hub_id}/blob/main/{name}"


def _text(value: Any, pattern: str) -> str | None:
    whole = isinstance(value, str) and len(value) <= SHORT and re.fullmatch(pattern, value)
    return value if whole else None


def _names(value: Any, pattern: str) -> str | list[str] | None:
    """Return a name, or the good ones of a list of them; one alone is not a list."""
    entries = value[:SHORT] if isinstance(value, list) else [value]
    entries = ["no" if entry is False else entry for entry in entries]  # Norwegian, as YAML reads it
    good = [name for entry in entries if (name := _text(entry, pattern)) is not None]
    return good if len(good) > 1 else good[0] if good else None
