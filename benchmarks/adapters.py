"""Train a LoRA adapter on an original, load it on reduced checkpoints as PEFT does, and measure what comes out.

The adapter fits only where the reduced model has the same matrices in the same basis. Three numbers say what becomes of
it: which of its parts PEFT puts somewhere, and the mean KL of reduced to original model a token, without the adapter
and with it on both. Also printed: what PEFT's target names find in each model, which is what can be trained there.

Needs peft, which this project does not: `pip install 'peft==0.21.*'` in an environment of its own.

    python benchmarks/adapters.py samples/llama REDUCED... --train samples/kjv_validation.txt --text HELDOUT
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from typing import Any

import torch

from qectomy.errors import QectomyError
from qectomy.eval.loading import load_model
from qectomy.text.text import load_tokenizer, read_source
from qectomy.text.windows import make_windows

try:
    import peft
except ImportError:
    sys.exit("error: this benchmark needs peft: pip install -c constraints.txt '.[test]'")

TARGETS = {"llama": ["q_proj", "o_proj"], "mistral": ["q_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"]}
TRIED: tuple[dict[str, Any], ...] = (
    dict(target_modules="all-linear"),
    dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]),
    dict(target_modules=["c_attn"]),
    dict(target_modules=[], target_parameters=["query.mix"]),
    dict(target_modules=[], target_parameters=["c_attn.weight"]),
    dict(target_modules=[], target_parameters=["c_attn.weight", "query.mix"]),
)
RANK, RATE, BATCH = 8, 3e-3, 8


def load(name: str) -> Any:
    return load_model(name, "float32", "cpu")[0]


def parts(model: Any) -> list[str]:
    """Return the modules of a layer that an adapter changes, by name."""
    names = [name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name]
    return sorted({re.sub(r".*\.(layers|h)\.\d+\.|\.base_layer", "", name) for name in names})


def trained(original: str, windows: torch.Tensor, steps: int, folder: str) -> Any:
    """Save an adapter of the original, trained to predict `windows` (n, T); return the model that has it."""
    model = load(original)
    kind = model.config.model_type
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, task_type="CAUSAL_LM", target_modules=TARGETS[kind])
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=RATE)
    for step in range(steps):
        batch = windows[torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"trained on {kind}'s {', '.join(TARGETS[kind])}: loss {loss.item():.3f} in the end", file=sys.stderr)
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def mean_kl(original: Any, reduced: Any, windows: torch.Tensor) -> float:
    """Return the mean of KL(original || reduced) over all tokens of the windows (n, T)."""
    total = 0.0
    for window in windows:
        p, q = (model(input_ids=window[None]).logits[0].log_softmax(-1).double() for model in (original, reduced))
        total += float((p.exp() * (p - q)).sum(-1).mean())
    return total / len(windows)


def found(name: str, targets: dict[str, Any]) -> str:
    """Return what PEFT's target names find in a model, or that they find nothing."""
    try:
        return ", ".join(parts(peft.get_peft_model(load(name), peft.LoraConfig(r=RANK, **targets)))) or "nothing"
    except (ValueError, AttributeError) as error:  # the latter of a module inside another one that PEFT has wrapped
        return type(error).__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("reduced", nargs="+")
    parser.add_argument("--train", required=True, help="text to train the adapter on")
    parser.add_argument("--text", required=True, help="text to measure on")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)

    plain, folder, _ = load_model(options.original, "float32", "cpu")
    cut = dict(context=128, vocab_size=plain.config.vocab_size)
    fitted, held = (
        make_windows(load_tokenizer(folder), [read_source(text)], tokens=tokens, **cut).tokens
        for text, tokens in ((options.train, options.steps * BATCH * 128), (options.text, 4096))
    )
    rows = []
    with tempfile.TemporaryDirectory() as adapter:
        adapted = trained(options.original, fitted, options.steps, adapter)
        for name in options.reduced:
            without = mean_kl(plain, load(name), held)
            try:
                reduced = peft.PeftModel.from_pretrained(load(name), adapter)
                rows.append(
                    (name, ", ".join(parts(reduced)), f"{without:.4f}", f"{mean_kl(adapted, reduced, held):.4f}")
                )
            except (ValueError, RuntimeError) as error:
                rows.append((name, f"{type(error).__name__}", f"{without:.4f}", "-"))
    print(f"peft {peft.__version__}\n\n| model | target names | what they find |\n|---|---|---|")
    for name in (options.original, *options.reduced):
        for targets in TRIED:
            print(
                f"| {name} | {targets.get('target_parameters') or targets['target_modules']} | {found(name, targets)} |"
            )
    print("\n| reduced | parts of the adapter that are put somewhere | KL without it | KL with it on both |")
    print("|---|---|---|---|")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    try:
        main()
    except QectomyError as error:
        sys.exit(f"error: {error}")
