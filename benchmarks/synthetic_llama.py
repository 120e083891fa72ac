"""Write a Llama of random weights in bfloat16, of any size: to see what a size costs where no such model is at hand.

Time and memory depend on shapes alone, not on what a model has learned. The tokenizer is the sample's, whose ids any of
the vocabularies here holds. One tensor is in memory at a time.
"""

import argparse
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from qectomy.checkpoint.shards import ShardWriter, TensorSpec

SAMPLE = Path(__file__).parents[1] / "samples/llama"
ROWS = 4096  # made at a time


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Llama; `n_layers` may be fewer than a model of that name has."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_mlp: int
    vocab: int
    tied: bool = True

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


SHAPES = {
    "0.1B": Shape(d_model=576, n_layers=30, n_heads=9, n_kv_heads=3, d_mlp=1536, vocab=49152),  # SmolLM2-135M's
    "0.5B": Shape(d_model=1024, n_layers=32, n_heads=16, n_kv_heads=4, d_mlp=4096, vocab=32768),
    "1B": Shape(d_model=2048, n_layers=16, n_heads=32, n_kv_heads=8, d_mlp=8192, vocab=128256),  # Llama-3.2-1B's
    "3B": Shape(d_model=3072, n_layers=32, n_heads=24, n_kv_heads=8, d_mlp=7168, vocab=32768),
    "8B": Shape(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=8, d_mlp=14336, vocab=128256, tied=False),
    "70B": Shape(d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8, d_mlp=28672, vocab=128256, tied=False),
}


def write_synthetic_llama(folder: Path, shape: Shape, seed: int = 0) -> int:
    """Write the checkpoint into a new folder; return how many parameters it has."""
    folder.mkdir(parents=True)
    tensors = _tensors(shape)
    generator = torch.Generator().manual_seed(seed)
    with ShardWriter(folder, {name: TensorSpec(size, "BF16") for name, size in tensors.items()}) as writer:
        for name, size in tensors.items():
            if len(size) == 1:
                writer.write(name, 1 + 0.1 * torch.randn(size, generator=generator))
                continue
            for start in range(0, size[0], ROWS):
                rows = min(ROWS, size[0] - start)
                writer.write_rows(name, start, size[1] ** -0.5 * torch.randn(rows, size[1], generator=generator))
        writer.finish()
    (folder / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SAMPLE / name, folder / name)
    return sum(torch.Size(size).numel() for size in tensors.values())


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Return every tensor's size by name, as the family's checkpoints have them."""
    d, kv = shape.d_model, shape.n_kv_heads * shape.d_head
    layer = {
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (shape.d_mlp, d),
        "mlp.up_proj": (shape.d_mlp, d),
        "mlp.down_proj": (d, shape.d_mlp),
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
    }
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, d)}
    for index in range(shape.n_layers):
        tensors |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    tensors["model.norm.weight"] = (d,)
    return tensors if shape.tied else {**tensors, "lm_head.weight": (shape.vocab, d)}


def _config(shape: Shape) -> dict[str, object]:
    sample = json.loads((SAMPLE / "config.json").read_text(encoding="utf-8"))
    return sample | {
        "hidden_size": shape.d_model,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "num_key_value_heads": shape.n_kv_heads,
        "head_dim": shape.d_head,
        "intermediate_size": shape.d_mlp,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="to write; it must not exist")
    parser.add_argument("--size", choices=SHAPES, default="3B")
    parser.add_argument("--layers", type=int, help="fewer than the size has")
    options = parser.parse_args()
    shape = SHAPES[options.size]
    if options.layers:
        shape = Shape(**asdict(shape) | {"n_layers": options.layers})
    print(f"{write_synthetic_llama(options.folder, shape):,} parameters in {options.folder}")


if __name__ == "__main__":
    main()
