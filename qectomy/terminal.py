"""Progress on stderr, results on stdout."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.launch import launch

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that was stopped, in OUT.converting.")]
Clean = Annotated[bool, typer.Option("--clean", help="First remove what a run before left in OUT.converting.")]
Field = Annotated[
    str | None,
    typer.Option(
        "--field", metavar="NAME", help="Of texts that are records: the field to read. Default: text, or the only one."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]


def check_out(out: Path, resume: bool, clean: bool) -> None:
    """Refuse an output that exists before anything is loaded; one that is resumed may be in its place already."""
    from qectomy.surgery.work_folder import check_free

    if resume and clean:
        raise typer.BadParameter("--resume goes on with what --clean removes; give one or the other")
    if not resume:
        check_free(out)


def check_texts(names: Sequence[str | None], field: str | None, tokens: int) -> None:
    """Refuse a text that is mistyped, empty or too short for a window before anything is loaded."""
    from qectomy.calibrate.documents import check_texts as check

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
    """Yield report(done, total, note) that draws a bar with an ETA on stderr; plain lines where that is no terminal."""
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
    if not console.is_terminal:
        yield lambda done, total, note="": console.print(
            f"{what} {done}/{total} {note}", highlight=False, soft_wrap=True, markup=False
        )
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


def command_line() -> str:
    """Return the command that runs, as it can be typed again."""
    return shlex.join(["qectomy", *sys.argv[1:]])


def print_json(result: Any) -> None:
    typer.echo(json.dumps(result, indent=2))
