"""What other engines drop of a materialised folder's config is said, and nothing else is."""

import json
import shutil

import pytest
from tiny_models import EVERY_MAP, ROPES

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.surgery.materialize import materialize

LLAMA3 = ROPES["llama3"] | {"rope_theta": 10000.0}
BOTH = ("llama.cpp", "CTranslate2")


def with_fields(folder, out, fields):
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | fields))
    return out


@pytest.mark.parametrize(
    "name, fields, dropped",
    [
        ("gpt2", {}, []),
        ("gpt2", {"activation_function": "gelu"}, []),
        ("gpt2", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True}, []),  # in W_Q
        ("gpt2", {"activation_function": "relu"}, [("llama.cpp", "activation_function", "relu")]),
        ("gpt2", {"layer_norm_epsilon": 1e-3}, [("CTranslate2", "layer_norm_epsilon", 1e-3)]),
        ("llama", {}, []),
        ("llama", {"rms_norm_eps": 1e-3}, []),
        ("llama", {"hidden_act": "relu"}, [(engine, "hidden_act", "relu") for engine in BOTH]),
        ("llama", {"rope_parameters": LLAMA3}, [("CTranslate2", "rope_parameters", None)]),
        ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8192}}, []),
        ("mistral-full", {}, []),
        ("mistral", {"sliding_window": 128}, []),  # as far as its positions go
        ("mistral", {}, [("llama.cpp", "sliding_window", 5)]),
    ],
)
def test_dropped_fields_are_told(tiny_reduced, tmp_path, name, fields, dropped):
    folder = with_fields(tiny_reduced(EVERY_MAP, name), tmp_path / "reduced", fields)
    told = materialize(open_checkpoint(folder, reduced=True), tmp_path / "stock")["warnings"]
    for one in told:
        if isinstance(one["value"], dict):  # the RoPE's, whole
            assert one["value"]["original_max_position_embeddings"] == 32
            one["value"] = None
        assert "nats" in one["measured"]
    assert [(one["engine"], one["field"], one["value"]) for one in told] == dropped
