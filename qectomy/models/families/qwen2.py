"""Qwen 2 and 2.5: Llama with biases of queries, keys and values, and a sliding window in some layers."""

from dataclasses import dataclass
from typing import Any

from qectomy.errors import shown
from qectomy.models.config_checks import check_window
from qectomy.models.families.llama import LLAMA_FIELDS, LlamaFamily

KINDS = ("full_attention", "sliding_attention")


@dataclass(frozen=True, kw_only=True)
class Qwen2Family(LlamaFamily):
    def check_config(self, config: Any) -> None:
        check_window(config.sliding_window)
        kinds, n_layers = config.layer_types, config.num_hidden_layers
        if len(kinds) != n_layers or any(kind not in KINDS for kind in kinds):
            raise ValueError(f"layer_types must name {' or '.join(KINDS)} for {n_layers} layers, got {shown(kinds)}")
        if config.sliding_window is None and KINDS[1] in kinds:
            raise ValueError("layer_types names sliding_attention, and there is no sliding_window in use")
        super().check_config(config)

    def shortened(self, config: dict[str, Any], n_layers: int) -> dict[str, Any]:
        kinds = config.get("layer_types")
        return super().shortened(config, n_layers) | ({"layer_types": kinds[:n_layers]} if kinds else {})

    def sliding_window(self, config: Any, layer: int) -> int | None:
        window: int | None = config.sliding_window
        return window if config.layer_types[layer] == KINDS[1] else None


FAMILY = Qwen2Family(
    model_type="qwen2",
    class_stem="Qwen2",
    tokenizer_class="Qwen2Tokenizer",
    vocabularies=("tokenizer.json", "vocab.json"),
    keeps_tokenizer_class=False,
    mlx_modeling=None,
    biases="of q, k and v",
    fields=(*LLAMA_FIELDS, "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    defaults=(("num_key_value_heads", 32), ("max_position_embeddings", 32768)),
)
