"""Load time and peak memory of a checkpoint in a process of its own, which nothing else has warmed or filled."""

import json
import mmap
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qectomy.errors import QectomyError
from qectomy.eval.inference_loops import InferenceLoop, random_tokens
from qectomy.eval.loading import load_model
from qectomy.eval.peak_memory import peak_memory_bytes

STEPS = 4  # of decoding, in the measure of memory

# The child must find qectomy and must not find modules in the folder that it happens to run in.
CHILD = "import sys; sys.path[0] = sys.argv[1]; from qectomy.eval.fresh_start import _main; _main(sys.argv[2])"


@dataclass(frozen=True, kw_only=True)
class FreshStart:
    """Seconds until all weights are in memory, imports not counted; peak memory of that and a short run."""

    load_seconds: float
    peak_memory_bytes: int


def fresh_start(
    checkpoint: str, *, dtype: str | None, device: str, batch: int, prompt: int, threads: int | None, seed: int
) -> FreshStart:
    """Load, prefill and decode a few tokens in a fresh process. Raises QectomyError with the reason if that fails.

    Memory is the process's largest resident set, or on CUDA the most that was allocated there.
    """
    wanted = dict(
        checkpoint=checkpoint, dtype=dtype, device=device, batch=batch, prompt=prompt, threads=threads, seed=seed
    )
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parents[2]), json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode < 0:
        raise QectomyError(
            f"{checkpoint}: the process that loads it was killed (signal {-done.returncode}) at batch {batch} of "
            f"{prompt} tokens: most likely out of memory"
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise QectomyError(f"{checkpoint}: a fresh process cannot run it: {last}")
    return FreshStart(**json.loads(done.stdout.strip().splitlines()[-1]))


def warm_files(folder: Path) -> None:
    """Read a checkpoint's weights once, so that no load is the one that fetches them from the disk."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def touch(model: torch.nn.Module) -> None:
    """Read a number of every page of the weights: on a CPU they are mapped from the file, and come when read."""
    for tensor in model.parameters():
        if tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.detach().view(-1).view(torch.uint8)[:: mmap.PAGESIZE].sum()


def _start(wanted: dict[str, Any]) -> FreshStart:
    import transformers  # noqa: F401  imports are not what is measured

    from qectomy.models.architectures import FAMILIES

    for family in FAMILIES.values():
        for reduced in (False, True):
            family.causal_class(reduced=reduced)
    if wanted["threads"]:
        torch.set_num_threads(wanted["threads"])
    on_cuda = torch.device(wanted["device"]).type == "cuda"
    if on_cuda:
        torch.zeros(1, device=wanted["device"]).item()  # the device's own start is not what is measured
    begun = time.perf_counter()
    model = load_model(wanted["checkpoint"], wanted["dtype"], wanted["device"])[0]
    loop = InferenceLoop(wanted["checkpoint"], model)
    touch(model)
    seconds = loop.now() - begun
    loop.run(*random_tokens(model.config.vocab_size, wanted["batch"], wanted["prompt"], STEPS, wanted["seed"]))
    peak = torch.cuda.max_memory_allocated(loop.device) if on_cuda else peak_memory_bytes()
    return FreshStart(load_seconds=seconds, peak_memory_bytes=peak)


def _main(wanted: str) -> None:
    try:
        print(json.dumps(asdict(_start(json.loads(wanted)))))
    except QectomyError as error:
        sys.exit(str(error))
