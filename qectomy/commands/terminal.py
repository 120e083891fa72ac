"""Progress on stderr, results on stdout."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.distributed.launch import launch

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that was stopped, in OUT.converting.")]
ResumeOnly = Annotated[
    bool, typer.Option("--resume-only", help="The same, but refuse where there is nothing to go on from.")
]
Clean = Annotated[bool, typer.Option("--clean", help="First remove what a run before left in OUT.converting.")]
Field = Annotated[
    str | None,
    typer.Option(
        "--field", metavar="NAME", help="Of texts that are records: the field to read. Default: text, or the only one."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
SECONDS_A_LINE = 30  # of progress, where stderr is no terminal


def go_on(resume: bool, only: bool) -> Any:
    """Return what the functions take as `resume`."""
    return "only" if only else resume


def check_out(out: Path, resume: Any, clean: bool) -> None:
    """Refuse an output that exists before anything is loaded; one that is resumed may be in its place already."""
    from qectomy.runs.work_folder import WorkFolder, check_free

    if resume and clean:
        raise typer.BadParameter("--resume goes on with what --clean removes; give one or the other")
    if not resume:
        check_free(out)
    elif resume == "only" and not out.exists():
        WorkFolder(out).check_there()


def check_texts(names: Sequence[str | None], field: str | None, tokens: int) -> None:
    """Refuse a text that is mistyped, empty or too short for a window before anything is loaded."""
    from qectomy.text.documents import check_texts as check

    if launch().count == 1:  # of several processes the first one says it, once they have met
        check(names, field, tokens)


def one_process() -> None:
    """End all but the first of several processes that a launcher started: there is nothing to share."""
    found = launch()
    if found.rank:
        typer.echo(
            f"note: process {found.rank} of {found.count} has nothing to do: process 0 does this alone", err=True
        )
        raise typer.Exit


def note_old_code(names: Sequence[str | Path]) -> None:
    """Say of each reduced folder whose model code is not this version's how to renew it; hub ids are not looked at."""
    from qectomy.errors import clean
    from qectomy.surgery.renew import has_old_code

    for name in names:
        if Path(name).is_dir() and has_old_code(Path(name)):
            command = clean(shlex.join(["qectomy", "renew", str(name)]))
            said = "its model code is missing or not this version's, which is what runs here"
            typer.echo(f"note: {clean(str(name))}: {said}; to put that there: {command}", err=True)


@contextmanager
def progress_bar(what: str) -> Iterator[Any]:
    """Yield report(done, total, note) that draws a bar with an ETA on stderr; a line now and then where that is a file.

    A terminal is what the system says is one: rich also takes a file for one if FORCE_COLOR is set, and fills it.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

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
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None, note="")
        yield lambda done, total, note="": bar.update(task, completed=done, total=total, note=note)


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


def command_line() -> str:
    """Return the command that runs, as it can be typed again."""
    return shlex.join(["qectomy", *sys.argv[1:]])


def resumed() -> bool:
    """Whether the command that runs was told to go on with an earlier one."""
    return not {"--resume", "--resume-only"}.isdisjoint(sys.argv[2:])


def command_to_go_on() -> str:
    """Return the command that goes on with what this one has left; "" where a launcher started it, which knows more."""
    if launch().count > 1:
        return ""
    given = [word for word in sys.argv[2:] if word != "--clean"]
    return shlex.join(["qectomy", sys.argv[1], *([] if resumed() else ["--resume"]), *given])


def print_json(result: Any) -> None:
    typer.echo(json.dumps(result, indent=2))
