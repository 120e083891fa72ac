"""Peak memory and time of the commands that take a checkpoint of any size, each in a fresh process. Linux alone.

The peak is the largest resident set over that at the start, when the libraries are loaded and nothing is read. The
checkpoint is a synthetic Llama of the size asked for, made and deleted here, or one that is given. What `materialize`,
`verify` and `eval` run on is what `convert` wrote, and `verify-exact` on what `exact` wrote: ask for those before them.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from setting import print_table

COMMANDS = ("convert", "eval", "materialize", "verify", "exact", "verify-exact")
CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); import memory; memory.measured(*sys.argv[1:])"


def measured(command: str, *arguments: str) -> None:
    """Run a command of qectomy in this process; print the peak over the start and the seconds as JSON."""
    import qectomy.conversion.exact
    import qectomy.conversion.fitted
    import qectomy.eval.certificate
    from qectomy.checkpoint.memory import release_freed
    from qectomy.cli import app
    from qectomy.eval.peak_memory import peak_memory_bytes

    del qectomy
    release_freed()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    start, since = peak_memory_bytes(), time.perf_counter()
    try:
        app([command, *arguments], standalone_mode=False)
    except SystemExit as stop:
        if stop.code not in (0, None) and command != "verify":
            raise
    print(json.dumps({"start": start, "peak": peak_memory_bytes() - start, "seconds": time.perf_counter() - since}))


def run(command: str, arguments: list[str]) -> dict[str, Any]:
    """Return what `measured` prints in a fresh process."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(here), command, *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"qectomy {command} failed: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def arguments_of(name: str, model: Path, work: Path, options: argparse.Namespace) -> tuple[str, list[str]]:
    """Return the command and its arguments."""
    text, some = str(options.text), ["--tokens", str(options.tokens), "--context", str(options.context)]
    fitted, exact = work / "fitted", work / "exact"
    few = [*some[2:], "--text", text, "--tokens", str(options.eval_tokens), "--json"]
    calibrated = ["--text", text, *some, "--eval-tokens", str(options.eval_tokens)]
    return {
        "convert": ("convert", [str(model), "--out", str(fitted), "--query", options.query, *calibrated, "--json"]),
        "exact": ("convert", [str(model), "--out", str(exact), "--query", "exact", "--json"]),
        "materialize": ("materialize", [str(fitted), "--out", str(work / "stock")]),
        "verify": ("verify", [str(fitted), "--against", str(model), *few]),
        "verify-exact": ("verify", [str(exact), "--against", str(model), *few]),
        "eval": ("eval", [str(model), str(fitted), "--streamed", "--reference", str(model), *few]),
    }[name]


def bound(text: str) -> tuple[str, float]:
    """Return a command and the most that its peak may be, in bytes, of COMMAND=GB."""
    name, _, most = text.partition("=")
    if name not in COMMANDS:
        raise argparse.ArgumentTypeError(f"{name} is none of {', '.join(COMMANDS)}")
    return name, float(most) * 1e9


def main() -> None:
    from synthetic_llama import SHAPES, Shape, write_synthetic_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="instead of a synthetic one")
    parser.add_argument("--size", choices=SHAPES, default="3B")
    parser.add_argument("--layers", type=int, help="fewer than the size has")
    parser.add_argument("--text", type=Path, required=True, help="to calibrate and to measure on")
    parser.add_argument("--tokens", type=int, default=8192, help="of calibration")
    parser.add_argument("--eval-tokens", type=int, default=2048)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--query", default="key-shared")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=COMMANDS)
    parser.add_argument("--most", nargs="+", type=bound, default=[], metavar="COMMAND=GB", help="fail beyond that")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's place for such files")
    options = parser.parse_args()
    rows, most, beyond = [], dict(options.most), []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        model = options.checkpoint or work / "model"
        if options.checkpoint is None:
            shape = SHAPES[options.size]
            if options.layers:
                shape = Shape(**asdict(shape) | {"n_layers": options.layers})
            write_synthetic_llama(model, shape)
        for name in options.only:
            found = run(*arguments_of(name, model, work, options))
            rows.append([name, *(f"{found[key] / 1e9:.2f}" for key in ("start", "peak")), f"{found['seconds']:.0f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
            if found["peak"] > most.get(name, float("inf")):
                beyond.append(name)
            if name == "materialize":
                shutil.rmtree(work / "stock")
    print_table(["command", "at start, GB", "peak over it, GB", "seconds"], rows)
    if beyond:
        sys.exit(f"over the bound: {', '.join(beyond)}")


if __name__ == "__main__":
    main()
