"""Take a checkpoint's layers one after the other, the next one on its way while one is in use.

On a CUDA device a thread reads the next layer and copies it from page-locked memory on a stream of its own: two layers
are held there, on the host one in page-locked memory and a tensor beside it. On the processor one layer is the bound
of a pass: there the system is only told which bytes come next, and reads them into its page cache, no memory of the
process.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import Checkpoint

BYTES_A_HINT = 128 * 1024  # Linux reads no more a call than a disk's read-ahead, which is this unless it was set
Tensors = dict[str, torch.Tensor]
Each = Iterator[tuple[str, torch.Tensor]]  # a layer's tensors, each made when it is asked for


def read_layers(
    checkpoint: Checkpoint,
    layers: Iterable[int],
    dtype: torch.dtype | None,
    device: torch.device,
    *,
    on_host: bool = False,
) -> "Layers":
    """Return some layers of a checkpoint, to be taken in this order, in `dtype` (None: as stored), on the device.

    `on_host` leaves them in the host's memory, from where a copy to the device is quick. Taking a layer raises what
    reading it raises.
    """
    if device.type == "cuda":
        copies = CudaCopies(device)
        if on_host:
            return LayersAhead(layers, lambda layer: copies.locked(_read_each(checkpoint, layer, dtype)))
        # As stored: fewer bytes are copied than in a wider type, and the device casts them to the same numbers.
        return LayersAhead(
            layers,
            lambda layer: copies.send(_read_each(checkpoint, layer)),
            lambda sent: _in_type(copies.receive(*sent), dtype) if dtype else copies.receive(*sent),
        )

    def read(layer: int) -> Tensors:
        tensors = checkpoint.read_layer(layer, dtype)
        return tensors if on_host else {name: tensor.to(device) for name, tensor in tensors.items()}

    return Layers(layers, read, page_cache(checkpoint))


class Layers:
    """Layers to be taken in a given order, each read when it is taken; `soon` is then told the one that follows."""

    def __init__(
        self, layers: Iterable[int], read: Callable[[int], Any], soon: Callable[[int], None] = lambda layer: None
    ):
        self._left, self._read, self._soon = deque(layers), read, soon

    def take(self, layer: int) -> Tensors:
        """Return the tensors of this layer, by name inside it; it must be the one whose turn it is."""
        turn = self._left.popleft()
        assert turn == layer, "layers are taken in the order in which they were announced"
        tensors: Tensors = self._read(layer)
        if self._left:
            self._soon(self._left[0])
        return tensors

    def __enter__(self) -> "Layers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


class LayersAhead(Layers):
    """Layers that a thread reads, each while the one before is in use; it is one ahead, never two.

    An error of `read` is raised where the layer is taken that it belongs to. `receive` ends in the caller's thread what
    `read` has begun in the other. The thread is gone when the block ends, however it ends.
    """

    def __init__(
        self,
        layers: Iterable[int],
        read: Callable[[int], Any],
        receive: Callable[[Any], Tensors] = lambda tensors: tensors,
    ):
        super().__init__(layers, read)
        self._receive, self._thread = receive, ThreadPoolExecutor(1, "read-ahead")
        self._coming: Future[Any] | None = None

    def take(self, layer: int) -> Tensors:
        """Return the tensors of this layer, by name inside it; it must be the one whose turn it is."""
        turn = self._left.popleft()
        assert turn == layer, "layers are taken in the order in which they were announced"
        assert self._coming is not None, "layers are taken inside the block"
        tensors = self._receive(self._coming.result())
        self._begin()
        return tensors

    def _begin(self) -> None:
        """Let the thread read the layer that follows; the one before is not held here any more."""
        self._coming = self._thread.submit(self._read, self._left[0]) if self._left else None

    def __enter__(self) -> "Layers":
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown()  # waits
        self._coming = None


class CudaCopies:
    """Copies to a CUDA device on a stream of its own, so that they run beside what the device computes."""

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def send(self, tensors: Each) -> tuple[Tensors, Any]:
        """Begin to copy tensors from the host; return where they will be, and the event that ends the copy.

        Only from page-locked memory does a copy not wait. PyTorch keeps such memory from being used again before the
        copies from it are done, so nobody has to hold it.
        """
        with torch.cuda.stream(self._stream):  # the thread's own current stream and device: they are per thread
            sent = {name: tensor.pin_memory().to(self._device, non_blocking=True) for name, tensor in tensors}
            return sent, self._stream.record_event()

    def receive(self, sent: Tensors, copied: Any) -> Tensors:
        """Return the tensors for use on the caller's current stream, which waits for the copy; the caller does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(copied)
        for tensor in sent.values():
            # They were allocated for the copying stream. Without this their memory could be given to the next copy as
            # soon as Python drops them, while kernels that were queued on the current stream still read it.
            tensor.record_stream(current)
        return sent

    def locked(self, tensors: Each) -> Tensors:
        """Return the tensors in page-locked memory of the host, from where a copy to the device needs no other one."""
        with torch.cuda.stream(self._stream):  # and so on this device, or the memory would open the first one
            return {name: tensor.pin_memory() for name, tensor in tensors}


def page_cache(checkpoint: Checkpoint) -> Callable[[int], None]:
    """Return a function that asks the system to read a layer's bytes into its page cache, and does not wait.

    A hint: where the system takes none, or the file cannot be opened, the layer is read when it is needed.
    """
    if not hasattr(os, "posix_fadvise"):  # macOS
        return lambda layer: None

    def soon(layer: int) -> None:
        for _, info in checkpoint.layer_tensors(layer):
            with suppress(OSError), (checkpoint.folder / info.file).open("rb", buffering=0) as file:
                for offset in range(info.start, info.start + info.nbytes, BYTES_A_HINT):
                    os.posix_fadvise(file.fileno(), offset, BYTES_A_HINT, os.POSIX_FADV_WILLNEED)

    return soon


def _read_each(checkpoint: Checkpoint, layer: int, dtype: torch.dtype | None = None) -> Each:
    """Yield a layer's tensors by name inside it, one read at a time."""
    prefix = checkpoint.prefix(layer)
    for name, _ in checkpoint.layer_tensors(layer):
        yield name, checkpoint.read(prefix + name, dtype)


def _in_type(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    """Return the tensors in a type, but for the indices among them."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
