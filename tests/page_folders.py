"""Folders of reduced checkpoints without weights: every part that a page shows, with plausible numbers."""

import json
import math
from pathlib import Path
from typing import Any

from tiny_models import RAVEN

SHA = "e6e052066a82999447a41e2aa1d018a03da6b70b1b676895904079c292b4e2a1"
OTHER_SHA = "5b56a580fa14de19420339bd27ba93192c7fbdcde4fc87597cd123e4ef8bcc62"
N_LAYERS = 30
WORDS = "windows of 512 tokens, none overlapping"
MADE = {
    "qectomy": "0.1.0",
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0"},
    "created": "2026-11-26T10:36:08+00:00",
}


def _protocol() -> dict[str, Any]:
    return {
        "text": "handbook.txt",
        "text_sha256": SHA,
        "overlap": {"share": 0.001, "spans": 2000, "words": 20, "complete": True},
        "tokenizer": "TokenizersBackend",
        "in_words": WORDS,
        "context": 512,
        "stride": 512,
        "bos": "none",
        "windows": 64,
        "tokens": 32768,
        "scored_tokens": 32704,
        "scored_bytes": 140211,
        "scored_words": 24000,
        "tail": "tokens after the last whole window are left out",
        "dtype": "float32",
    }


def _layer(index: int) -> dict[str, Any]:
    fitted = 0.004 * math.exp(2.2 * math.sin(index / 4)) + 0.002
    values = [12 * math.exp(-i / (9 + index / 3)) + 0.01 for i in range(33)]
    kl = {"fitted": fitted, "heldout": fitted * (1.2 + 0.3 * (index % 3))}
    moved = {"W_K": 0.61, "W_V": 0.0, "W_O": 0.008 + index / 2000, "W_down": 0.00462, "b_O": None}
    known = {"index": index, "map": "key-shared", "attention_kl": kl, "moved": moved}
    return known | {"seconds": 20.5, "singular_values": values}


def _tokens() -> list[dict[str, Any]]:
    words = [word if i == 0 else f" {word}" for i, word in enumerate(RAVEN.replace("\n", " \n ").split(" "))]
    tokens: list[dict[str, Any]] = []
    for i, word in enumerate(words):
        before = 2.5 + 2 * math.sin(i * 1.7)
        gap = 0.7 * math.sin(i * 2.3) ** 5 * (1 + 2 * (i % 7 == 0)) + 0.03
        tokens.append({"text": word, "before": None if i == 0 else before, "after": None if i == 0 else before + gap})
    return tokens


def full_report() -> dict[str, Any]:
    """A qectomy.json with every part, as of a fitted checkpoint."""
    edges = [1, 2, 4, 8, 16, 32, 64, 128, 256]
    loss = [3.0 + 2.5 / (i + 1) for i in range(len(edges))]
    return {
        **MADE,
        "format": 1,
        "method": "fitted",
        "command": "qectomy convert ./smollm2 --out ./reduced --text foldoc.txt --eval-text handbook.txt",
        "source": {
            "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "model_type": "llama",
            "dtype": "BF16",
            "sha256": {"config.json": OTHER_SHA, "model.safetensors": SHA[::-1]},
            "fingerprint": "0" * 32,
        },
        "calibration": {
            "texts": [{"file": "foldoc.txt", "sha256": OTHER_SHA, "tokens": 32768, "first_token": 0}],
            "context": 512,
            "seed": 0,
            "refit": True,
        },
        "layers": [_layer(index) for index in range(N_LAYERS)],
        "perplexity": {
            "before": 24.551,
            "after": 26.158,
            "ratio": 26.158 / 24.551,
            "ratio_95": [1.0581, 1.0732],
            "difference": 1.607,
            "difference_95": [1.41, 1.83],
            "before_95": [22.9, 26.4],
            "after_95": [24.4, 28.1],
            "windows": 64,
            "protocol": _protocol(),
        },
        "bits_per_byte": {"before": 1.0762, "after": 1.0976},
        "word_perplexity": {"before": 94.2, "after": 102.8},
        "kl": 0.0731,
        "top1_agreement": 0.8612,
        "per_position": {"edges": edges, "before": loss, "after": [x + 0.01 * i for i, x in enumerate(loss)]},
        "token_sample": {"text": "handbook.txt", "tokens": _tokens()},
        "generation": {
            "max_new_tokens": 48,
            "decoding": "greedy",
            "samples": [
                {
                    "prompt": "To install a package, run",
                    "original": " apt install with its name as an administrator.\nThe package is then downloaded.",
                    "reduced": " apt install with the name of the package.\nThe package is then configured.",
                },
                {"prompt": "The capital of France is", "original": " Paris.", "reduced": " Paris."},
            ],
        },
        "parameters": {"before": 134515008, "after": 125667648},
        "bytes": {"before": 269030016, "after": 251335296},
        "query_parameters": {"before": 9953280, "after": 1105920},
        "seconds": {"text": 3.1, "forward": 41.0, "fitting": 512.25, "refitting": 88.0, "writing": 3.4, "total": 661.7},
        "forward_pass_seconds": 38.2,
        "peak_memory_bytes": 1240000000,
        "device": "cpu",
        "reload_check": {
            "largest_relative_logit_error": 0.0,
            "largest_relative_logit_error_cached": 1e-7,
            "peak_memory_bytes": 410000000,
        },
        "tensors_sha256": {"model.norm.weight": SHA},
    }


def healed_report() -> dict[str, Any]:
    """The same, healed."""
    report = full_report()
    curve = [
        {
            "step": 5 * i,
            "tokens": 20480 * i,
            "train_loss": 0.07,
            "validation_loss": 0.06,
            "validation_kl": 0.06,
            "validation_perplexity": 20.1 + 1.5 * math.exp(-i / 3),
        }
        for i in range(11)
    ]
    ratios = {"fitted_ratio": 26.158 / 24.551, "healed_ratio": 25.2 / 24.551}
    report["perplexity"] |= {"after": 25.2, "ratio": ratios["healed_ratio"], "ratio_95": [1.0191, 1.0334]}
    report["perplexity"] |= {"after_95": [23.6, 27.0]}
    report["healing"] = {
        **MADE,
        "command": "qectomy heal ./reduced --teacher ./smollm2 --out ./healed --text foldoc.txt --tokens 200k",
        "created": "2026-11-26T11:36:08+00:00",
        "texts": [
            {
                "text": "foldoc.txt",
                "sha256": OTHER_SHA,
                "left_out": [0, 32768],
                "validation_tokens": 16384,
                "tokens": 204800,
            }
        ],
        "tokens": 204800,
        "steps": 50,
        "planned_steps": 50,
        "best_step": 50,
        "tokens_a_step": 4096,
        "trained_parameters": 125667648,
        "micro_batch": 8,
        "accumulation": 1,
        "processes": 1,
        "budget": {"tokens": 204800, "evaluations": 10, "validation_tokens": 16384},
        "settings": {"loss": "kl", "lr": 3e-4, "minutes": None, "train": "all"},
        "device": "cpu (x86_64)",
        "fitted_sha256": {"model.safetensors": SHA},
        "teacher_is_source": True,
        "seconds": {"training": 1201.0, "this_process": 1300.0},
        "validation": {"original_perplexity": 20.0, "curve": curve},
        "perplexity": {
            "original": 24.551,
            "fitted": 26.158,
            "healed": 25.2,
            **ratios,
            "fitted_ratio_95": [1.0581, 1.0732],
            "healed_ratio_95": [1.0191, 1.0334],
        },
        "kl": {"fitted": 0.0731, "healed": 0.0512},
        "top1_agreement": {"fitted": 0.8612, "healed": 0.883},
    }
    return report


def exact_report() -> dict[str, Any]:
    """An exact conversion for which no text was measured."""
    report = full_report()
    for name in ("perplexity", "bits_per_byte", "word_perplexity", "kl", "top1_agreement", "per_position"):
        del report[name]
    for name in ("calibration", "token_sample", "generation", "forward_pass_seconds", "device"):
        del report[name]
    layer = {"map": "dense", "value_map": "gauge", "output_map": "dense", "how": "kept", "pivot_condition": 8.57}
    reason = (
        "with RMSNorm before its readers it goes whole only if it is an orthogonal change of basis, and W_Q is not one"
    )
    report["layers"] = [{"index": i, **layer, "reason": reason, "W_Q_condition": None} for i in range(N_LAYERS)]
    report |= {"method": "exact", "tie": "kept", "logit_error": 1.7e-8, "logit_error_on": "random tokens"}
    report |= {"parameters": {"before": 134515008, "after": 134152128}}
    report |= {"query_parameters": {"before": 0, "after": 0}}
    return report


def full_evaluation() -> dict[str, Any]:
    """An evaluation.json of original and reduced, with tasks: one worse for certain, one better, one neither."""

    def task(name: str, first: float, second: float, higher: bool = True) -> dict[str, Any]:
        values = [
            {"checkpoint": "./smollm2", "value": first, "stderr": 0.01},
            {"checkpoint": "./reduced", "value": second, "stderr": 0.01},
        ]
        shared = {"metric": "acc", "filter": "none", "higher_is_better": higher, "n": 1000}
        return {"task": name, **shared, "values": values}

    edges = [1, 2, 4, 512]
    shared = {"fingerprint": "0" * 32, "seconds": 12.5, "device": "cpu", "streamed": False, "protocol": _protocol()}
    shared |= {"nll": 3.2, "per_position": {"edges": edges, "nll": [5.0, 4.0, 3.0]}}
    reduced = {
        **shared,
        "checkpoint": "./reduced",
        "perplexity": 26.16,
        "perplexity_95": [24.4, 28.1],
        "bits_per_byte": 1.0976,
        "kl": 0.0731,
        "top1_agreement": 0.8612,
        "paired": {
            "against": "./smollm2",
            "ratio": 1.0655,
            "ratio_95": [1.0581, 1.0732],
            "difference": 1.6,
            "windows": 64,
        },
    }
    original = {**shared, "checkpoint": "./smollm2", "perplexity": 24.55, "bits_per_byte": 1.0762}
    tasks = [task("arc_easy", 0.58, 0.53), task("winogrande", 0.52, 0.5281), task("toxicity", 0.3, 0.2, higher=False)]
    settings = {"max_length": 2048, "batch_size": 8, "device": "cpu", "bootstrap_iters": 1000, "seeds": {"torch": 0}}
    settings |= {"dtype": ["float32"] * 2, "truncated": [0, 0], "seconds": [1.0, 2.0]}
    return {
        **MADE,
        "kind": "evaluation",
        "command": "qectomy eval ./smollm2 ./reduced --text handbook.txt",
        "results": [original, reduced],
        "lm_eval": {"version": "0.4.13", "tasks": tasks, "settings": settings},
    }


def full_bench() -> dict[str, Any]:
    """A bench.json of two models."""

    def spread(middle: float) -> dict[str, float]:
        return {"median": middle, "low": 0.97 * middle, "high": 1.04 * middle}

    def decode(batch: int, speed: float) -> dict[str, Any]:
        counted = {"operations_per_step": 900, "bytes_read_per_token": 2.7e8 / batch, "bytes_per_second": 3.8e9}
        return {"batch": batch, "tokens_per_second": spread(speed), **counted}

    def model(name: str, scale: float) -> dict[str, Any]:
        return {
            "checkpoint": name,
            "fingerprint": "0" * 32,
            "parameters": int(134515008 * scale),
            "bytes": int(269030016 * scale),
            "bytes_on_disk": int(269030016 * scale),
            "load_seconds": spread(1.2),
            "peak_memory_bytes": 900000000,
            "kv_cache_bytes_per_token": 23040,
            "prefill": [{"batch": b, "tokens": 512, "tokens_per_second": spread(900 / scale)} for b in (1, 8)],
            "decode": [decode(b, 14 * b / scale) for b in (1, 8)],
        }

    return {
        **MADE,
        "kind": "bench",
        "command": "qectomy bench ./smollm2 ./reduced --save ./reduced/bench.json",
        "device": "cpu",
        "dtype": "bfloat16",
        "threads": 2,
        "models": [model("./smollm2", 1.0), model("./reduced", 0.934)],
        "settings": {
            "batches": [1, 8],
            "rounds": 7,
            "starts": 7,
            "prompt_tokens": 512,
            "new_tokens": 32,
            "compile": False,
            "seed": 0,
        },
        "warnings": [],
        "notes": [],
        "ratios": {
            "parameters": 1.07,
            "bytes": 1.07,
            "bytes_on_disk": 1.07,
            "prefill": [{"batch": b, "ratio": spread(1.07)} for b in (1, 8)],
            "decode": [{"batch": b, "ratio": spread(1.06), "byte_limit": 1.07, "share_of_limit": 0.9} for b in (1, 8)],
        },
    }


def write_folder(folder: Path, report: dict[str, Any], **others: Any) -> Path:
    """Write qectomy.json and others, as `evaluation=...` for evaluation.json; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"qectomy": report, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
