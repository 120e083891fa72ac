"""Qectomy takes W_Q out of pretrained GPT-2, Llama, Mistral and Qwen 2 models and says what that cost.

After `import qectomy`, `AutoModelForCausalLM.from_pretrained(reduced_folder)` needs no trust flag. The reduced
classes are registered when transformers first asks for one of their model types, so importing this package
loads neither torch nor transformers.

The functions of the command line are here too, each loaded when it is first asked for: docs/python.md.
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

if TYPE_CHECKING:
    from qectomy.api.bench import bench
    from qectomy.api.convert import convert
    from qectomy.api.evaluate import evaluate
    from qectomy.api.fold_norms import fold_norms
    from qectomy.api.heal import heal
    from qectomy.api.import_nanogpt import import_nanogpt
    from qectomy.api.inspect import inspect
    from qectomy.api.materialize import materialize
    from qectomy.api.page import page
    from qectomy.api.renew import renew
    from qectomy.api.verify import verify
    from qectomy.errors import QectomyError

__version__ = "0.1.0"
__all__ = [
    "QectomyError",
    "bench",
    "convert",
    "evaluate",
    "fold_norms",
    "heal",
    "import_nanogpt",
    "inspect",
    "materialize",
    "page",
    "renew",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = "qectomy.errors" if name == "QectomyError" else f"qectomy.api.{name}"
    return getattr(import_module(where), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisterOnDemand(dict[str, Any]):
    """transformers' table of registered configs, which fills in ours when one is looked up.

    Registering at import would load the Llama classes while transformers' Auto modules are half loaded.
    """

    def __contains__(self, model_type: object) -> bool:
        if isinstance(model_type, str) and model_type.startswith("qectomy_") and not super().__contains__(model_type):
            register()
        return super().__contains__(model_type)


def register() -> None:
    """Make transformers' Auto classes know every reduced family."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from qectomy.models.architectures import FAMILIES

    for family in FAMILIES.values():
        config = family.config_class(reduced=True)
        AutoConfig.register(family.reduced_model_type, config, exist_ok=True)
        AutoModel.register(config, family.base_class(reduced=True), exist_ok=True)
        AutoModelForCausalLM.register(config, family.causal_class(reduced=True), exist_ok=True)


@when_imported("transformers.models.auto.configuration_auto")
def _watch_config_lookups(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _RegisterOnDemand(mapping._extra_content)
