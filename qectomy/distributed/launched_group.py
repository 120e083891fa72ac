"""One of the processes that torchrun or `accelerate launch` started; `process_group.py` says how they get on."""

import atexit
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed.nn  # before there is a group: its functions' defaults keep the one that is there, and open
from accelerate import PartialState
from torch import distributed

from qectomy.distributed.launch import launch
from qectomy.distributed.process_group import ProcessGroup
from qectomy.errors import QectomyError, Stopped, reason_of

T = TypeVar("T")
PATIENCE = timedelta(days=1)  # of the processes that wait while the main one packs or writes text
FAILED, ENDED = "a process has failed with", "the main process has ended"  # keys of the store
HEARD = "the failure is known to process "  # likewise, before its rank
HEARING = 2.0  # seconds that the main process waits for all others to hear of its failure


class LaunchedGroup(ProcessGroup):
    """This process and its connections. Raises QectomyError where several processes cannot have the device.

    Tensors are exchanged where they lie, by nccl or gloo; objects by gloo, which notices that a process is gone.
    """

    def __init__(self, device: str):
        self.world_size, self.rank = launch().count, launch().rank
        on_cpu = _on_cpu(device)
        if on_cpu:  # without it Trainer's processes take no notice of each other: each would heal alone
            os.environ["ACCELERATE_USE_CPU"] = "true"
        self._store, *_ = next(distributed.rendezvous("env://", self.rank, self.world_size))
        told = {"store": self._store, "rank": self.rank, "world_size": self.world_size, "timeout": PATIENCE}
        state = PartialState(cpu=on_cpu, backend=None if on_cpu else "cpu:gloo,cuda:nccl", **told)
        super().__init__(str(state.device))
        atexit.register(self._end)

    def all_reduce_(self, *tensors: torch.Tensor) -> None:
        self._in_place(tensors, distributed.all_reduce)

    def broadcast_(self, *tensors: torch.Tensor) -> None:
        self._in_place(tensors, lambda tensor: distributed.broadcast(tensor, 0))

    def on_main(self, act: Callable[[], T]) -> T:
        found = [act() if self.is_main else None]
        with self._connected():
            distributed.broadcast_object_list(found, 0)
        return found[0]  # type: ignore[return-value]

    def all_gather(self, value: T) -> list[T]:
        values = [value] * self.world_size
        with self._connected():
            distributed.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        self.all_gather(None)

    @contextmanager
    def collective(self) -> Iterator[None]:
        try:
            yield
            self.barrier()
        except (QectomyError, OSError) as error:  # what the user can mend is raised as it was
            self._part(error)
            raise
        except Exception as error:
            traceback.print_exception(error)  # here, where it can be found
            told = Stopped(f"process {self.rank} has failed, {type(error).__name__}: {reason_of(error)}")
            self._part(told)
            raise told from error
        except BaseException:  # an interruption, of which the others hear when the connections close
            self._part(None)
            raise

    def _in_place(self, tensors: Sequence[torch.Tensor], act: Callable[[torch.Tensor], object]) -> None:
        """Do something to tensors, which has to be done to such as lie in one piece."""
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            if whole.is_cuda:
                self.barrier()  # nccl would wait for a process that is gone
            with self._connected():
                act(whole)
            if whole.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(whole)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Where a connection is lost, raise what another process has said of its failure, or Stopped."""
        try:
            yield
        except RuntimeError as lost:
            raise self._heard() or Stopped(f"another process of this run is gone ({reason_of(lost)})") from lost

    def _heard(self) -> Exception | None:
        with suppress(RuntimeError):  # of a store that is gone with the process that had it
            if self._store.check([FAILED]):
                found: Exception = pickle.loads(bytes.fromhex(self._store.get(FAILED).decode()))
                self._store.set(f"{HEARD}{self.rank}", "")
                return found
        return None

    def _part(self, error: Exception | None) -> None:
        """Close the connections, once, and leave an error for the others to raise; then let the main process end first.

        A launcher ends all as soon as one has failed, and the main one may still remove files, and speaks for all.
        """
        if not distributed.is_initialized():
            return
        if error:
            with suppress(RuntimeError):
                self._store.set(FAILED, pickle.dumps(_portable(error)).hex())
        distributed.destroy_process_group()
        if error and not self.is_main:
            with suppress(RuntimeError):
                self._store.set(f"{HEARD}{self.rank}", "")
                while not self._store.check([ENDED]):
                    time.sleep(0.1)
        elif error:  # without a launcher the store goes with this process
            until, others = time.monotonic() + HEARING, [f"{HEARD}{rank}" for rank in range(1, self.world_size)]
            with suppress(RuntimeError):
                while time.monotonic() < until and not self._store.check(others):
                    time.sleep(0.01)

    def _end(self) -> None:
        """Release the processes that wait for this one's end."""
        if self.is_main:
            with suppress(RuntimeError):
                self._store.set(ENDED, "")
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _portable(error: Exception) -> Exception:
    """Return an error that can be pickled; those of the system may hold what cannot, as what a server has answered."""
    if not isinstance(error, OSError):
        return error
    if error.errno is None:
        return OSError(str(error))
    return OSError(error.errno, error.strerror, *([] if error.filename is None else [str(error.filename)]))


def _on_cpu(name: str) -> bool:
    """Whether a device is the processor. Raises QectomyError where each process cannot have one of its own."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise QectomyError(f"--device {name}: not usable here ({reason_of(error, 120)})") from error
    if device.type == "cpu":
        return True
    if device.index:
        raise QectomyError(f"--device {name}: several processes take a GPU each; give --device cuda")
    if device.type != "cuda" or not torch.cuda.is_available():
        raise QectomyError(
            f"--device {name}: not usable here by several processes; give --device cpu, or cuda with GPUs"
        )
    if not os.environ.get("LOCAL_RANK"):
        raise QectomyError(f"--device {name}: LOCAL_RANK, which says whose GPU is whose, is not set; start by torchrun")
    return False
