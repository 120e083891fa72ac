"""What `convert --dry-run` foretells beside what the conversion then takes: memory, disk, seconds; for several models.

Each is asked and converted in fresh processes. A size's name stands for a synthetic Llama, made and deleted here. Peak
memory and the stages' seconds are those of the conversion's own report; the disk is looked at while it runs.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from setting import print_table

SAMPLES = Path(__file__).parents[1] / "samples"
KINDS = ("peak_memory_bytes", "disk_bytes", "seconds")
LOOK = 0.05  # seconds between two looks at the disk


def run(arguments: list[str]) -> dict[str, Any]:
    """Return what a command of qectomy prints as JSON, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "qectomy", *arguments, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"qectomy {arguments[0]} failed: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout))


class DiskWatch:
    """The most bytes that a conversion's folders took on the disk while the block ran."""

    def __init__(self, out: Path):
        self._folders = (out.with_name(f"{out.name}.converting"), out)
        self._done, self.most = threading.Event(), 0
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "DiskWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(LOOK):
            taken = 0
            for folder in self._folders:
                for path in folder.rglob("*"):
                    try:
                        taken += 512 * path.stat().st_blocks  # a planned file has its size before it has its bytes
                    except OSError:  # it went between the listing and the look
                        continue
            self.most = max(self.most, taken)


def compare(model: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what was foretold and what was measured for one checkpoint."""
    out = work / "reduced"
    told = ["--text", str(options.text), "--query", options.query, "--tokens", str(options.tokens)]
    told += ["--eval-tokens", str(options.eval_tokens), "--context", str(options.context)]
    command = ["convert", str(model), "--out", str(out), *told]
    foretold = run([*command, "--dry-run"])["needs"]
    begun = time.perf_counter()
    with DiskWatch(out) as disk:
        report = run(command)
    measured = {
        "peak_memory_bytes": report["peak_memory_bytes"],
        "disk_bytes": disk.most,
        "seconds": round(time.perf_counter() - begun, 1),
        "stages": report["seconds"],
    }
    shutil.rmtree(out)
    return {"foretold": foretold, "measured": measured}


def rows_of(name: str, found: dict[str, Any]) -> list[list[str]]:
    """Return the lines of the table for one checkpoint."""
    rows = []
    for kind in KINDS:
        told, seen = (found[side][kind] for side in ("foretold", "measured"))
        unit, digits = (1e6, 0) if kind != "seconds" else (1, 1)
        shown = kind.replace("_bytes", ", MB").replace("_", " ")
        rows.append([name, shown, f"{told / unit:.{digits}f}", f"{seen / unit:.{digits}f}", f"{told / seen:.2f}"])
    return rows


def stage_rows(name: str, found: dict[str, Any]) -> list[list[str]]:
    """Return the seconds of each stage, foretold and measured."""
    told, seen = (found[side]["stages"] for side in ("foretold", "measured"))
    return [[name, stage, f"{told[stage]:.1f}", f"{seen[stage]:.1f}", ""] for stage in told if stage in seen]


def write_headers(folder: Path, shape: Any) -> None:
    """Write a synthetic model's config and headers; the weights are a hole in the file, which reads as 0."""
    from synthetic_llama import _config, _tensors

    from qectomy.checkpoint.headers import INDEX
    from qectomy.checkpoint.shards import ShardLayout, TensorSpec

    layout = ShardLayout({name: TensorSpec(size, "BF16") for name, size in _tensors(shape).items()})
    folder.mkdir()
    for name, header, size in zip(layout.names, layout.headers, layout.sizes, strict=True):
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(size)
    if len(layout.names) > 1:
        places = {name: layout.names[shard] for name, (shard, _) in layout.places.items()}
        (folder / INDEX).write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(_config(shape)), encoding="utf-8")


def foretell(folder: Path, options: argparse.Namespace) -> list[list[str]]:
    """Return what is foretold for a checkpoint, stage by stage, and for the other commands."""
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.conversion.forecast import commands
    from qectomy.conversion.forecast.forecast import forecast
    from qectomy.conversion.forecast.work import plan_work
    from qectomy.models.query_maps import parse_recipe

    source = open_checkpoint(folder)
    recipe = tuple(parse_recipe(options.query, source.dims))
    told = {"tokens": options.tokens, "eval_tokens": options.eval_tokens, "context": options.context}
    needs, work = forecast(source, recipe, **told), plan_work(source, recipe, **told)
    rows = [["convert", stage, f"{n_bytes / 1e9:.2f} GB"] for stage, n_bytes in needs["memory_stages"].items()]
    for command in (commands.exact, commands.materialize, commands.verify, commands.streamed_eval):
        n_bytes, stage = commands.largest(command(work))
        rows.append([command.__name__.replace("_", " "), stage, f"{n_bytes / 1e9:.2f} GB"])
    rows.append(["convert", "disk", f"{needs['disk_bytes'] / 1e9:.1f} GB"])
    if needs["seconds"] is None:  # of layers that are too large to try out
        return rows
    rows += [["convert", stage, f"{seconds:.0f} s"] for stage, seconds in needs["stages"].items()]
    return [
        *rows,
        ["convert", "seconds in all", f"{needs['seconds']:.0f} s"],
        ["telling the time", "", f"{needs['probe_seconds']} s"],
    ]


def main() -> None:
    from synthetic_llama import SHAPES, Shape, write_synthetic_llama

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help=f"folders, or sizes of synthetic models: {', '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, help="of a synthetic model, fewer than its size has")
    parser.add_argument("--text", type=Path, default=SAMPLES / "kjv_train.txt", help="to calibrate and measure on")
    parser.add_argument("--query", default="key-shared")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--eval-tokens", type=int, default=32_768)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--stages", action="store_true", help="show the seconds of each stage too")
    parser.add_argument(
        "--foretell", action="store_true", help="convert nothing: show what is foretold, stage by stage"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was foretold and measured")
    parser.add_argument("--folder", type=Path, help="where to work; default: the system's place for such files")
    options = parser.parse_args()
    rows, results = [], {}
    for name in options.models:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            work = Path(folder)
            model = Path(name)
            if name in SHAPES:
                model, shape = work / "model", SHAPES[name]
                shape = Shape(**asdict(shape) | {"n_layers": options.layers or shape.n_layers})
                (write_headers if options.foretell else write_synthetic_llama)(model, shape)
            if options.foretell:
                print_table([name, "stage", "foretold"], foretell(model, options))
                continue
            results[name] = compare(model, work, options)
        rows += rows_of(name, results[name]) + (stage_rows(name, results[name]) if options.stages else [])
    if rows:
        print_table(["model", "what", "foretold", "measured", "ratio"], rows)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
