"""How the time of a fitted conversion grows with the model and with the text: seconds a layer, and for all layers.

For each size a synthetic Llama of two layers is converted, `0=dense,1=key-shared`: the second layer is fitted, refitted
and run as every layer of a whole conversion is. Its seconds, times the size's layers, are most of the whole: what comes
once (hashing, the embedding, the scores, the reload) is given beside it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from setting import print_table


def convert(model: Path, out: Path, text: Path, tokens: int, options: argparse.Namespace) -> dict[str, float]:
    """Return seconds of the fitted layer, of what comes once, and the peak memory, from the report of a conversion."""
    command = [sys.executable, "-m", "qectomy", "convert", str(model), "--out", str(out), "--json"]
    command += ["--query", f"0=dense,1={options.query}", "--text", str(text), "--tokens", str(tokens)]
    command += ["--eval-tokens", str(options.eval_tokens), "--context", str(options.context)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip().splitlines()[-1])
    report = json.loads(done.stdout)
    layers = [layer["seconds"] for layer in report["layers"]]
    return {
        "layer": layers[1],
        "once": report["seconds"]["total"] - sum(layers),
        "peak": report["peak_memory_bytes"],
    }


def main() -> None:
    from synthetic_llama import SHAPES, Shape, write_synthetic_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["0.1B", "0.5B", "1B", "3B"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768, 131072], help="of calibration")
    parser.add_argument("--text", type=Path, required=True, help="to calibrate and to measure on")
    parser.add_argument("--eval-tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--query", default="key-shared")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's place for such files")
    options = parser.parse_args()
    rows = []
    for name in options.sizes:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            model = Path(folder) / "model"
            write_synthetic_llama(model, Shape(**asdict(shape) | {"n_layers": 2}))
            for tokens in options.tokens:
                found = convert(model, Path(folder) / f"reduced-{tokens}", options.text, tokens, options)
                whole = (found["layer"] * shape.n_layers + found["once"]) / 3600
                load = os.getloadavg()[0]
                rows.append([name, f"{tokens:,}", f"{found['layer']:.1f}", f"{found['once']:.1f}", f"{whole:.2f}"])
                rows[-1] += [f"{found['peak'] / 1e9:.2f}", f"{load:.1f}"]
                print(*rows[-1], file=sys.stderr, flush=True)
    header = ["size", "tokens", "seconds a layer", "seconds once", "hours, all layers", "peak, GB", "load"]
    print_table(header, rows)


if __name__ == "__main__":
    main()
