"""Several processes of one run on this machine's processor, forked: a launcher would import torch anew in each."""

import os
import pickle
import signal
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from conversions import convert_tiny

from qectomy.distributed.process_group import ProcessGroup, join

KILLED = "killed"


def launched(count: int, act: Callable[[ProcessGroup], Any], joined: bool = True, timeout: float = 60.0) -> list[Any]:
    """Return what `act` returned in each of `count` processes, the exception that it raised, or KILLED.

    ProcessGroup that have not ended after `timeout` seconds are killed. Unless `joined`, `act` has to find the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_forked(rank, count, port, act, joined) for rank in range(count)]
    until = time.monotonic() + timeout
    return [_ended(child, pipe, until) for child, pipe in children]


def _forked(rank: int, count: int, port: int, act: Callable[[ProcessGroup], Any], joined: bool) -> tuple[int, int]:
    """Start one process; return its id and the pipe through which it tells what came of it."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, none of which holds a lock here
        child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()})
        AcceleratorState._reset_state(reset_partial_state=True)
        os.write(write, pickle.dumps(_outcome(act, joined)))
    finally:
        os._exit(0)


def _outcome(act: Callable[[ProcessGroup], Any], joined: bool) -> Any:
    try:
        return act(join("cpu") if joined else ProcessGroup("cpu"))
    except BaseException as error:
        return error.with_traceback(None)


def _ended(child: int, pipe: int, until: float) -> Any:
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    _, status = os.waitpid(child, 0)
    with os.fdopen(pipe, "rb") as told:
        said = told.read()
    return KILLED if os.WIFSIGNALED(status) else pickle.loads(said)


def several(
    source: Path,
    out: Path,
    query: str,
    text: Path,
    count: int = 2,
    before: Callable[[ProcessGroup], object] = lambda processes: None,
    **options: Any,
) -> list[Any]:
    """Convert in several processes; return what came of each. `before` is called in each of them first."""

    def act(processes: ProcessGroup) -> Any:
        before(processes)
        return convert_tiny(source, out, query, text, processes=processes, **options)

    return launched(count, act)
