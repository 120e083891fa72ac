"""What the commands share: options, notes on stderr, results on stdout."""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.distributed.launch import launch
from qectomy.errors import UsageError

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


@contextmanager
def usage_errors() -> Iterator[None]:
    """Turn options that contradict each other into typer's error; of several processes the first one alone speaks."""
    try:
        yield
    except UsageError as error:
        if launch().rank:
            raise typer.Exit(2) from error
        raise typer.BadParameter(error.message, param_hint=error.option or None) from error


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
