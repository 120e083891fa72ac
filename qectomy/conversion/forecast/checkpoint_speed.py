"""How fast this machine reads a checkpoint's tensors, and hashes them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qectomy.checkpoint.checkpoint import Checkpoint

READ = 24_000_000  # bytes of the weights that are read, about: enough to see the disk, or the memory that caches it
HASHED = 16_000_000


@dataclass(frozen=True, kw_only=True)
class CheckpointSpeed:
    """Seconds a byte of the stored weights: read into float32, and hashed."""

    read: float
    hash: float


def checkpoint_speed(source: Checkpoint, clock: Callable[[], float]) -> CheckpointSpeed:
    """Return the speeds, after reading some megabytes; each part of a file is read once, as a conversion first does."""
    since, done = clock(), 0
    for name, info in source.layer_tensors(source.dims.n_stored - 1):
        rows = max(1, min(info.shape[0], READ // max(1, info.nbytes // info.shape[0])))
        full = source.prefix(source.dims.n_stored - 1) + name
        source.read_rows(full, 0, rows, torch.float32)
        done += rows * (info.nbytes // info.shape[0])
        if done >= READ:
            break
    read = (clock() - since) / done
    data = bytes(HASHED)
    since = clock()
    hashlib.sha256(data).hexdigest()
    return CheckpointSpeed(read=read, hash=(clock() - since) / HASHED)
