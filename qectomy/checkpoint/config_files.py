"""Everything of a checkpoint folder that is not weights: config.json, tokenizer, model code, licence.

What goes along as it is must be the folder's own: a link in it that leads elsewhere could carry a private file into an
output that is published. The blobs of the hub's cache, to which its snapshots and its older local folders are links,
are as good as the folder. What is only read may lie anywhere.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.checkpoint.headers import TORCH_NAMES, read_json
from qectomy.errors import CheckpointError, shown
from qectomy.models.architectures import FAMILIES
from qectomy.models.family import Family
from qectomy.models.query_maps import QueryMapSpec

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model*",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
)
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = ("tokenizer.json", "vocab.json", "tokenizer.model")  # the first one that is there is read
CARRIED = (*TOKENIZER_FILES, "generation_config.json", "LICENSE*", "NOTICE*")
CODE_OR_WEIGHTS = (".py", ".pyc", ".so", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".safetensors")
MAX_CARRIED_BYTES = 200_000_000
BLOB_NAME = "[0-9a-f]{40}|[0-9a-f]{64}"  # git's sha1, or a sha256
VARIANT = ("softmax_scale", "norms", "attention_skip", "mlp_skip", "shared_layers")  # which only our classes read
DROPPED = (  # of an original's or a reduced model's config.json: written anew, or of no use to the other
    "architectures",
    "auto_map",
    "model_file",
    "query_maps",
    "value_maps",
    "output_maps",
    "index_sha256",
    *VARIANT,
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
)


def reduced_config(source: Checkpoint, recipe: tuple[QueryMapSpec, ...], dtype: str) -> dict[str, Any]:
    """Return the config.json of the reduced model; `dtype` is safetensors' name of the stored type."""
    kept = {key: source.config[key] for key in VARIANT if key in source.config} if source.reduced else {}
    return _base_config(source, dtype) | reduced_fields(source.family, recipe) | kept


def reduced_fields(family: Family, recipe: tuple[QueryMapSpec, ...]) -> dict[str, Any]:
    """Return what the config.json of a reduced model says beside the original's fields."""
    others = {"value": [spec.value for spec in recipe], "output": [spec.output for spec in recipe]}
    return {
        "model_type": family.reduced_model_type,
        "architectures": [f"Qectomy{family.class_stem}ForCausalLM"],
        **code_fields(family),
        "query_maps": [str(spec) for spec in recipe],
        **{f"{role}_maps": names for role, names in others.items() if set(names) != {"dense"}},
    }


def code_fields(family: Family) -> dict[str, Any]:
    """Return how the config.json of a reduced model names the code beside it: to transformers, and to mlx-lm."""
    stem = f"{family.modeling}.Qectomy{family.class_stem}"
    auto_map = {
        "AutoConfig": f"{stem}Config",
        "AutoModel": f"{stem}Model",
        "AutoModelForCausalLM": f"{stem}ForCausalLM",
    }
    return {"auto_map": auto_map} | ({"model_file": f"{family.mlx_modeling}.py"} if family.mlx_modeling else {})


def with_code(family: Family, config: dict[str, Any], reduced: bool) -> dict[str, Any]:
    """Return a config.json that names the code which travels with it, and no other."""
    config = {key: value for key, value in config.items() if key not in ("auto_map", "model_file")}
    return config | code_fields(family) if reduced else config


def stock_config(source: Checkpoint, dtype: str) -> dict[str, Any]:
    """Return the config.json of the original family, for a materialised checkpoint."""
    config = _base_config(source, dtype) | source.family.stock_fields(source.dims)
    config["model_type"] = source.family.model_type
    config["architectures"] = [f"{source.family.class_stem}{source.family.causal_suffix}"]
    return config


def load_config(family: Family, raw: dict[str, Any], reduced: bool = False) -> Any:
    """Return transformers' config object for a parsed config.json."""
    dropped = ("model_type", "auto_map", "architectures", "dtype", "torch_dtype")  # the tensors say their own
    fields = {key: value for key, value in raw.items() if key not in dropped}
    try:
        config = family.config_class(reduced)(**fields)
        _check_sizes(family, raw, config)
        if not -config.vocab_size <= (config.pad_token_id or 0) < config.vocab_size:
            raise ValueError(f"pad_token_id {config.pad_token_id} lies outside the vocabulary")
        family.check_config(config)
    except Exception as error:  # transformers has no one kind of error for a config that it cannot use
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"config.json is not a valid {family.model_type} config: {reason}") from error
    return config


def _check_sizes(family: Family, raw: dict[str, Any], config: Any) -> None:
    """Raise ValueError where transformers reads another size than we do: GPT-2's sizes go by two names each."""
    dims = family.dimensions(raw)
    fields = dict(num_hidden_layers="n_layers", hidden_size="d_model", num_attention_heads="n_heads")
    fields |= dict(vocab_size="vocab_size") | (dict(max_position_embeddings="n_positions") if family.positions else {})
    for field, name in fields.items():
        if getattr(config, field) != getattr(dims, name):
            raise ValueError(f"{field} is said to be {shown(getattr(config, field))} and {getattr(dims, name)}")


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json_text(config), encoding="utf-8")


def json_text(value: dict[str, Any], sort: bool = True) -> str:
    """Return JSON as the files of a checkpoint hold it."""
    return json.dumps(value, indent=2, sort_keys=sort) + "\n"


def write_reduced_config(folder: Path, config: dict[str, Any]) -> None:
    """Write the config.json of a reduced model beside its weights, with the sha256 of its channel numbers."""
    write_config(folder, {key: value for key, value in config.items() if key != "index_sha256"})
    if any(digests := open_checkpoint(folder, reduced=True).index_digests()):
        write_config(folder, config | {"index_sha256": digests})


def copy_companions(source: Path, folder: Path, patterns: tuple[str, ...] = CARRIED) -> None:
    """Copy tokenizer, generation config and licence files; never code, never weights.

    Where the tokenizer's files leave its class to the model's type, the copy names it: a type of ours has none.
    """
    named = tokenizer_class(source) or (None if (source / "config.json").is_file() else tokenizer_class(source, folder))
    for file in copied_companions(source, patterns):
        shutil.copyfile(file, folder / file.name)
    if named is not None:
        fields = _fields(folder / TOKENIZER_CONFIG) | {"tokenizer_class": named}
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def tokenizer_class(folder: Path, model: Path | None = None) -> str | None:
    """Return the name of transformers' class for a tokenizer, where its files name none or are not asked; else None.

    `model`: the folder whose config.json says what it is a tokenizer of, if not this one. Llama's class is for
    sentencepiece's own file: a tokenizer.json says all of itself, and may be of any kind.
    """
    config = _fields((model or folder) / "config.json")
    said = [fields.get("tokenizer_class") for fields in (config, _fields(folder / TOKENIZER_CONFIG))]
    family = FAMILIES.get(str(config.get("model_type")).removeprefix("qectomy_"))
    if family is None or (any(said) and family.keeps_tokenizer_class):
        return None
    vocabulary = next((name for name in VOCABULARIES if (folder / name).is_file()), None)
    return family.tokenizer_class if vocabulary in family.vocabularies else None


def _fields(path: Path) -> dict[str, Any]:
    """Return the fields of a JSON file, none where it is missing."""
    found = read_json(path) if path.is_file() else {}
    return found if isinstance(found, dict) else {}


def copied_companions(source: Path, patterns: tuple[str, ...] = CARRIED) -> list[Path]:
    """Return the files that `copy_companions` copies. Raises CheckpointError for a link to elsewhere."""
    files = companions(source, patterns)
    for file in files:
        if not _is_own(source, file.resolve()):
            raise CheckpointError(
                f"{file} is a link to {file.resolve()}, outside its folder; it would be copied into the output. "
                "Put the file itself in its place, or remove the link"
            )
    return [file for file in files if file.stat().st_size <= MAX_CARRIED_BYTES]


def companions(source: Path, patterns: tuple[str, ...] = CARRIED) -> list[Path]:
    """Return the files of a checkpoint that are neither code nor weights, wherever their links lead."""
    found = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.suffix not in CODE_OR_WEIGHTS)


def _is_own(source: Path, target: Path) -> bool:
    """Whether a file lies in the folder, or is a blob of the hub's cache, which is named by its hash.

    HUB/models--NAME/snapshots/REVISION/ has its blobs in HUB/models--NAME/blobs/ or, shared, in HUB/blobs/; either can
    be a link to another disk. Older local folders link to HUB/models--NAME/blobs/ from wherever they are.
    """
    folder = source.resolve()
    if target.is_relative_to(folder):
        return True
    beside = []
    if folder.parent.name == "snapshots" and "--" in folder.parents[1].name:
        beside = [folder.parents[1] / "blobs", folder.parents[2] / "blobs"]
        if any(target.is_relative_to(blobs) for blobs in beside):
            return True
    in_cache = target.parent.name == "blobs" and target.parents[1].name.startswith("models--")
    in_cache = in_cache or any(target.is_relative_to(blobs.resolve()) for blobs in beside)
    return in_cache and re.fullmatch(BLOB_NAME, target.name) is not None


def copy_model_code(family: Family, folder: Path) -> None:
    """Put the stand-alone model files beside the weights."""
    for file in model_files(family):
        shutil.copyfile(file, folder / file.name)


def model_code(family: Family) -> Path:
    """Return the stand-alone model file of a family, which transformers runs."""
    return Path(__file__).parents[1] / "modeling" / f"{family.modeling}.py"


def model_files(family: Family) -> tuple[Path, ...]:
    """Return all model files that travel beside a family's weights; the first is transformers'."""
    code = model_code(family)
    return (code, code.with_name(f"{family.mlx_modeling}.py")) if family.mlx_modeling else (code,)


def has_model_code(family: Family, folder: Path) -> bool:
    """Whether the model files beside the weights are this version's, to the byte."""
    return not stale_model_files(family, folder)


def stale_model_files(family: Family, folder: Path) -> list[Path]:
    """Return this version's model files of which the folder has none, or other ones."""
    return [own for own in model_files(family) if not _same_bytes(own, folder / own.name)]


def _same_bytes(own: Path, beside: Path) -> bool:
    return beside.is_file() and beside.stat().st_size == own.stat().st_size and beside.read_bytes() == own.read_bytes()


def _base_config(source: Checkpoint, dtype: str) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key not in DROPPED}
    config["dtype"] = TORCH_NAMES[dtype]
    return config | source.family.older_fields(load_config(source.family, source.config, source.reduced))
