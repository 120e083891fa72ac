"""One of the processes that torchrun started; `together.py` says how they get on with each other."""

import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed

from qectomy.distributed.processes import PATIENCE, Processes
from qectomy.distributed.together import Together
from qectomy.errors import QectomyError, Stopped

T = TypeVar("T")
_MENDABLE = (QectomyError, OSError)  # by the user, who is told as it was raised


class _ElsewhereError(Exception):
    """Another process has failed; what it has to say is not known yet."""


class Launched(Together):
    """This process and its connections. Raises QectomyError when not all processes find each other.

    Sums go over the devices, by nccl or gloo; objects and whether anyone has failed over the processors, by gloo.
    """

    def __init__(self, device: str):
        found = Processes(device)
        super().__init__(found.device)
        self.count, self.rank = distributed.get_world_size(), distributed.get_rank()
        self._talk = distributed.new_group(backend="gloo", timeout=PATIENCE)
        self._ended = False
        self._agreed = False  # whether all have ended together, and know with which error

    def sum_(self, *tensors: torch.Tensor) -> None:
        self._in_place(tensors, lambda whole, group: distributed.all_reduce(whole, group=group))

    def take_first_(self, *tensors: torch.Tensor) -> None:
        self._in_place(tensors, lambda whole, group: distributed.broadcast(whole, 0, group=group))

    def first_alone(self, act: Callable[[], T]) -> T:
        found = [act() if self.is_first else None]
        self.meet()
        with _connected():
            distributed.broadcast_object_list(found, 0, group=self._talk)
        return found[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        self.meet()
        return self._gathered(value)

    def meet(self) -> None:
        if self._any(False):
            raise _ElsewhereError

    @contextmanager
    def one_end(self) -> Iterator[None]:
        try:
            yield
            self.meet()
        except Exception as error:
            if self._ended:
                raise
            common = self._common(error)
            if common is error:
                raise
            raise common from error
        except BaseException:  # an interruption: it may have come in the middle of a call that the others have left
            self._ended = True
            raise

    def leave(self) -> None:
        if distributed.is_initialized():
            distributed.destroy_process_group()

    def wait_for_first(self) -> None:
        if not self._agreed:  # the first one may be waiting in a call for this one
            return
        try:
            distributed.recv(torch.zeros(1), 0, group=self._talk)
        except RuntimeError:
            return

    def _common(self, error: Exception) -> Exception:
        """Return what all processes raise, when all have left what they were doing."""
        self._ended = True
        if isinstance(error, _LostError):
            return error.told
        own = None if isinstance(error, _ElsewhereError) else error
        if own is not None and not isinstance(own, _MENDABLE):
            traceback.print_exception(own, file=sys.stderr)  # here, where it can be found
        try:
            if own is not None:
                self._any(True)
            errors = self._gathered(own if own is None else _portable(own, self.rank))
        except _LostError as lost:
            return own or lost.told
        self._agreed = True
        rank, chosen = next((rank, found) for rank, found in enumerate(errors) if found is not None)
        return own if rank == self.rank and isinstance(own, _MENDABLE) else chosen

    def _any(self, failed: bool) -> bool:
        """Whether any process has failed."""
        flag = torch.tensor([failed], dtype=torch.int32)
        with _connected():
            distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._talk)
        return bool(flag)

    def _gathered(self, value: Any) -> list[Any]:
        values = [None] * self.count
        with _connected():
            distributed.all_gather_object(values, value, group=self._talk)
        return values

    def _in_place(self, tensors: Sequence[torch.Tensor], act: Callable[[torch.Tensor, Any], object]) -> None:
        """Do something to tensors that must lie in one piece, by the group that reaches where they lie."""
        wholes = [tensor.detach().contiguous() for tensor in tensors]  # now: after the meeting nothing may fail alone
        self.meet()
        for tensor, whole in zip(tensors, wholes, strict=True):
            with _connected():
                act(whole, self._talk if whole.device.type == "cpu" else None)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(whole)


class _LostError(Exception):
    """The connection to another process is gone; `told` is what to raise of it."""

    def __init__(self, told: Stopped):
        self.told = told


@contextmanager
def _connected() -> Iterator[None]:
    """Tell a lost connection from other errors of torch."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise _LostError(Stopped(f"another process of this run is gone ({reason})")) from error


def _portable(error: Exception, rank: int) -> Exception:
    """Return an error that every process can raise: what the user can mend as it is, others as a sentence."""
    if isinstance(error, QectomyError):
        return type(error)(*error.args)
    if isinstance(error, OSError):
        if error.errno is None:
            return OSError(str(error))
        return OSError(error.errno, error.strerror, *([] if error.filename is None else [str(error.filename)]))
    said = str(error).strip().splitlines()[0][:300] if str(error).strip() else ""
    return Stopped(f"process {rank} has failed, {type(error).__name__}: {said}")
