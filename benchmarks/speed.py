"""Time prefill and decoding of several checkpoints in alternating rounds, and print the ratio to the first.

    python benchmarks/speed.py ORIGINAL REDUCED [REDUCED ...] [--batch 1] [--prompt 512] [--new 32] [--rounds 9]

Each round times every model once, in turn, so that what else the machine does hits all alike; the ratio is the median
over the rounds of the time in the round over the first model's. Prefill: one forward of the prompt. Decoding: greedy,
from a cache that holds the prompt, per token.
"""

import argparse
import platform
import statistics
import time
from typing import Any

import torch
from setting import print_table

from qectomy.eval.perplexity import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    models = [load_model(name, options.dtype, options.device)[0] for name in options.checkpoints]
    tokens = torch.randint(models[0].config.vocab_size, (options.batch, options.prompt), device=options.device)
    rounds = [[time_once(model, tokens, options.new) for model in models] for _ in range(options.rounds + 1)][1:]
    rows = []
    for place, name in enumerate(options.checkpoints):
        times = [tuple(row[place]) for row in rounds]
        ratios = [[row[place][kind] / row[0][kind] for row in rounds] for kind in (0, 1)]
        prefill, decode = (statistics.median(values) for values in zip(*times, strict=True))
        cells = [f"{options.batch * options.prompt / prefill:,.0f}", spread(ratios[0])]
        rows.append([name, *cells, f"{options.batch / decode:,.1f}", spread(ratios[1])])
    where = torch.cuda.get_device_name() if options.device != "cpu" else f"{platform.processor() or platform.machine()}"
    print(
        f"{where}, {torch.get_num_threads()} threads, {models[0].dtype}, batch {options.batch}, prompt {options.prompt}"
    )
    print_table(["checkpoint", "prefill tokens/s", "time ratio", "decoded tokens/s", "time ratio"], rows)


@torch.inference_mode()
def time_once(model: Any, tokens: torch.Tensor, new: int) -> tuple[float, float]:
    """Return the seconds of one prefill, and the seconds a decoded token."""
    begun = clock(tokens.device)
    out = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    filled = clock(tokens.device)
    cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    for _ in range(new):
        out = model(input_ids=last, past_key_values=cache, use_cache=True)
        last = out.logits[:, -1:].argmax(-1)
    return filled - begun, (clock(tokens.device) - filled) / new


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def spread(values: list[float]) -> str:
    """Write the median and the quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


if __name__ == "__main__":
    main()
