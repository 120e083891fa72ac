"""Run the reference setting through the real command line: what each query map costs, in quality and time.

    python benchmarks/reference.py --calibration foldoc.txt --evaluation handbook.txt --json reference.json
    python benchmarks/reference.py --calibration foldoc.txt --evaluation handbook.txt \\
        --tokens 131072 --query key-shared

Every number comes from a process of its own: `qectomy convert`, `qectomy eval` of what it read and wrote
(they must agree), one plain forward pass of the stock model over the same tokens, and `qectomy --help`. With
`--baselines`, what a user would pick instead is measured in the same run. Run it alone on the machine.
Exit status 1 if a command failed or two disagree; a missed bound is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forward_pass import describe_machine
from setting import CONTEXT, TOKENS, add_setting, print_table, setting_arguments

QECTOMY = (sys.executable, "-m", "qectomy")
FOLDER = Path(__file__).parent
MAPS = ("key-shared", "select", "identity")
RATIOS = {  # (map, calibration tokens): perplexity after / before, (must, aim)
    ("key-shared", TOKENS): (1.13, 1.06),
    ("select", TOKENS): (3.0, 2.0),
    ("identity", TOKENS): (7.0, 3.0),
    ("key-shared", 131_072): (1.08, 1.03),
}
MOST_SECONDS = 900  # of a conversion; no bound beyond TOKENS calibration tokens
PASSES = (8.0, 5.0)  # conversion / forward pass, (must, aim); likewise
HELP_SECONDS = 0.3
HELP_RUNS = 5
AGREEMENT = 1e-4  # relative, between what convert and eval report
LEAST_KL = 1e-2  # nats below which a KL's error is taken relative to this


class BenchmarkError(Exception):
    """A command failed, or two that must agree do not."""


@dataclass(frozen=True)
class Finished:
    """A command that ended well."""

    output: str
    seconds: float  # from start to end, as a user waits
    peak_bytes: int  # largest resident set of the process or of any one it started


def run_measured(*command: str) -> Finished:
    """Run a command, its progress on this stderr; return its output, time and peak memory.

    A forked child's peak counts what the parent held at that moment, so this process loads no torch.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise BenchmarkError(f"exit status {process.returncode}: {' '.join(command)}")
        output.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return Finished(output.read(), seconds, usage.ru_maxrss * unit)


def run_benchmark(name: str, options: argparse.Namespace, *more: str) -> Any:
    """Run another benchmark of this folder in the same setting; return what it writes to --json."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        print(f"running {name}", file=sys.stderr, flush=True)
        done = run_measured(sys.executable, str(FOLDER / name), *setting_arguments(options), "--json", str(file), *more)
        print(done.output, flush=True)
        return json.loads(file.read_text(encoding="utf-8"))


def measure_help() -> dict[str, Any]:
    runs = [run_measured(*QECTOMY, "--help").seconds for _ in range(HELP_RUNS)]
    return {"median": statistics.median(runs), "runs": runs, "must": HELP_SECONDS}


def convert(query: str, out: Path, options: argparse.Namespace) -> Finished:
    """Run the conversion as a user does."""
    print(f"converting with {query}", file=sys.stderr, flush=True)
    return run_measured(
        *(*QECTOMY, "convert", options.checkpoint, "--out", str(out), "--query", query),
        *("--text", options.calibration, "--tokens", str(options.tokens), "--context", str(options.context)),
        *("--eval-text", options.evaluation, "--eval-tokens", str(options.eval_tokens), "--json"),
    )


def measure_map(query: str, out: Path, options: argparse.Namespace, forward: dict[str, Any]) -> dict[str, Any]:
    """Convert with one query map; return its report and what was measured from outside."""
    done = convert(query, out, options)
    report = json.loads(done.output)
    fitted = sum(text["tokens"] for text in report["calibration"]["texts"])
    seen = fitted + report["perplexity"]["protocol"]["tokens"]
    if seen != forward["tokens"]:
        raise BenchmarkError(f"the conversion saw {seen} tokens, the plain forward pass {forward['tokens']}")
    must, aim = RATIOS.get((query, options.tokens), (None, None)) if is_reference(options) else (None, None)
    return {
        "map": query,
        "perplexity": {**report["perplexity"], "must": must, "aim": aim},
        "verdict": judge(report["perplexity"]["ratio"], must, aim),
        "kl": report["kl"],
        "top1_agreement": report["top1_agreement"],
        "parameters_removed": report["parameters"]["before"] - report["parameters"]["after"],
        "seconds": done.seconds,
        "forward_passes": done.seconds / forward["seconds"],
        "peak_bytes": done.peak_bytes,
        "float32_bytes": 4 * report["parameters"]["before"],
        "folder": str(out),
        "report": report,
    }


def is_reference(options: argparse.Namespace) -> bool:
    """Whether the bounds apply: they hold for one evaluation and context, whatever the calibration tokens."""
    return (options.eval_tokens, options.context) == (TOKENS, CONTEXT)


def judge(value: float, must: float | None, aim: float | None) -> str:
    """Say in a word how a value, of which less is better, stands to its bounds."""
    if must is None:
        return "-"
    return "aim" if aim is not None and value <= aim else "met" if value <= must else "MISSED"


def evaluate(folder: str, options: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Return what `qectomy eval` reports of one folder, in the protocol of the conversion."""
    done = run_measured(
        *(*QECTOMY, "eval", folder, "--text", options.evaluation, "--context", str(options.context)),
        *("--tokens", str(options.eval_tokens), "--dtype", "float32", "--json", *more),
    )
    return json.loads(done.output)["results"][0]


def cross_check(row: dict[str, Any], original: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Compare what convert reported with `qectomy eval` of the original and of the reduced folder."""
    reduced = evaluate(row["folder"], options, "--reference", options.checkpoint)
    pairs = {
        "perplexity before": (row["perplexity"]["before"], original["perplexity"], 0.0),
        "perplexity after": (row["perplexity"]["after"], reduced["perplexity"], 0.0),
        "KL": (row["kl"], reduced["kl"], LEAST_KL),
        "top-1 agreement": (row["top1_agreement"], reduced["top1_agreement"], 0.0),
    }
    checks = {
        name: {"convert": ours, "eval": theirs, "error": abs(ours - theirs) / max(abs(theirs), least)}
        for name, (ours, theirs, least) in pairs.items()
    }
    # One near-tie among few tokens moves top-1 agreement by more: shown, not held to the bound.
    agree = all(check["error"] <= AGREEMENT for name, check in checks.items() if name != "top-1 agreement")
    return {"agree": agree, "checks": checks}


def show_quality(rows: list[dict[str, Any]]) -> None:
    header = ("map", "before", "after", "ratio", "must", "aim", "verdict", "KL (nats)", "top-1", "removed")
    table = []
    for row in rows:
        p = row["perplexity"]
        bounds = ("-" if p[name] is None else f"≤ {p[name]:g}" for name in ("must", "aim"))
        numbers = (f"{p['before']:.3f}", f"{p['after']:.3f}", f"{p['ratio']:.4f}")
        agreement = (f"{row['kl']:.4f}", f"{row['top1_agreement']:.1%}")
        removed = f"{row['parameters_removed']:,}"
        table.append((row["map"], *numbers, *bounds, row["verdict"], *agreement, removed))
    print_table(header, table)


def show_cost(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    bounded = is_reference(options) and options.tokens == TOKENS
    table = []
    for row in rows:
        seconds, passes = row["seconds"], row["forward_passes"]
        in_time = judge(passes, *PASSES) if seconds < MOST_SECONDS else "MISSED"
        times = (f"{seconds:.1f}", f"{seconds / passes:.1f}", f"{passes:.2f}", in_time if bounded else "-")
        sizes = (row["peak_bytes"], row["report"]["peak_memory_bytes"], row["float32_bytes"])
        in_memory = "met" if row["peak_bytes"] < row["float32_bytes"] else "MISSED"
        table.append((row["map"], *times, *(f"{size / 1e6:.0f}" for size in sizes), in_memory))
    header = ("map", "seconds", "one pass", "passes", "verdict", "peak MB", "own MB", "float32 MB", "verdict")
    print_table(header, table)
    print(f"Bounds: {MOST_SECONDS} s, {PASSES[0]:g} passes (aim {PASSES[1]:g}), peak below float32's size.")
    print("Peak: resident set of the conversion or of a process it started; own: the same by qectomy.json.\n")


def show_checks(rows: list[dict[str, Any]]) -> None:
    print(f"Cross-check with `qectomy eval`; perplexities and KL must agree to {AGREEMENT:g}:\n")
    table = []
    for row in rows:
        for name, check in row["cross_check"]["checks"].items():
            numbers = (f"{check['convert']:.6f}", f"{check['eval']:.6f}", f"{check['error']:.1e}")
            table.append((row["map"], name, *numbers, "yes" if row["cross_check"]["agree"] else "NO"))
    print_table(("map", "number", "convert", "eval", "relative error", "all agree"), table)


def save(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Write what is there so far: a run takes long, and a later step may fail."""
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def run(options: argparse.Namespace, root: Path) -> bool:
    """Measure everything and print it; return whether every step worked and agreed."""
    setting = {name: value for name, value in vars(options).items() if name not in ("json", "out_root")}
    result: dict[str, Any] = {"setting": setting, "machine": describe_machine(), "failures": [], "maps": []}
    result["help_seconds"] = measure_help()
    forward = result["forward_pass"] = run_benchmark("forward_pass.py", options)
    original = result["original"] = evaluate(options.checkpoint, options)
    for query in options.query:
        try:
            row = measure_map(query, root / re.sub(r"[^\w.-]+", "_", query), options, forward)
            row["cross_check"] = cross_check(row, original, options)
            result["maps"].append(row)
            if not row["cross_check"]["agree"]:
                raise BenchmarkError(f"convert and eval disagree on {query}: see the cross-check below")
        except BenchmarkError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            result["failures"].append(str(error))
        save(result, options)
    show(result, options)
    if options.baselines:
        folders = [row["folder"] for row in result["maps"]]
        result["baselines"] = run_benchmark("baselines.py", options, "--reduced", *folders)
        save(result, options)
    return not result["failures"]


def show(result: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the tables."""
    machine, threads = result["machine"], result["forward_pass"]["threads"]
    print(f"{machine['processor']}, {machine['cores']} cores, {threads} threads, ", end="")
    print(f"{machine['memory_bytes'] / 1e9:.1f} GB, load {machine['load_average']} at the start")
    note = "" if is_reference(options) else "; not the reference setting, its bounds do not apply"
    print(f"{options.tokens:,} + {options.eval_tokens:,} tokens in windows of {options.context}{note}\n")
    show_quality(result["maps"])
    show_cost(result["maps"], options)
    show_checks(result["maps"])
    median = result["help_seconds"]["median"]
    verdict = "met" if median < HELP_SECONDS else "MISSED"
    print(f"qectomy --help: {median:.3f} s, median of {HELP_RUNS} (must be under {HELP_SECONDS:g} s): {verdict}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--query", nargs="+", default=MAPS, metavar="MAP", help=f"default: {' '.join(MAPS)}")
    parser.add_argument("--out-root", type=Path, metavar="DIR", help="keep the reduced folders here")
    parser.add_argument("--baselines", action="store_true", help="run baselines.py beside them")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="qectomy-reference-") as scratch:
            if options.out_root:
                options.out_root.mkdir(parents=True, exist_ok=True)
            return 0 if run(options, options.out_root or Path(scratch)) else 1
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
