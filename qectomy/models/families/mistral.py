"""Mistral: Llama with a sliding window in every layer, and without biases."""

from dataclasses import dataclass
from typing import Any

from qectomy.models.config_checks import check_window
from qectomy.models.families.llama import LLAMA_FIELDS, LlamaFamily


@dataclass(frozen=True, kw_only=True)
class MistralFamily(LlamaFamily):
    def check_config(self, config: Any) -> None:
        check_window(config.sliding_window)
        super().check_config(config)

    def sliding_window(self, config: Any, layer: int) -> int | None:
        window: int | None = config.sliding_window
        return window


FAMILY = MistralFamily(
    model_type="mistral",
    class_stem="Mistral",
    biases="none",
    fields=(*LLAMA_FIELDS, "sliding_window"),
    defaults=(("num_key_value_heads", 8),),
)
