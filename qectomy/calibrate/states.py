"""Hidden states of all windows, kept in a file and read a few windows at a time.

The operating system keeps what fits in its page cache, so small runs stay in memory and large ones need only disk.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from qectomy.errors import OutputError
from qectomy.surgery.writer import write_all


class HiddenStates:
    """A (n_windows, context, d_model) float32 tensor on disk."""

    def __init__(self, path: Path, n_windows: int, context: int, d_model: int):
        self.shape = (n_windows, context, d_model)
        self._window_bytes = context * d_model * 4
        self._file = path.open("w+b", buffering=0)
        try:
            size = max(1, n_windows * self._window_bytes)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:  # macOS: the room was checked before, and a full disk shows when it is written
                os.ftruncate(self._file.fileno(), size)
        except OSError as error:
            raise OutputError(f"{path.parent}: no room for {n_windows * self._window_bytes:,} bytes") from error

    def read(self, start: int, stop: int) -> torch.Tensor:
        """Return windows [start, stop) as a new (stop - start, context, d_model) tensor."""
        out = torch.empty((stop - start, *self.shape[1:]))
        view = out.numpy().data.cast("B")
        offset = start * self._window_bytes
        while len(view):
            got = os.preadv(self._file.fileno(), [view], offset)
            assert got > 0, "hidden-state file is shorter than planned"
            view, offset = view[got:], offset + got
        return out

    def write(self, start: int, states: torch.Tensor) -> None:
        """Store windows from `start` on."""
        data = states.detach().to("cpu", torch.float32).contiguous().numpy().data.cast("B")
        write_all(self._file.fileno(), data, start * self._window_bytes)

    def close(self) -> None:
        self._file.close()


def batches(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield [a, b) runs of at most `size` windows that cover [start, stop)."""
    for a in range(start, stop, size):
        yield a, min(a + size, stop)
