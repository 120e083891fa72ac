"""Greedy tokens by mlx-lm beside those of transformers, for reduced folders: 8 prompts, 32 tokens each, in float32.

    python benchmarks/serve_mlx.py FOLDER... --text samples/kjv_heldout.txt

It needs torch, transformers, mlx and mlx-lm in one environment. Exit status 1: a token differs.
"""

import argparse
import sys
from pathlib import Path

import mlx.core as mx
import torch
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model
from setting import print_table
from transformers import AutoModelForCausalLM, AutoTokenizer


def prompts(folder: Path, text: Path, count: int, length: int) -> torch.Tensor:
    """Return ids (count, length) from places spread over a text."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    ids = torch.tensor(tokenizer(text.read_text())["input_ids"])
    return torch.stack([ids[at : at + length] for at in range(0, len(ids) - length, len(ids) // count)][:count])


def compare(folder: Path, ids: torch.Tensor, new: int) -> tuple[int, int, float]:
    """Return how many prompts go on alike, how many tokens do up to the first that differs, and the logits' error."""
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", trust_remote_code=True).eval()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0  # without end of text, none is padded
    ours, _ = load_model(folder, trust_remote_code=True)
    ours.set_dtype(mx.float32)
    alike = equal = 0
    for prompt in ids:
        expected = theirs.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=new, do_sample=False
        )[0, len(prompt) :].tolist()
        found = [int(token) for token, _ in generate_step(mx.array(prompt.numpy()), ours, max_tokens=new)]
        same = next((at for at, pair in enumerate(zip(expected, found, strict=True)) if len(set(pair)) > 1), new)
        alike, equal = alike + (same == new), equal + same
    with torch.no_grad():
        reference = theirs(ids).logits
    logits = torch.tensor(ours(mx.array(ids.numpy())).tolist())
    return alike, equal, float((logits - reference).abs().max() / reference.abs().max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="text that prompts are cut from")
    options = parser.parse_args()
    count, length, new, rows, worst = 8, 24, 32, [], 0
    for folder in options.folders:
        alike, equal, error = compare(folder, prompts(folder, options.text, count, length), new)
        rows.append([folder.name, f"{alike} of {count}", f"{equal} of {count * new}", f"{error:.1e}"])
        worst = max(worst, count - alike)
    print_table(["folder", "prompts alike", "tokens equal", "largest logit error"], rows)
    return int(worst > 0)


if __name__ == "__main__":
    sys.exit(main())
