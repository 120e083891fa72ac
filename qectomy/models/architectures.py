"""The model families that there are: each file of `families/` is one. Everything else speaks of roles.

A family says which tensors its checkpoints hold, what each projection's orientation is, and which classes of
transformers (for the original) and of `modeling_qectomy_*` (for the reduced model) run a layer. To add one, write a
file with a `FAMILY`. Torch and transformers are imported only inside methods.
"""

import importlib
import pkgutil
from typing import Any

from qectomy.errors import UnsupportedArchitecture, shown
from qectomy.models import families
from qectomy.models.family import Family

FAMILIES: dict[str, Family] = {
    file.name: importlib.import_module(f"{families.__name__}.{file.name}").FAMILY
    for file in pkgutil.iter_modules(families.__path__)
}

QK_NORM_TYPES = ("qwen3", "qwen3_moe", "gemma3", "gemma3_text", "olmo2", "olmo3", "cohere2", "chameleon")


def find_family(config: dict[str, Any]) -> Family:
    """Return the family of an original checkpoint's config. Raises UnsupportedArchitecture saying why not."""
    model_type = config.get("model_type")
    known = ", ".join(FAMILIES)
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    if isinstance(model_type, str) and model_type.startswith("qectomy_"):
        maps = [config.get(field) or ["dense"] for field in ("value_maps", "output_maps")] + [config.get("query_maps")]
        if all(isinstance(names, list) and names and all(name == "dense" for name in names) for names in maps):
            return find_reduced_family(config)  # whole, though its class is ours: without norms or skips, say
        raise UnsupportedArchitecture(
            f"model_type {shown(model_type)}: this checkpoint is already reduced. Give the original one, or use "
            "`qectomy materialize` to write W_Q back."
        )
    if model_type in QK_NORM_TYPES:
        raise UnsupportedArchitecture(
            f"model_type {shown(model_type)} normalises queries after W_Q (QK-norm): no linear query map can stand in "
            f"for it. Supported types: {known}."
        )
    raise UnsupportedArchitecture(f"model_type {shown(model_type)} is not supported; supported types: {known}")


def find_reduced_family(config: dict[str, Any]) -> Family:
    """Return the family of a reduced checkpoint's config. Raises UnsupportedArchitecture for anything else."""
    for family in FAMILIES.values():
        if config.get("model_type") == family.reduced_model_type:
            return family
    known = ", ".join(family.reduced_model_type for family in FAMILIES.values())
    raise UnsupportedArchitecture(
        f"model_type {shown(config.get('model_type'))} is not a checkpoint that qectomy reduced; those are: {known}"
    )
