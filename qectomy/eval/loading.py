"""Load whole models, original or reduced, without running code of the folder."""

from pathlib import Path
from typing import Any

from qectomy.errors import CheckpointError, QectomyError, reason_of, shown
from qectomy.surgery.architectures import FAMILIES
from qectomy.surgery.checkpoint import MAX_LAYERS, locate
from qectomy.surgery.headers import TORCH_NAMES, read_json

COUNTS_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
DTYPES = [TORCH_NAMES[kind] for kind in ("F32", "BF16", "F16", "F64")]


def load_model(name: str, dtype: str | None, device: str) -> tuple[Any, Path, str]:
    """Load any causal model; return (model, folder, dtype name). On device `meta` its weights stay on disk.

    Code in the folder is never run. Raises CheckpointError when a tensor is missing or left over.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    check_dtype(dtype)
    folder, config = locate(name), _json_config(name)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            device_map="meta" if device == "meta" else None,
        )
    except Exception as error:  # transformers raises many kinds; the message is what the user needs
        raise _not_loaded(folder, config, error) from error
    family = FAMILIES.get(str(config.get("model_type")))
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(name) for name in info.get(kind) or ()]
        if kind == "unexpected_keys" and family is not None:
            names = [name for name in names if not name.endswith(family.ignored_suffixes)]
        if names:
            raise CheckpointError(f"{folder}: {kind.replace('_', ' ')}: {sorted(names)[:3]}")
    return model.to(device).eval(), folder, str(model.dtype).removeprefix("torch.")


def read_config(name: str) -> Any:
    """Return the config of any causal model, its weights unread and its code never run."""
    from transformers import AutoConfig

    folder, config = locate(name), _json_config(name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config(decoder=True)
    except Exception as error:
        raise _not_loaded(folder, config, error) from error


def check_dtype(dtype: str | None) -> None:
    """Raise QectomyError for a type that nothing is computed in."""
    if dtype is not None and dtype not in DTYPES:
        raise QectomyError(f"unknown --dtype {dtype!r}; known: {', '.join(DTYPES)}")


def _json_config(name: str) -> dict[str, Any]:
    path = locate(name) / "config.json"
    config = read_json(path)
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    inner = [value for value in config.values() if isinstance(value, dict)]  # as in text_config
    for fields in (config, *inner):
        for field in COUNTS_OF_LAYERS:  # transformers makes lists, and modules, of so many
            if isinstance(count := fields.get(field), int) and count > MAX_LAYERS:
                raise CheckpointError(f"{path}: {field} {shown(count)} is beyond any model ({MAX_LAYERS})")
    return config


def _not_loaded(folder: Path, config: dict[str, Any], error: Exception) -> CheckpointError:
    reason = reason_of(error, 300)
    return CheckpointError(f"{folder} (model_type {shown(config.get('model_type'))}) cannot be loaded: {reason}")
