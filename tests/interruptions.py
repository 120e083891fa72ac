"""What kills a conversion: SIGKILL at a moment of its own, and a power cut that takes what was not synced with it."""

import json
import os
import random
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversions import hashes

MEASURED = ("created", "command", "seconds", "forward_pass_seconds", "peak_memory_bytes")  # which no two runs share


def same_output(one: Path, other: Path) -> None:
    """Assert that two conversions wrote the same bytes, and reports that differ in times and memory alone."""
    ours, theirs = hashes(one), hashes(other)
    assert ours.keys() == theirs.keys()
    assert {name for name in ours if ours[name] != theirs[name]} <= {"qectomy.json", "README.md"}
    if "qectomy.json" in ours:
        reports = [json.loads((folder / "qectomy.json").read_text()) for folder in (one, other)]
        assert _without_measured(reports[0]) == _without_measured(reports[1])


def _without_measured(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_measured(item) for key, item in value.items() if key not in MEASURED}
    return [_without_measured(item) for item in value] if isinstance(value, list) else value


def in_a_child(act: Callable[[], object], kill_after: float | None = None) -> str:
    """Run `act` in a forked process; return how that ended: done, killed, or the error that it raised.

    After `kill_after` seconds it is sent SIGKILL.
    """
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, none of which holds a lock here
        child = os.fork()
    if not child:
        try:
            act()
            os.write(write, b"done")
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode()[:4000])
        finally:
            os._exit(0)
    os.close(write)
    if kill_after is not None:
        _kill_later(child, kill_after)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read().decode()
    return "killed" if os.WIFSIGNALED(status) else said


def _kill_later(child: int, seconds: float) -> None:
    """Send SIGKILL after a while, unless the process has ended by then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


class PowerCut:
    """Cuts the power at a chosen one of a process's calls that change the disk.

    What was written by pwrite and not synced since is lost: it reads as zeros, or, for each write by chance, stays.
    """

    CALLS = ("pwrite", "fsync", "rename", "replace", "unlink", "mkdir", "rmdir")

    def __init__(self, at_call: int, chance: random.Random):
        self.left, self.chance = at_call, chance
        self.unsynced: dict[int, list[tuple[int, int]]] = {}  # by file descriptor: offset and length

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in self.CALLS:
            patch.setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def act(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                self._cut()
            result = call(*arguments, **named)
            if name == "pwrite":
                self.unsynced.setdefault(arguments[0], []).append((arguments[2], result))
            elif name == "fsync":
                self.unsynced.pop(arguments[0], None)
            return result

        self.pwrite = call if name == "pwrite" else self.pwrite
        return act

    pwrite: Callable[..., Any] = staticmethod(os.pwrite)

    def _cut(self) -> None:
        for descriptor, writes in self.unsynced.items():
            for offset, length in writes:
                if self.chance.random() < 0.5:
                    try:
                        self.pwrite(descriptor, bytes(length), offset)
                    except OSError:  # closed since
                        break
        os.kill(os.getpid(), signal.SIGKILL)
