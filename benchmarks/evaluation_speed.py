"""How fast an evaluation is, against a bare forward pass over the same windows, and against lm-evaluation-harness.

    python benchmarks/evaluation_speed.py --evaluation handbook.txt --tokens 16384 --rounds 5
    python benchmarks/evaluation_speed.py --evaluation handbook.txt --device cuda --dtype bfloat16 --tokens 1000000

The windows are those of `--protocol rolling`, which are the harness's. In each round, one after the other: the model
alone, logits and all, on the batches that the evaluation runs on; the scoring of these batches; the whole evaluation,
from the text to intervals; the harness's loglikelihood_rolling, from the text on, if it is installed, at batch sizes of
1 and of as many windows. Ratios are taken within a round; the table gives their medians and extremes.
"""

import argparse
import math
import os
import platform
import statistics
import sys
import time
from typing import Any

import torch
from setting import CHECKPOINT, print_table

from qectomy.eval.loading import load_model
from qectomy.eval.metrics import summarize
from qectomy.eval.protocol import Protocol, ScoringWindows
from qectomy.eval.published import read_text, rolling_windows
from qectomy.eval.score_windows import TOKENS_A_BATCH, TOKENS_ON_DEVICE, batches, score_model
from qectomy.eval.token_scores import TokenScores
from qectomy.text.text import Source, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--evaluation", required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=16_384, help="of the text, about")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-tokens", type=int, help="default: the evaluation's own")
    options = parser.parse_args()
    at_once = options.batch_tokens or (TOKENS_A_BATCH if options.device == "cpu" else TOKENS_ON_DEVICE)
    model, folder, _ = load_model(options.checkpoint, options.dtype, options.device)
    tokenizer = load_tokenizer(folder)
    text = cut(read_text(options.evaluation, "rolling"), options.tokens)
    protocol = Protocol(name="rolling", context=options.context)
    windows = rolling_windows(tokenizer, text, protocol, model.config.vocab_size)
    n = windows.report.scored_tokens
    ways = {
        "forward pass alone": lambda: bare(model, windows, at_once, options.device),
        "scoring": lambda: bits(windows, score_model(model, windows)),
        "evaluation": lambda: evaluation(model, tokenizer, text, protocol),
        **harnesses(model, tokenizer, text, options.context, at_once // options.context),
    }
    found = {name: way() for name, way in ways.items()}  # warm, and to see that all score the same
    rounds = [{name: timed(way, options.device) for name, way in ways.items()} for _ in range(options.rounds)]
    rows = []
    for name in ways:
        to_harness = statistics.median(row[list(ways)[-1]] / row[name] for row in rounds)
        ratios = [row["forward pass alone"] / row[name] for row in rounds]
        speed = n / statistics.median(row[name] for row in rounds)
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        shown = "" if found[name] is None else f"{found[name]:.7f}"
        rows.append([name, f"{speed:,.0f}", f"{middle:.3f} ({low:.3f}-{high:.3f})", f"{to_harness:.3f}", shown])
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.machine()
    print(f"{where}, {torch.get_num_threads()} threads, {options.dtype}, {n:,} tokens in windows of {options.context}")
    print_table(["", "tokens/s", "of a bare forward's", "of the last row's", "bits per byte"], rows)


def cut(text: Source, tokens: int) -> Source:
    """Return about as many tokens of a text, as documents of some 2,000 characters, cut at line ends."""
    documents, held = [], ""
    for line in "\n".join(text.documents)[: tokens * 4].splitlines(keepends=True):
        held += line
        if len(held) > 2000:
            documents.append(held)
            held = ""
    return Source(text.name, text.sha256, "", documents=tuple(documents))


@torch.no_grad()
def bare(model: Any, windows: ScoringWindows, at_once: int, device: str) -> None:
    for rows, length in batches(windows, at_once):
        model(input_ids=windows.tokens[rows, : length - 1].to(device), use_cache=False).logits  # noqa: B018


def bits(windows: ScoringWindows, scores: TokenScores) -> float:
    return float(scores.nll.sum()) / math.log(2) / windows.n_bytes


def evaluation(model: Any, tokenizer: Any, text: Source, protocol: Protocol) -> float:
    windows = rolling_windows(tokenizer, text, protocol, model.config.vocab_size)
    return summarize(score_model(model, windows), windows).bits_per_byte


def harnesses(model: Any, tokenizer: Any, text: Source, context: int, batch: int) -> dict[str, Any]:
    """Return lm-evaluation-harness's way, for both batch sizes; nothing where it is not installed."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ImportError:
        print("lm-evaluation-harness is not installed", file=sys.stderr)
        return {}
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(document,), idx=0, metadata=("", i, 1))
        for i, document in enumerate(text.documents)
    ]
    n_bytes = sum(len(document.encode()) for document in text.documents)

    def way(size: int) -> Any:
        device = str(next(model.parameters()).device)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=context, device=device)
        nats = -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))
        return nats / n_bytes / math.log(2)

    return {f"lm-eval, batch {size}": lambda size=size: way(size) for size in dict.fromkeys((1, max(1, batch)))}


def timed(way: Any, device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    begun = time.perf_counter()
    way()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - begun


if __name__ == "__main__":
    os.environ["TQDM_DISABLE"] = "1"  # the harness draws a bar for each document
    main()
