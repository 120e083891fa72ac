"""Scrambled nanoGPT checkpoints, as nanoGPT and the paper's repository save them.

D n_embd, M mlp_hidden_size. Layouts are nn.Linear's: (out, in).
"""

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch

ARGS: dict[str, Any] = dict(
    n_layer=2, num_heads=4, n_embd=32, block_size=24, vocab_size=320, bias=True, mlp_hidden_size=40, dropout=0.1
)
PAPER = dict(scale=0.5 * 8**-0.5, tie_weights=True)


@dataclass
class Made:
    """A scrambled nanoGPT checkpoint."""

    args: dict[str, Any]
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def save(self, path, **more):
        torch.save({"model_args": self.args, "model": self.state, "iter_num": 3, "config": {"x": [1]}, **more}, path)
        return path


def made(seed="nanogpt", drop=(), **changes) -> Made:
    args = {name: value for name, value in {**ARGS, **PAPER, **changes}.items() if name not in drop}
    D, M = args["n_embd"], args.get("mlp_hidden_size", 4 * args["n_embd"])
    mode = args.get("query_mode", "original")
    linear = {"attn.c_attn": ((2 if mode == "identity" else 3) * D, D), "attn.c_proj": (D, D)}
    linear |= {"mlp.c_fc": (M, D), "mlp.c_proj": (D, M)}
    generator = torch.Generator().manual_seed(zlib.crc32(repr((seed, sorted(args.items(), key=repr))).encode()))
    state = {
        "transformer.wte.weight": torch.randn(args["vocab_size"], D, generator=generator),
        "transformer.wpe.weight": torch.randn(args["block_size"], D, generator=generator),
    }
    for prefix in [*(f"transformer.h.{i}." for i in range(args["n_layer"]))]:
        for name, shape in linear.items():
            state[f"{prefix}{name}.weight"] = 1.5 * torch.randn(shape, generator=generator) * shape[1] ** -0.5
            if args["bias"]:
                state[f"{prefix}{name}.bias"] = 0.4 * torch.randn(shape[0], generator=generator)
    for norm in ["transformer.ln_f", *(f"transformer.h.{i}.ln_{j}" for i in range(args["n_layer"]) for j in (1, 2))]:
        state[f"{norm}.weight"] = 0.7 + 0.6 * torch.rand(D, generator=generator)
        if args["bias"]:
            state[f"{norm}.bias"] = 0.4 * torch.randn(D, generator=generator)
    tied = args.get("tie_weights", True)
    state["lm_head.weight"] = (
        state["transformer.wte.weight"] if tied else torch.randn(args["vocab_size"], D, generator=generator)
    )
    return Made(args, state)
