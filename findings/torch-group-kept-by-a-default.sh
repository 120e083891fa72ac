#!/usr/bin/env bash
# torch 2.13.0: importing torch.distributed.nn after a process group was made keeps that group, and its connections
# stay open after destroy_process_group.
#
# Versions: torch 2.13.0 (gloo, two processes on one machine)
# Expected: destroy_process_group closes the group's connections, whenever which module was imported.
# Seen:     the functions of torch.distributed.nn have `group=group.WORLD` among their defaults, and WORLD is the group
#           that is there when the module is first imported: the defaults hold it as long as the process lives.
#             imported before the group is made: sockets 0 more after it was destroyed than before it was made
#             imported after:                    sockets 2 more
# Matters:  a process that lets go of its group so that the others notice keeps them waiting instead. Import the module
#           before init_process_group.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
if [ ! -d "$env" ]; then
    "${PYTHON:-python3.11}" -m venv "$env"
    "$env/bin/pip" install -qq --no-compile torch==2.13.0 numpy
fi
export OMP_NUM_THREADS=1

cat >try.py <<'PY'
import gc
import importlib
import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def sockets() -> int:
    """How many sockets this process has open."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except OSError:  # the listing's own
            continue
    return found


def work(rank: int, store: str, when: str, results) -> None:
    if when == "before":
        importlib.import_module("torch.distributed.nn")
    before = sockets()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.all_reduce(torch.ones(3))
    if when == "after":
        importlib.import_module("torch.distributed.nn")
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()
    results[rank] = sockets() - before


def left_open(when: str) -> list[int]:
    with tempfile.TemporaryDirectory() as folder, mp.get_context("spawn").Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (f"{folder}/store", when, results), nprocs=2)
        return [results[rank] for rank in range(2)]


if __name__ == "__main__":
    early, late = left_open("before"), left_open("after")
    print(f"sockets left open by each process: imported before {early}, after {late}")
    if max(early) > 0 or min(late) <= 0:
        sys.exit("changed: the group is let go of whenever torch.distributed.nn was imported, or never")
PY
"$env/bin/python" try.py
