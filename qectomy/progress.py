"""How work that takes long says how far it is."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

Progress = Callable[[int, int, str], None]  # (steps done, of how many, what is being done)
SECONDS_A_LINE = 30  # of progress, where stderr is no terminal


def stage(progress: "bool | Progress", what: str) -> "AbstractContextManager[Progress | None]":
    """Yield what a stage of the work reports to: a bar of its own if `progress` is True, else what is given."""
    if progress is True:
        return progress_bar(what)
    return nullcontext(progress or None)


@contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """Yield report(done, total, note) that draws a bar with an ETA on stderr; a line now and then where that is a file.

    A terminal is what the system says is one: rich also takes a file for one if FORCE_COLOR is set, and fills it.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    console = Console(stderr=True, emoji=False)
    if not sys.stderr.isatty():
        yield _Lines(what, lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False))
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task(what, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield report


class _Lines:
    """Tells progress in whole lines: the start and the end of each stage, between them one in SECONDS_A_LINE."""

    def __init__(self, what: str, tell: Callable[[str], None]):
        self._what, self._tell = what, tell
        self._done, self._total, self._told = 0, -1, 0.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        starts, ends = total != self._total or done <= self._done, done == total
        self._done, self._total, now = done, total, time.monotonic()
        if starts or ends or now - self._told >= SECONDS_A_LINE:
            self._told = now
            self._tell(f"{self._what} {done}/{total} {note}".rstrip())
