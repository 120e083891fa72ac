"""Make a checkpoint whose W_Q goes exactly: a GPT-2 or Llama without norms or skips, random weights, every one of them.

    python benchmarks/variant_model.py OUT --family gpt2 --without norms mlp_skip --dtype float64

GPT-2 small's shape by default (124 million parameters); `--set n_layer=6` overrides any field of the config. Matrices
are Gaussian with a deviation of 1 / sqrt(inputs), biases of 0.1, so that states neither vanish nor blow up. The weights
are of no use but to be folded.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from qectomy.models.architectures import FAMILIES

PARTS = ("norms", "attention_skip", "mlp_skip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="gpt2")
    parser.add_argument("--without", nargs="*", choices=PARTS, default=[])
    parser.add_argument("--shared-layers", action="store_true")
    parser.add_argument("--dtype", default="float64", choices=("float64", "float32", "bfloat16"))
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fields = {name: json.loads(value) for name, value in (part.split("=", 1) for part in options.set)}
    fields |= dict.fromkeys(options.without, False)
    make(options.out, options.family, options.dtype, options.seed, shared_layers=options.shared_layers, **fields)


@torch.no_grad()
def make(out: Path, family: str, dtype: str, seed: int = 0, **fields: Any) -> None:
    """Save a model of one of our classes with random weights."""
    config_class, model_class = (
        getattr(FAMILIES[family], kind)(reduced=True) for kind in ("config_class", "causal_class")
    )
    model = model_class(config_class(**fields)).to(getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    for name, parameter in model.named_parameters():
        conv1d = family == "gpt2" and id(parameter) not in embeddings and "wpe" not in name
        inputs = parameter.shape[0] if conv1d else parameter.shape[-1]
        deviation = 0.1 if parameter.ndim == 1 else 1.0 if id(parameter) in embeddings else inputs**-0.5
        noise = deviation * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + noise if parameter.ndim == 1 and name.endswith("weight") else noise)
    model.save_pretrained(out)


if __name__ == "__main__":
    main()
