"""What the commands share: options, notes on stderr, results on stdout."""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.api.options import Argument, Name, Names, Numbers, Option, options_of
from qectomy.distributed.launch import launch
from qectomy.errors import UsageError

NAMES = {Name: str, Name | None: str | None, Names: list[str], Names | None: list[str] | None}  # as typer knows them
PATHS = {Name: Path, Name | None: Path | None, Names: list[Path], Names | None: list[Path] | None}
NUMBERS = {Numbers | None: list[int] | None}
UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def takes_options_of(function: Callable[..., Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a function, by whose names it is called, and `--json`, which it gets as `as_json`.

    Their types, defaults and help are those of the function's signature.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters = [_parameter(name, *told) for name, told in options_of(function).items()]
        as_json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
        parameters.append(Parameter("as_json", Parameter.KEYWORD_ONLY, default=False, annotation=as_json))
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(name: str, kind: Any, option: Option, default: Any) -> Parameter:
    """Return an option as typer reads it."""
    told: dict[str, Any] = {"help": option.help, "min": option.min, "max": option.max, "metavar": option.metavar}
    if option.counts:
        told = {"help": option.help, "parser": count, "metavar": "COUNT"}
    place = isinstance(option, Argument)
    info = typer.Argument(**told) if place else typer.Option(f"--{name.replace('_', '-')}", **told)
    kind = ((PATHS if option.path else NAMES) | NUMBERS).get(kind, kind)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def count(text: str | int) -> int:
    """Read a number of tokens: 65536, 500k, 10M, 1.5B; typer gives a default as the number it is."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", str(text).strip().lower().replace(",", "").replace("_", ""))
    number = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if number < 1:
        raise typer.BadParameter(f"{text!r} is not a number of tokens; write 65536, 500k, 10M or 1B")
    return number


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


def show_verdict(out: Path) -> None:
    """Print what a checkpoint is fit for, and the rule that says so, as its page and its card do."""
    from qectomy.report.page.reading import read_folder
    from qectomy.report.page.verdict import judged

    found = judged(read_folder(out))
    typer.echo(f"verdict: {found.word}: {found.rule}")


def print_json(result: Any) -> None:
    """Print a record, or plain values and records in them."""
    typer.echo(json.dumps(result, indent=2, default=lambda record: record.as_dict()))
