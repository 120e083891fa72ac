"""Time one plain forward pass of the stock model over the tokens that a conversion in the same setting sees.

Calibration and evaluation windows, a few at a time, float32, no gradients, all logits computed. Loading the
model and a first, slower run on one batch are left out. This is the denominator of reference.py.

    python benchmarks/forward_pass.py --calibration fitted.txt --evaluation heldout.txt
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

from setting import add_setting, make_setting_windows

from qectomy.errors import QectomyError

WINDOWS_A_BATCH = 4


def time_forward_pass(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of one pass over all windows, and how it was run."""
    import torch

    from qectomy.eval.loading import load_model

    fitted, held = make_setting_windows(options)
    tokens = torch.cat([fitted.tokens, held.tokens])
    model, _, dtype = load_model(options.checkpoint, "float32", "cpu")
    batches = tokens.split(WINDOWS_A_BATCH)
    with torch.no_grad():
        model(input_ids=batches[0], use_cache=False)
        begun = time.perf_counter()
        for batch in batches:
            logits = model(input_ids=batch, use_cache=False).logits
            assert logits.shape[:2] == batch.shape
        seconds = time.perf_counter() - begun
    return {
        "seconds": seconds,
        "tokens": tokens.numel(),
        "windows_a_batch": WINDOWS_A_BATCH,
        "dtype": dtype,
        "attention": model.config._attn_implementation,
        "threads": torch.get_num_threads(),
    }


def describe_machine() -> dict[str, Any]:
    """Return the processor, its cores, the memory and how busy the machine is."""
    processor, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(encoding="utf-8"), re.MULTILINE)
        processor = named[1] if named else processor
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": round(os.getloadavg()[0], 2),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    options = parser.parse_args()
    try:
        result = time_forward_pass(options)
    except QectomyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{result['seconds']:.1f} s for {result['tokens']:,} tokens on {result['threads']} thread(s)")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
