"""Count what goes exactly from models of well-known shapes, as they are and without norms or skips.

    python benchmarks/structure_counts.py

From the configs alone, nothing being ill-conditioned: what stands is counted net, indices and untied heads included.
"""

from typing import Any

from setting import print_table

from qectomy.checkpoint.checkpoint import expected_tensors
from qectomy.checkpoint.headers import TensorInfo
from qectomy.models.architectures import FAMILIES
from qectomy.models.query_maps import QueryMapSpec
from qectomy.surgery.streams import derive_streams, structural_recipe

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2 small": ("gpt2", {}),
    "Llama-2-7B": (
        "llama",
        dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
    ),
    "Mistral-7B": (
        "mistral",
        dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    ),
}
STRUCTURES: dict[str, dict[str, bool]] = {
    "as it is": {},
    "no norms": dict(norms=False),
    "no norms, attention skip alone": dict(norms=False, mlp_skip=False),
    "no norms, no skips": dict(norms=False, mlp_skip=False, attention_skip=False),
    "no norms, one layer's weights for all": dict(norms=False, shared_layers=True),
}


def count(family_name: str, config: dict[str, Any]) -> tuple[int, int, str]:
    """Return the parameters before, those after, and how many W_Q and W_O are gone."""
    family = FAMILIES[family_name]
    dims = family.dimensions({**config, "model_type": family.reduced_model_type})
    recipe, folded = structural_recipe(derive_streams(dims))
    dense = (QueryMapSpec("dense"),) * dims.n_layers
    before, after = (
        sum(TensorInfo("", shape, "F32").numel for shape in expected_tensors(family, sizes, maps).values())
        for sizes, maps in ((dims, dense), (folded, recipe))
    )
    stored = recipe[: dims.n_stored]
    gone = [sum(spec.name == "identity" for spec in stored), sum(spec.output == "merged" for spec in stored)]
    return before, after, f"{gone[0]} and {gone[1]} of {len(stored)}"


def main() -> None:
    rows = []
    for name, (family, config) in MODELS.items():
        for structure, fields in STRUCTURES.items():
            before, after, gone = count(family, {**config, **fields})
            rows.append(
                [f"{name}, {structure}", f"{before:,}", f"{before - after:,}", f"{1 - after / before:.2%}", gone]
            )
    print_table(["model", "parameters", "go exactly", "share", "W_Q and W_O gone"], rows)


if __name__ == "__main__":
    main()
