"""Heal SmolLM2-135M on one GPU and say what it won, how fast, and what share of the GPU's arithmetic that is.

    python benchmarks/heal_gpu.py --calibration foldoc.txt --evaluation handbook.txt --minutes 2
    python benchmarks/heal_gpu.py ... --query identity --minutes 8 --self-generated
    python benchmarks/heal_gpu.py --checkpoint samples/gpt2 --calibration samples/kjv_train.txt \\
        --evaluation samples/kjv_heldout.txt --device cpu --minutes 0.5 --steps 4

Every map is fitted, then healed for --minutes on --calibration, or on text that the original writes itself; the three
perplexities are on --evaluation, which nothing is trained on. Then, on random tokens: tokens a second of healing and,
in the same run, of stock Trainer fine-tuning of the original with labels and no teacher, each with and without
compiling. Utilisation counts 2 operations a weight of a matrix and token for a forward, as many for the gradient of its
input, as many for its own, with the teacher's forward, and attention's products. The table comes last.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from setting import CHECKPOINT, print_table
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.conversion.fitted import convert
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import QectomyError
from qectomy.eval.loading import load_model
from qectomy.healing.heal import heal
from qectomy.healing.models import Distillation, load_student, load_teacher
from qectomy.healing.settings import HealSettings
from qectomy.models.query_maps import parse_recipe

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16, dense, by the vendor's data sheets


class RandomWindows(Dataset):
    """As many windows of random tokens as are asked for."""

    def __init__(self, n: int, context: int, vocab_size: int):
        self._n, self._context, self._vocab_size = n, context, vocab_size

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        tokens = torch.randint(self._vocab_size, (self._context,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": tokens, "labels": tokens}


class Clock(TrainerCallback):
    """The time of the second half of the steps."""

    def __init__(self, device: str):
        self._device, self._begun, self.seconds = device, 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (state.max_steps // 2, state.max_steps):
            if self._device.startswith("cuda"):
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds, self._begun = now - self._begun, now


class Distilling(Trainer):
    """Trainer with the loss of healing and nothing else of it."""

    criterion: Distillation
    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(input_ids=inputs["input_ids"], teacher_states=self.criterion.teach(inputs["input_ids"]))["loss"]


def tokens_a_second(options: argparse.Namespace, model: Any, criterion: Distillation | None, scratch: str) -> float:
    """Return the throughput of one way to train, over the second half of --steps steps."""
    batch = options.batch_tokens // options.context
    clock = Clock(options.device)
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=options.steps,
        per_device_train_batch_size=batch,
        bf16=True,
        use_cpu=options.device == "cpu",
        save_strategy="no",
        report_to=[],
        logging_steps=options.steps,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    windows = RandomWindows(batch * options.steps, options.context, model.config.vocab_size)
    kind = Trainer if criterion is None else Distilling
    trainer = kind(model=model, args=arguments, train_dataset=windows, callbacks=[clock])
    if criterion is not None:
        trainer.criterion = criterion
    trainer.train()
    return (options.steps - options.steps // 2) * options.batch_tokens / clock.seconds


def flops_a_token(source: Checkpoint, parameters: int, context: int, passes: int) -> float:
    """Return the operations of `passes` passes over a model of so many parameters, a token of a causal window.

    A pass multiplies every matrix once; its two products of attention see half of the window on average.
    """
    dims = source.dims
    matrices = parameters if dims.tied else parameters - dims.vocab_size * dims.d_model
    attention = 2 * dims.n_layers * dims.n_heads * dims.d_head * context
    return passes * (2 * matrices + attention)


def measure_speed(options: argparse.Namespace, original: Checkpoint, reduced: Path, scratch: str) -> list[Any]:
    """Return rows (what is trained, tokens a second, operations a token, utilisation)."""
    peak = options.peak_flops
    student = open_checkpoint(reduced, reduced=True)
    rows = []
    for compiled in (False, True) if options.compile else (False,):
        for kind in ("heal", "fine-tune"):
            torch.compiler.reset()
            if kind == "heal":
                model, teacher = load_student(student), load_teacher(original, "bfloat16", options.device)
                criterion = Distillation(teacher, 0.0)
                criterion.attach_(model)
                flops = flops_a_token(original, student.parameters, options.context, 3)
                flops += flops_a_token(original, original.parameters, options.context, 1)
                compiles = [model.base_model, teacher.base_model]
            else:
                model, criterion = load_model(str(original.folder), "float32", "cpu")[0], None
                flops = flops_a_token(original, original.parameters, options.context, 3)
                compiles = [model.base_model]
            if compiled:
                for part in compiles:
                    part.compile()
            rate = tokens_a_second(options, model, criterion, scratch)
            share = f"{rate * flops / peak:.1%}" if peak else "-"
            rows.append((f"{kind}{', compiled' if compiled else ''}", f"{rate:,.0f}", f"{flops:.3g}", share))
    return rows


def heal_map(options: argparse.Namespace, original: Checkpoint, query: str, root: Path) -> dict[str, Any]:
    """Fit and heal one map; return its report and the seconds that each took."""
    fitted, healed = root / f"{query}-fitted", root / f"{query}-healed"
    begun = time.perf_counter()
    shared = dict(context=options.context, eval_text=options.evaluation, device=options.device)
    settings = ConvertSettings(
        texts=(options.calibration,), tokens=options.tokens, eval_tokens=options.eval_tokens, **shared
    )
    convert(original, fitted, tuple(parse_recipe(query, original.dims)), settings, progress(query))
    fitting = time.perf_counter() - begun
    report = heal(
        str(fitted),
        str(original.folder),
        healed,
        HealSettings(
            texts=() if options.self_generated else (options.calibration,),
            self_generated=options.self_generated,
            minutes=options.minutes,
            batch_tokens=options.batch_tokens,
            eval_tokens=options.eval_tokens,
            compile=options.compile,
            **shared,
        ),
        progress=progress(query),
    )
    return {"query": query, "fitting_seconds": fitting, "report": report}


def progress(name: str) -> Any:
    return lambda done, total, note="": print(f"{name} {done}/{total} {note}", file=sys.stderr, flush=True)


def show(rows: list[dict[str, Any]], speed: list[Any], options: argparse.Namespace) -> None:
    """Print both tables."""
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    text = "text of its own" if options.self_generated else Path(options.calibration).name
    print(f"\n{where}; windows of {options.context}; healed on {text} for {options.minutes:g} minutes a map\n")
    print_table(("training", "tokens/s", "operations a token", "of the peak"), speed)
    table = []
    for row in rows:
        healing = row["report"]["healing"]
        perplexity = healing["perplexity"]
        numbers = [f"{perplexity[kind]:.3f}" for kind in ("original", "fitted", "healed")]
        ratios = [f"{perplexity[f'{kind}_ratio']:.4f}" for kind in ("fitted", "healed")]
        seconds = (f"{row['fitting_seconds']:.0f}", f"{healing['seconds']['training']:.0f}")
        table.append((row["query"], *numbers, *ratios, f"{healing['tokens']:,}", *seconds))
    header = ("map", "original", "fitted", "healed", "fitted ratio", "healed ratio", "tokens", "fit s", "heal s")
    print_table(header, table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--calibration", required=True, metavar="FILE", help="text that is fitted and healed on")
    parser.add_argument("--evaluation", required=True, metavar="FILE", help="text that is measured on")
    parser.add_argument("--query", nargs="+", default=["key-shared", "select", "identity"], metavar="MAP")
    parser.add_argument("--minutes", type=float, default=2.0, help="of healing, a map")
    parser.add_argument("--tokens", type=int, default=32_768, help="fitted on")
    parser.add_argument("--eval-tokens", type=int, default=32_768)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=30, help="timed, half of them")
    parser.add_argument("--self-generated", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--peak-flops", type=float, help="of the device in bfloat16; default: by its name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.peak_flops is None and options.device.startswith("cuda"):
        name = torch.cuda.get_device_name()
        options.peak_flops = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    try:
        with tempfile.TemporaryDirectory(prefix="qectomy-heal-") as scratch:
            original = open_checkpoint(options.checkpoint)
            rows = [heal_map(options, original, query, Path(scratch)) for query in options.query]
            reduced = Path(scratch) / f"{options.query[0]}-fitted"
            speed = measure_speed(options, original, reduced, f"{scratch}/trainer")
    except QectomyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps({"maps": rows, "speed": speed}, indent=2) + "\n", encoding="utf-8")
    show(rows, speed, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
