"""Train the sample checkpoints, and the paper's experiment beside them, on the King James text in this folder.

    python samples/train.py gpt2 --out .cache/gpt2          # GPT-2, the sample
    python samples/train.py llama --out .cache/llama        # grouped-query Llama, the sample
    python samples/train.py gpt2-identity --out DIR         # no W_Q from the first step: q = x̂
    python samples/train.py gpt2-identity-wide --out DIR    # likewise, its saved parameters spent on the MLP

All four see the same windows in the same order. The two without W_Q follow Karbevski & Mijoski (arXiv 2510.23912):
half the softmax scale and weight decay 2^-5. The weights kept are those of the lowest loss on kjv_validation.txt, which
lies flat well before the last step; kjv_heldout.txt is read once, at the end. It runs on the processor, wherever it is.
Each folder gets the checkpoint, its tokenizer and training.csv; the figures are printed as JSON.
"""

import argparse
import csv
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from qectomy.modeling.modeling_qectomy_gpt2 import QectomyGPT2Config, QectomyGPT2ForCausalLM
from qectomy.modeling.modeling_qectomy_llama import QectomyLlamaConfig, QectomyLlamaForCausalLM

FOLDER = Path(__file__).parent
VOCAB_SIZE = 4096
END = "<|endoftext|>"
CONTEXT = 256
STRIDE = 64  # between the training windows: each token stands at four different positions
WINDOWS_A_STEP = 16
EVERY = 125  # steps between evaluations
D_MODEL, N_LAYERS, N_HEADS, D_MLP = 128, 6, 4, 512
MODELS = ("gpt2", "llama", "gpt2-identity", "gpt2-identity-wide")


class Windows(Dataset):
    """Windows of CONTEXT tokens of one text, `stride` apart."""

    def __init__(self, tokens: torch.Tensor, stride: int):
        self.windows = tokens.unfold(0, CONTEXT, stride)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of VOCAB_SIZE tokens, GPT-2's kind, learnt from the training text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, unk_token=END, model_max_length=CONTEXT
    )


def build(name: str) -> PreTrainedModel:
    """Return an untrained model of the project's own classes; `gpt2` and `llama` have stock, dense queries."""
    common = dict(vocab_size=VOCAB_SIZE, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True)
    if name == "llama":
        return QectomyLlamaForCausalLM(
            QectomyLlamaConfig(
                **common,
                hidden_size=D_MODEL,
                num_hidden_layers=N_LAYERS,
                num_attention_heads=N_HEADS,
                num_key_value_heads=N_HEADS // 2,
                intermediate_size=352,
                max_position_embeddings=CONTEXT,
            )
        )
    identity, wide = name.startswith("gpt2-identity"), name.endswith("wide")
    # Two matrices of the MLP share the D² of W_Q: half of D_MODEL more channels.
    return QectomyGPT2ForCausalLM(
        QectomyGPT2Config(
            **common,
            n_embd=D_MODEL,
            n_layer=N_LAYERS,
            n_head=N_HEADS,
            n_inner=D_MLP + D_MODEL // 2 if wide else D_MLP,
            n_positions=CONTEXT,
            attn_pdrop=0.0,  # costs half the time on a processor; the two others keep GPT-2's 0.1
            query_maps=["identity"] * N_LAYERS if identity else None,
            softmax_scale=0.5 * (D_MODEL // N_HEADS) ** -0.5 if identity else None,
        )
    )


def stock(model: PreTrainedModel) -> PreTrainedModel:
    """Return the stock class with a dense model's weights; a model without W_Q stays what it is."""
    model.config.use_cache = True  # Trainer turns it off
    config = model.config.to_dict()
    if any(spec != "dense" for spec in config["query_maps"]):
        return model
    config_class, model_class = (
        (LlamaConfig, LlamaForCausalLM) if isinstance(model, QectomyLlamaForCausalLM) else (GPT2Config, GPT2LMHeadModel)
    )
    unknown = ("query_maps", "softmax_scale", "model_type", "auto_map", "architectures")
    plain = model_class(config_class(**{name: value for name, value in config.items() if name not in unknown}))
    plain.load_state_dict(model.state_dict())
    return plain


def train(name: str, out: Path, steps: int, learning_rate: float, seed: int) -> dict[str, Any]:
    """Train one model, save it to `out` and return its figures."""
    texts = {
        part: (FOLDER / f"kjv_{part}.txt").read_text(encoding="utf-8") for part in ("train", "validation", "heldout")
    }
    tokenizer = train_tokenizer(texts["train"])
    tokens = {part: torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for part, text in texts.items()}
    torch.manual_seed(seed)
    model = build(name)
    model.set_attn_implementation("eager")  # a seventh faster than sdpa at this size, on a processor
    out.parent.mkdir(parents=True, exist_ok=True)
    work = tempfile.mkdtemp(prefix=f".{out.name}.training-", dir=out.parent)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=work,
            max_steps=steps,
            per_device_train_batch_size=WINDOWS_A_STEP,
            per_device_eval_batch_size=WINDOWS_A_STEP,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=100,
            weight_decay=2**-5 if "identity" in name else 0.1,
            adam_beta2=0.98,
            bf16=True,
            use_cpu=True,
            eval_strategy="steps",
            eval_steps=EVERY,
            save_strategy="steps",
            save_steps=EVERY,
            save_total_limit=1,
            logging_steps=EVERY,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            report_to=[],
            seed=seed,
        ),
        train_dataset=Windows(tokens["train"], STRIDE),
        eval_dataset=Windows(tokens["validation"], CONTEXT),
    )
    begun = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - begun
    heldout = trainer.evaluate(Windows(tokens["heldout"], CONTEXT), metric_key_prefix="heldout")["heldout_loss"]
    stock(model).save_pretrained(out)
    tokenizer.save_pretrained(out)
    write_curve(out / "training.csv", trainer.state.log_history)
    shutil.rmtree(work)
    return {
        "model": name,
        "parameters": model.num_parameters(),
        "training_tokens": len(tokens["train"]),
        "steps": trainer.state.global_step,
        "readings": trainer.state.global_step * WINDOWS_A_STEP * CONTEXT / len(tokens["train"]),
        "best_step": trainer.state.best_global_step,
        "validation_loss": trainer.state.best_metric,
        "heldout_loss": heldout,
        "heldout_perplexity": math.exp(heldout),
        "seconds": seconds,
    }


def write_curve(path: Path, history: list[dict[str, Any]]) -> None:
    """Write step, training loss and validation loss."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        row = rows.setdefault(entry["step"], {"step": entry["step"]})
        row |= {name: round(entry[name], 5) for name in ("loss", "eval_loss") if name in entry}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ("step", "loss", "eval_loss"))
        writer.writeheader()
        writer.writerows(row for row in rows.values() if "eval_loss" in row)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--steps", type=int, default=2500, help=f"of {WINDOWS_A_STEP * CONTEXT} tokens")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        print(f"error: {arguments.out} exists", file=sys.stderr)
        return 1
    if arguments.steps < EVERY or arguments.steps % EVERY:
        print(f"error: --steps must be a multiple of {EVERY}, the steps between evaluations", file=sys.stderr)
        return 1
    print(json.dumps(train(arguments.model, arguments.out, arguments.steps, arguments.learning_rate, arguments.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
