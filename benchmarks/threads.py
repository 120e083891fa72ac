"""How long a conversion takes on a quiet machine and beside one busy process, by how OpenMP's threads wait.

A thread that spins until the others are done holds the core that one of them needs. The command line sets
OMP_WAIT_POLICY=PASSIVE for itself where nobody has set it; `spinning` is what libgomp does where it is not set.
The cases take turns, each in a fresh process; the table gives the median of the rounds, and the fastest.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from setting import print_table

SAMPLES = Path(__file__).parents[1] / "samples"
WAYS = {
    "as the program sets it": {},
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000"},  # libgomp's own count of turns
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def seconds(command: list[str], way: str, beside: int) -> float:
    """Return the wall-clock seconds of a command, with so many processes that compute all the time beside it."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    begun = time.perf_counter()
    try:
        subprocess.run(command, env=os.environ | WAYS[way], check=True, capture_output=True)
        return time.perf_counter() - begun
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=SAMPLES / "gpt2")
    parser.add_argument("--text", type=Path, default=SAMPLES / "kjv_train.txt")
    parser.add_argument("--query", default="key-shared")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.rounds):
            for beside in (0, 1):
                for way in WAYS:
                    command = [sys.executable, "-m", "qectomy", "convert", str(options.model), "--query", options.query]
                    command += ["--out", f"{folder}/{turn}-{beside}-{way}", "--text", str(options.text)]
                    command += ["--tokens", str(options.tokens), "--eval-tokens", str(options.tokens)]
                    taken = seconds(command, way, beside)
                    found.setdefault((way, beside), []).append(taken)
                    print(f"{way}, {beside} beside it: {taken:.1f} s", file=sys.stderr, flush=True)
    rows = [
        [way, str(beside), f"{statistics.median(taken):.1f}", f"{min(taken):.1f}"]
        for (way, beside), taken in found.items()
    ]
    print_table(["threads", "busy processes beside it", "seconds, median", "fastest"], rows)


if __name__ == "__main__":
    main()
