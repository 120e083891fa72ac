"""Everything of a checkpoint folder that is not weights: config.json, tokenizer, model code, licence."""

import json
import shutil
from pathlib import Path
from typing import Any

from qectomy.errors import CheckpointError
from qectomy.surgery.architectures import Family
from qectomy.surgery.checkpoint import Checkpoint
from qectomy.surgery.headers import TORCH_NAMES
from qectomy.surgery.query_maps import QueryMapSpec

CARRIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model*",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
)
MAX_CARRIED_BYTES = 200_000_000


def reduced_config(source: Checkpoint, recipe: tuple[QueryMapSpec, ...], dtype: str) -> dict[str, Any]:
    """Return the config.json of the reduced model; `dtype` is safetensors' name of the stored type."""
    family = source.family
    config = _base_config(source, family.model_type, dtype)
    config["model_type"] = family.reduced_model_type
    stem = f"{family.modeling}.Qectomy{family.class_stem}"
    config["architectures"] = [f"Qectomy{family.class_stem}ForCausalLM"]
    config["auto_map"] = {
        "AutoConfig": f"{stem}Config",
        "AutoModel": f"{stem}Model",
        "AutoModelForCausalLM": f"{stem}ForCausalLM",
    }
    config["query_maps"] = [str(spec) for spec in recipe]
    return config


def stock_config(source: Checkpoint, dtype: str) -> dict[str, Any]:
    """Return the config.json of the original family, for a materialised checkpoint."""
    config = _base_config(source, source.family.model_type, dtype)
    config["model_type"] = source.family.model_type
    config["architectures"] = [f"{source.family.class_stem}ForCausalLM"]
    return config


def load_config(family: Family, raw: dict[str, Any], reduced: bool = False) -> Any:
    """Return transformers' config object for a parsed config.json."""
    dropped = ("model_type", "auto_map", "architectures", "dtype", "torch_dtype")  # the tensors say their own
    fields = {key: value for key, value in raw.items() if key not in dropped}
    try:
        config = family.config_class(reduced)(**fields)
        _check_parts(family, config)
    except Exception as error:  # transformers has no one kind of error for a config that it cannot use
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"config.json is not a valid {family.model_type} config: {reason}") from error
    return config


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config and licence files; never code, never weights."""
    for pattern in CARRIED:
        for file in sorted(source.glob(pattern)):
            carried = file.is_file() and file.suffix not in (".py", ".bin", ".pt", ".pth", ".safetensors")
            if carried and file.stat().st_size <= MAX_CARRIED_BYTES:
                shutil.copyfile(file, folder / file.name)


def copy_model_code(family: Family, folder: Path) -> None:
    """Put the stand-alone model file beside the weights."""
    name = f"{family.modeling}.py"
    shutil.copyfile(Path(__file__).parent / name, folder / name)


def _check_parts(family: Family, config: Any) -> None:
    """Raise for an activation or RoPE parameters that transformers takes in silence and fails on later."""
    import torch
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if config.hidden_act not in ACT2FN:
        raise ValueError(f"hidden_act {config.hidden_act!r} is not an activation that transformers knows")
    if not -config.vocab_size <= (config.pad_token_id or 0) < config.vocab_size:
        raise ValueError(f"pad_token_id {config.pad_token_id} lies outside the vocabulary")
    rope_type, known = config.rope_parameters["rope_type"], ("default", *ROPE_INIT_FUNCTIONS)
    if rope_type not in known:
        raise ValueError(f"rope_type {rope_type!r} is unknown; known: {', '.join(known)}")
    with torch.device("cpu"):  # whatever device the caller builds on
        frequencies = family.rotary(config).inv_freq
    if frequencies.shape != (config.head_dim // 2,) or not frequencies.isfinite().all():
        raise ValueError(f"rope_parameters do not give {config.head_dim // 2} finite frequencies")


def _base_config(source: Checkpoint, model_type: str, dtype: str) -> dict[str, Any]:
    drop = ("auto_map", "query_maps", "torch_dtype", "transformers_version", "_name_or_path", "architectures")
    config = {key: value for key, value in source.config.items() if key not in drop}
    config["dtype"] = TORCH_NAMES[dtype]
    # transformers 5 writes rope_parameters alone, and 4.57 then falls back to theta 10000 without a word.
    parameters = load_config(source.family, source.config, source.reduced).rope_parameters
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        config["rope_parameters"] = parameters
        config["rope_theta"] = parameters["rope_theta"]
        if parameters.get("rope_type", "default") != "default":
            config["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    return config
