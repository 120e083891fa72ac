"""Feed every reader of outside files with hostile ones and print what became of them.

    python benchmarks/fuzz_readers.py --cases 10000

The cases are those of tests/fuzz, made in two ways, `--cases` of each: by hypothesis, and, where atheris is installed
(`pip install atheris`; Linux, Python 3.11 to 3.13), by a fuzzer that is guided by which lines of qectomy a case reached
and changes the bytes from which a case's choices come, or the file itself. Each reader runs in a process of its own.
A fault is any exception but a QectomyError, a file made or changed outside the case's folder, or a result that
contradicts a plain reading of the same bytes. It is printed with what remakes it, and the exit code is 1.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FASTEST = Path("/dev/shm")  # a case is a folder of small files, and a journal waits for the disk
EVERY = 5.0  # seconds between two notes of what a process has done
HEADER = ("reader", "cases by", "cases", "accepted", "refused", "slowest", "memory", "faults")


class Tally:
    """What became of the cases of one reader, kept in a file: a guided fuzzer ends its process as it likes."""

    def __init__(self, reader: Any, place: Path, told: Path):
        from cases import outcome

        self._outcome, self._reader, self._place, self._told = outcome, reader, place, told
        self._counts, self._faults, self._slowest, self._noted = Counter[str](), dict[str, str](), 0.0, 0.0
        self.made = 0
        for start in range(20):  # what the first cases load is no growth
            with suppress(Exception):
                outcome(reader, reader.make(random.Random(start)), place)
        self._memory = peak_memory()

    def case(self, case: Any, remade_by: str) -> None:
        self.made += 1
        begun = time.perf_counter()
        try:
            self._counts[self._outcome(self._reader, case, self._place)] += 1
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a panic of a Rust library is no Exception
            self._fault(error, remade_by)
        self._slowest = max(self._slowest, time.perf_counter() - begun)
        if time.perf_counter() - self._noted > EVERY:
            self.note()

    def _fault(self, error: BaseException, remade_by: str) -> None:
        self._counts["fault"] += 1
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} at {last.filename}:{last.lineno}"
        self._faults.setdefault(where, f"{where}: {str(error)[:200]!r}, from {remade_by}")

    def note(self) -> None:
        self._noted = time.perf_counter()
        grown = max(0, peak_memory() - self._memory)
        told = dict(made=self.made, counts=self._counts, faults=list(self._faults.values()))
        self._told.write_text(json.dumps(told | dict(slowest=self._slowest, grown=grown)))


def peak_memory() -> int:
    """The largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child(name: str, how: str, cases: int, seed: int, folder: Path) -> None:
    """Run one reader's cases in this process."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]
    if how == "coverage":
        import atheris

        with atheris.instrument_imports(include=["qectomy"]):
            from readers import make_readers
    else:
        from readers import make_readers

    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    place = folder / "watched" / "case"
    reader = next(reader for reader in make_readers(folder / "sound", place) if reader.name == name)
    tally = Tally(reader, place, folder / "told.json")
    (guided if how == "coverage" else sampled)(reader, tally, cases, seed)


def sampled(reader: Any, tally: Tally, cases: int, seed: int) -> None:
    """Let hypothesis make the cases."""
    import hypothesis
    from hypothesis import strategies as st

    kept = hypothesis.settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    @hypothesis.seed(seed)
    @kept
    @hypothesis.given(st.randoms(use_true_random=False))
    def run(dice: Any) -> None:
        tally.case(reader.make(dice), f"--seed {seed}, case {tally.made}")

    while tally.made < cases:  # hypothesis stops where it thinks to have seen all
        run()
        seed += 1
    tally.note()


def guided(reader: Any, tally: Tally, cases: int, seed: int) -> None:
    """Let atheris make the cases, half of them the bytes of a file where the reader has one."""
    import atheris
    from mutations import ByteDice

    def run(data: bytes) -> None:
        if reader.raw is not None and data[:1] > b"\x7f":
            tally.case(reader.raw(data[1:]), f"the file {data[1:].hex()[:400]}")
        else:
            tally.case(reader.make(ByteDice(data[1:])), f"the choices {data.hex()[:400]}")
        if tally.made >= cases:
            tally.note()
            os._exit(0)

    corpus = tally._told.parent / "corpus"
    corpus.mkdir()
    for start in range(64):  # long enough for a case of many choices
        block = b"".join(hashlib.sha256(f"{seed} {start} {i}".encode()).digest() for i in range(16))
        (corpus / str(start)).write_bytes(b"\0" + block)
    options = [
        "-max_len=4096",
        "-rss_limit_mb=0",
        "-timeout=600",
        f"-seed={seed + 1}",
        "-verbosity=0",
        "-print_final_stats=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], run)
    atheris.Fuzz()


def run_reader(name: str, how: str, cases: int, seed: int, limit: int) -> dict[str, Any]:
    """Run one reader's cases in a process of its own; return what it told."""
    with tempfile.TemporaryDirectory(dir=FASTEST if FASTEST.is_dir() else None) as folder:
        command = [sys.executable, __file__, "--child", name, how, folder, "--cases", str(cases), "--seed", str(seed)]
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            command,
            env={**os.environ, **quiet, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        )
        told = Path(folder) / "told.json"
        found: dict[str, Any] = dict(made=0, counts={}, faults=[], slowest=0.0, grown=0)
        found |= json.loads(told.read_text()) if told.is_file() else {}
        if done.returncode or found["made"] < cases:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
            found["faults"].append(f"the process ended ({done.returncode}) after {found['made']} cases: {last}")
        return found


def row(name: str, how: str, found: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    kinds = Counter(found["counts"])
    accepted, faults = kinds.pop("accepted", 0), max(kinds.pop("fault", 0), len(found["faults"]))
    refused = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    sizes = f"{found['slowest']:.2f} s", f"{found['grown'] / 1e6:.0f} MB"
    return name, how, f"{found['made']:,}", f"{accepted:,}", refused, *sizes, str(faults)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="for each reader and each way of making them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", nargs="*", help="only those whose names hold one of these words")
    parser.add_argument("--by", nargs="*", choices=("hypothesis", "coverage"), help="default: both, where atheris is")
    parser.add_argument("--memory", type=float, default=16.0, help="GB of address space that a process may take")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        name, how, folder = options.child
        child(name, how, options.cases, options.seed, Path(folder))
        return
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "fuzz")]
    from test_fuzz_readers import NAMES

    ways = options.by or ["hypothesis", *(["coverage"] if importlib.util.find_spec("atheris") else [])]
    rows, faults = [HEADER], list[str]()
    for name in NAMES:
        if options.reader and not any(word in name for word in options.reader):
            continue
        for how in ways:
            begun = time.perf_counter()
            found = run_reader(name, how, options.cases, options.seed, int(options.memory * 1e9))
            rows.append(row(name, how, found))
            faults += [f"{name}: {fault}" for fault in found["faults"]]
            seconds = f"({time.perf_counter() - begun:.0f} s)"
            print(*rows[-1], seconds, sep=" | ", file=sys.stderr, flush=True)
    print(*faults, sep="\n") if faults else None
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
