"""What other engines are known to drop, in silence, of a stock config.json that they read.

What W_Q can hold `materialize` writes there; here is what stays. The effects are measured by
`benchmarks/engine_fields.py`: the engine's mean KL from transformers' predictions on the sample models, with the field
set as it says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LLAMA_CPP, CTRANSLATE2 = "llama.cpp", "CTranslate2"
GELU = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate", "gelu", "gelu_python")
SILU = ("silu", "swish")
LLAMA3_POSITIONS = 8192


@dataclass(frozen=True, kw_only=True)
class DroppedField:
    """One field of a family's config.json that an engine does not read."""

    engine: str
    field: str
    kept: Callable[[Any], bool]  # config -> whether what the engine takes in its place is the same
    does: str
    measured: str


def _llama3_positions(config: Any) -> bool:
    rope = config.rope_parameters
    return rope["rope_type"] != "llama3" or rope.get("original_max_position_embeddings") == LLAMA3_POSITIONS


GPT2 = (
    DroppedField(
        engine=LLAMA_CPP,
        field="activation_function",
        kept=lambda config: config.activation_function in GELU,  # by erf or by tanh: 6e-7 nats apart
        does="computes GELU whatever the activation is",
        measured="mean KL 0.69 nats on the sample GPT-2 with relu, 0.18 with silu",
    ),
    DroppedField(
        engine=CTRANSLATE2,
        field="layer_norm_epsilon",
        kept=lambda config: config.layer_norm_epsilon == 1e-5,
        does="takes 1e-05 in every LayerNorm",
        measured="mean KL 0.004 nats on the sample GPT-2 with 0.001, 1.7 with 0.1",
    ),
)
LLAMA = (
    *(
        DroppedField(
            engine=engine,
            field="hidden_act",
            kept=lambda config: config.hidden_act in SILU,
            does="computes SiLU whatever the activation is",
            measured="mean KL 0.30 nats on the sample Llama with relu, 0.07 with gelu",
        )
        for engine in (LLAMA_CPP, CTRANSLATE2)
    ),
    DroppedField(
        engine=CTRANSLATE2,
        field="rope_parameters",
        kept=_llama3_positions,
        does=f"takes {LLAMA3_POSITIONS} as llama3's original_max_position_embeddings",
        measured="mean KL 0.36 nats on the sample Llama with 128",
    ),
)
MISTRAL = (
    *LLAMA,
    DroppedField(
        engine=LLAMA_CPP,
        field="sliding_window",
        kept=lambda config: config.sliding_window is None or config.sliding_window >= config.max_position_embeddings,
        does="attends to all positions before a token, not to the window's alone",
        measured="mean KL 0.016 nats on the sample Llama as a Mistral with a window of 64 tokens, over texts of 256",
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
        for one in DROPPED.get(model_type, ())
        if not one.kept(config)
    ]
