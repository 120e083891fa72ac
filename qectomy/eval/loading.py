"""Load whole models, original or reduced, without running code of the folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qectomy.checkpoint.checkpoint import MAX_LAYERS, Checkpoint, locate, open_checkpoint, read_config_json
from qectomy.checkpoint.config_files import load_config
from qectomy.checkpoint.headers import FLOAT_BYTES, TORCH_NAMES, read_headers
from qectomy.checkpoint.stored_tensors import is_quantized
from qectomy.errors import CheckpointError, NonFiniteError, QectomyError, note, reason_of, shown
from qectomy.models.architectures import FAMILIES

COUNTS_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DTYPES = [TORCH_NAMES[kind] for kind in ("F32", "BF16", "F16", "F64")]


def load_model(name: str, dtype: str | None, device: str) -> tuple[Any, Path, str]:
    """Load any causal model; return (model, folder, dtype name). On device `meta` its weights stay on disk.

    `dtype` None: the type in which most of the weights are stored, whatever config.json says. A model of a family that
    Qectomy knows is loaded as `open_checkpoint` opens it, field for field. Code in the folder is never run. Raises
    CheckpointError when a tensor is missing or left over.
    """
    from transformers import AutoModelForCausalLM

    check_dtype(dtype)
    folder, config = locate(name), _json_config(name)
    opened = _opened(name, config)
    family = None if opened is None else opened.family
    try:
        if opened is None:
            loader, options = AutoModelForCausalLM, {"trust_remote_code": False}
        else:
            loader = opened.family.causal_class(opened.reduced)
            options = {"config": load_config(opened.family, opened.config, opened.reduced)}
        with _quietly():
            model, info = loader.from_pretrained(
                folder,
                dtype=dtype or _stored_dtype(folder, opened),
                output_loading_info=True,
                use_safetensors=True,
                device_map="meta" if device == "meta" else None,
                **options,
            )
    except QectomyError:
        raise
    except Exception as error:  # transformers raises many kinds; the message is what the user needs
        raise _not_loaded(folder, config, error) from error
    if opened is not None and not opened.indices_told:
        note(
            f"{folder}: config.json has no index_sha256, so it is not known whether the channel numbers (query.index "
            f"or pivots) are those that were written. To add it: qectomy renew {folder}"
        )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(name) for name in info.get(kind) or ()]
        if kind == "unexpected_keys" and family is not None:
            names = [name for name in names if not name.endswith(family.ignored_suffixes)]
        if names:
            raise CheckpointError(f"{folder}: {kind.replace('_', ' ')}: {sorted(names)[:3]}")
    return model.to(device).eval(), folder, str(model.dtype).removeprefix("torch.")


@contextmanager
def _quietly() -> Iterator[None]:
    """Let transformers load without bars and warnings, for which errors come here; then as the caller had it."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def read_config(name: str) -> Any:
    """Return the config of any causal model, its weights unread and its code never run."""
    from transformers import AutoConfig

    folder, config = locate(name), _json_config(name)
    if (opened := _opened(name, config)) is not None:
        return load_config(opened.family, opened.config, opened.reduced)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=True)
    except Exception as error:
        raise _not_loaded(folder, config, error) from error


def _opened(name: str, config: dict[str, Any]) -> Checkpoint | None:
    """Return the checkpoint as every other command opens it; None for one that only transformers can load."""
    model_type = str(config.get("model_type"))
    reduced = any(model_type == family.reduced_model_type for family in FAMILIES.values())
    if not reduced and model_type not in FAMILIES:
        return None
    if config.get("quantization_config") is not None and is_quantized(read_headers(locate(name)).values()):
        return None
    try:
        return open_checkpoint(name, reduced=reduced)
    except CheckpointError as error:
        if name in str(error):
            raise
        raise CheckpointError(f"{name}: {error}") from error  # one of several that are measured


def _stored_dtype(folder: Path, opened: Checkpoint | None) -> str:
    """Return the type that holds most of the weights; "auto", transformers' choice, for what is quantized."""
    if opened is not None:
        return TORCH_NAMES[opened.dtype]
    found = read_headers(folder).values()
    bytes_of = {kind: sum(info.nbytes for info in found if info.dtype == kind) for kind in FLOAT_BYTES}
    if is_quantized(found) or not any(bytes_of.values()):
        return "auto"
    return TORCH_NAMES[max(bytes_of, key=lambda kind: bytes_of[kind])]


@contextmanager
def naming_dtype(name: str, asked: str | None, taken: str) -> Iterator[None]:
    """Let an error that is about NaN say in which type the model computed, and why in that."""
    try:
        yield
    except NonFiniteError as error:
        why = "which --dtype asks for" if asked else f"in which {name} is stored"
        wider = "" if taken in ("float32", "float64") else "; --dtype float32 has a wider range"
        raise NonFiniteError(f"{error}. It was computed in {taken}, {why}{wider}") from error


def check_dtype(dtype: str | None) -> None:
    """Raise QectomyError for a type that nothing is computed in."""
    if dtype is not None and dtype not in DTYPES:
        raise QectomyError(f"unknown --dtype {dtype!r}; known: {', '.join(DTYPES)}")


def _json_config(name: str) -> dict[str, Any]:
    folder = locate(name)
    path, config = folder / "config.json", read_config_json(folder)
    inner = [value for value in config.values() if isinstance(value, dict)]  # as in text_config
    for fields in (config, *inner):
        for field in COUNTS_OF_LAYERS:  # transformers makes lists, and modules, of so many
            if isinstance(count := fields.get(field), int) and count > MAX_LAYERS:
                raise CheckpointError(f"{path}: {field} {shown(count)} is beyond any model ({MAX_LAYERS})")
    return config


def _not_loaded(folder: Path, config: dict[str, Any], error: Exception) -> CheckpointError:
    reason = reason_of(error, 300)
    return CheckpointError(f"{folder} (model_type {shown(config.get('model_type'))}) cannot be loaded: {reason}")
