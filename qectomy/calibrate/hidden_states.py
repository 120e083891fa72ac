"""Windows of numbers on disk, read a few at a time: hidden states, and what one layer's fit looks at.

A file, not a map of one: mapped pages would count as this process's memory and grow it to the file's size.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from qectomy.checkpoint.checkpoint import BYTES_A_READ
from qectomy.checkpoint.shards import write_all
from qectomy.distributed.window_shard import WindowShard, whole
from qectomy.errors import OutputError

KEPT = 3  # layers whose states are there: the one that is being written, and two to go on from


class WindowFile:
    """n_windows tensors of one shape and type in a file: read and written by runs [start:stop], read by lists too.

    A file that is there already keeps what it holds.
    """

    def __init__(self, path: Path, n_windows: int, *shape: int, dtype: torch.dtype = torch.float32):
        self.shape, self.dtype = (n_windows, *shape), dtype
        self._window_bytes = torch.Size(shape).numel() * dtype.itemsize
        self._crc, self._summed = 0, 0  # of the first windows, if they were written one after the other
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "r+b", buffering=0)
        try:
            size = max(1, n_windows * self._window_bytes)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), 0, size)
            else:  # macOS: the room was checked before, and a full disk shows when it is written
                os.ftruncate(self._file.fileno(), size)
        except OSError as error:
            self._file.close()
            raise OutputError(f"{path.parent}: no room for {n_windows * self._window_bytes:,} bytes") from error

    def __getitem__(self, windows: slice | list[int]) -> torch.Tensor:
        """Return a run of windows, [start:stop], or those listed, in that order, as a new tensor."""
        if isinstance(windows, slice):
            start, stop = self._run(windows)
            return self._fill(torch.empty((stop - start, *self.shape[1:]), dtype=self.dtype), start)
        out = torch.empty((len(windows), *self.shape[1:]), dtype=self.dtype)
        for place, window in zip(out, windows, strict=True):
            self._fill(place, window)
        return out

    def __setitem__(self, windows: slice, values: torch.Tensor) -> None:
        """Store a run of windows, [start:stop] of them."""
        start, stop = self._run(windows)
        assert values.shape == (stop - start, *self.shape[1:])
        data = _bytes(values.detach().to("cpu", self.dtype).contiguous())
        write_all(self._file.fileno(), data, start * self._window_bytes)
        follows = start in (0, self._summed)
        self._crc, self._summed = (zlib.crc32(data, self._crc if start else 0), stop) if follows else (0, -1)

    def checksum(self) -> int:
        """Return the CRC-32 of what was written, every window once, from the first to the last."""
        assert self._summed == self.shape[0], "windows were not written one after the other"
        return self._crc

    def checksum_on_disk(self) -> int:
        """Return the CRC-32 of what the file holds."""
        crc = 0
        for start, stop in batches(0, self.shape[0], max(1, BYTES_A_READ // max(1, self._window_bytes))):
            crc = zlib.crc32(_bytes(self[start:stop]), crc)
        return crc

    def sync(self) -> None:
        """Bring what was written to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _run(self, windows: slice) -> tuple[int, int]:
        start, stop, step = windows.indices(self.shape[0])
        assert step == 1
        return start, max(start, stop)

    def _fill(self, out: torch.Tensor, start: int) -> torch.Tensor:
        view, offset = _bytes(out), start * self._window_bytes
        while len(view):
            got = os.preadv(self._file.fileno(), [view], offset)
            assert got > 0, "the file of windows is shorter than planned"
            view, offset = view[got:], offset + got
        return out


class Streams:
    """Hidden states of both models as they enter a layer, and as they leave it.

    Windows [0, fitted) are fitted on, the rest only measured. All have the shape (n_windows, T, D), float32.
    Files of three layers take turns for each model, and outlive the process: what entered the layer before is whole as
    long as a layer runs, so that a step that is damaged then costs that step alone.
    These are the windows of this process; `share` says which of the run's they are.
    """

    def __init__(
        self, folder: Path, shape: Sequence[int], *, fitted: int, batch: int, share: WindowShard | None = None
    ):
        self.scratch, self.fitted, self.batch = folder, fitted, batch  # batch: windows handled at a time
        self.share = share or whole(fitted, shape[0] - fitted)
        with ExitStack() as stack:

            def file(name: str, n_windows: int) -> WindowFile:
                made = WindowFile(folder / name, n_windows, *shape[1:])
                stack.callback(made.close)
                return made

            self._pairs = [(file(f"teacher-{i}", shape[0]), file(f"student-{i}", shape[0])) for i in range(KEPT)]
            self.teacher_mid = file("teacher-mid", fitted)  # after the attention; only the refit asks for it
            self._stack = stack.pop_all()
        self.enter(0)

    def enter(self, layer: int) -> None:
        """Let what left the layer before be what enters this one."""
        self.teacher, self.student = self._pairs[layer % KEPT]
        self.teacher_after, self.student_after = self._pairs[(layer + 1) % KEPT]

    def sync(self) -> list[int]:
        """Bring both models' states that enter the layer to the disk; return their checksums."""
        for states in (self.teacher, self.student):
            states.sync()
        return [self.teacher.checksum(), self.student.checksum()]

    def checksums_on_disk(self, layer: int) -> list[int]:
        """Return those of the states that enter a layer, as the files hold them; `sync` told what they should be."""
        return [states.checksum_on_disk() for states in self._pairs[layer % KEPT]]

    def close(self) -> None:
        """Close the files."""
        self._stack.close()


@contextmanager
def scratch_file(path: Path, n_windows: int, *shape: int, dtype: torch.dtype = torch.float32) -> Iterator[WindowFile]:
    """Yield a file of windows that is gone when the block ends, however it ends."""
    with ExitStack() as stack:
        stack.callback(path.unlink, missing_ok=True)
        file = WindowFile(path, n_windows, *shape, dtype=dtype)
        stack.callback(file.close)
        yield file


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any type, shared with it."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def batches(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield [a, b) runs of at most `size` windows that cover [start, stop)."""
    for a in range(start, stop, size):
        yield a, min(a + size, stop)
