"""What other engines are known to drop, in silence, of a stock config.json that they read.

What W_Q can hold `materialize` writes there; here is what stays. The effects are measured by
`benchmarks/engine_fields.py`: the engine's mean KL from transformers' predictions on the sample models, with the field
set as it says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LLAMA_CPP, CTRANSLATE2 = "llama.cpp", "CTranslate2"
TANH_GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
SILU = ("silu", "swish")


@dataclass(frozen=True, kw_only=True)
class DroppedField:
    """One field of one family's config.json that an engine does not read."""

    engine: str
    field: str
    kept: Callable[[Any], bool]  # config -> whether what the engine takes in its place is the same
    does: str
    measured: str


GPT2 = (
    DroppedField(
        engine=LLAMA_CPP,
        field="activation_function",
        kept=lambda config: config.activation_function in TANH_GELU,
        does="computes GELU by tanh whatever the activation is",
        measured="mean KL 0.67 nats for relu, on the sample GPT-2",
    ),
    DroppedField(
        engine=CTRANSLATE2,
        field="layer_norm_epsilon",
        kept=lambda config: config.layer_norm_epsilon == 1e-5,
        does="takes 1e-05 in every LayerNorm",
        measured="mean KL 0.004 nats for 0.001 and 1.5 for 0.1, on the sample GPT-2",
    ),
)
LLAMA = tuple(
    DroppedField(
        engine=engine,
        field="hidden_act",
        kept=lambda config: config.hidden_act in SILU,
        does="computes SiLU whatever the activation is",
        measured="mean KL 0.072 nats for gelu, on the sample Llama",
    )
    for engine in (LLAMA_CPP, CTRANSLATE2)
)
MISTRAL = (
    *LLAMA,
    DroppedField(
        engine=LLAMA_CPP,
        field="sliding_window",
        kept=lambda config: config.sliding_window is None or config.sliding_window >= config.max_position_embeddings,
        does="attends to all positions, not to the window's alone",
        measured="not measured",
    ),
)
DROPPED = {"gpt2": GPT2, "llama": LLAMA, "mistral": MISTRAL}


def dropped_fields(model_type: str, config: Any) -> list[dict[str, Any]]:
    """Return a warning for each field of a family's config (transformers' object) that an engine would drop."""
    return [
        {
            "engine": one.engine,
            "field": one.field,
            "value": getattr(config, one.field),
            "does": one.does,
            "measured": one.measured,
        }
        for one in DROPPED[model_type]
        if not one.kept(config)
    ]
