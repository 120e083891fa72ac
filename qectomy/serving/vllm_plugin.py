"""The plugin that lets vLLM serve reduced folders without --trust-remote-code.

vLLM finds it by the entry point group `vllm.general_plugins` and calls `register` in each of its processes, some of
which load no model: vLLM's own models and torch are imported only where a reduced model is built.
"""

from qectomy import register as register_with_transformers
from qectomy.models.architectures import FAMILIES

MODEL = "qectomy.serving.vllm_models:TransformersForCausalLM"


def register() -> None:
    """Make transformers and vLLM know every reduced family. May be called any number of times."""
    from vllm.model_executor.models.registry import ModelRegistry  # type: ignore[import-not-found]

    register_with_transformers()
    for family in FAMILIES.values():
        ModelRegistry.register_model(f"Qectomy{family.class_stem}ForCausalLM", MODEL)
