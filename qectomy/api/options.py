"""What an option is: its help text and its bounds, beside the name, type and default in a function's signature.

The command line makes its options of the signatures of the functions that it calls (`commands/terminal.py`), and the
functions refuse by them what the command line would not have let through.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from qectomy.errors import UsageError, shown

Name = str | os.PathLike[str]  # of a file or folder; where said, also of a model or dataset on the hub
Names = Name | Iterable[Name]
Numbers = int | Iterable[int]


@dataclass(frozen=True, repr=False)
class Option:
    """An option of the command line, which is a keyword of the function."""

    help: str
    min: float | None = None
    max: float | None = None
    metavar: str | None = None
    path: bool = False  # of a file or folder on this machine, never a name on the hub
    counts: bool = False  # tokens, which may be typed as 500k or 10M

    def __repr__(self) -> str:  # in a signature, as `help` of Python shows it
        return repr(self.help)

    def check(self, name: str, value: Any, kind: Any) -> None:
        """Raise UsageError for a number that is of another type than `kind`, or out of bounds."""
        whole = kind in (int, int | None, Numbers | None)
        if not whole and kind not in (float, float | None):
            return
        for number in value if isinstance(value, list | tuple) else [value]:
            fits = isinstance(number, int if whole else int | float) and not isinstance(number, bool)
            fits = fits and math.isfinite(number)
            if fits and (self.min is None or number >= self.min) and (self.max is None or number <= self.max):
                continue
            least = "" if self.min is None else f" from {self.min}"
            most = " on" if least and self.max is None else "" if self.max is None else f" to {self.max}"
            endless = isinstance(number, float) and not math.isfinite(number)
            what = "whole number" if whole else "finite number" if endless else "number"
            raise UsageError(f"{shown(number)} is no {what}{least}{most}", f"--{name.replace('_', '-')}")


class Argument(Option):
    """What stands on the command line in its place, without a name."""


def options_of(function: Callable[..., Any]) -> dict[str, tuple[Any, Option, Any]]:
    """Return (type, option, default) of each parameter that is one of the command line's, too."""
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *notes = get_args(parameter.annotation) or (None,)
        for option in notes:
            if isinstance(option, Option):
                found[name] = kind, option, parameter.default
    return found


def check_options(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Raise UsageError where one of the arguments of a function is no number that it can be."""
    for name, (kind, option, default) in options_of(function).items():
        if not (given[name] is None and default is None):
            option.check(name, given[name], kind)


# What several commands have in common

Out = Annotated[Name, Option("Folder to write; it must not exist.", path=True)]
Context = Annotated[
    int | None, Option("Tokens a window. Default: 512, or what the model was made for if that is less.", min=16)
]
Field = Annotated[
    str | None, Option("Of texts that are records: the field to read. Default: text, or the only one.", metavar="NAME")
]
Device = Annotated[str, Option("Where to compute: cpu, cuda, cuda:1.")]
NoProbe = Annotated[bool, Option("Foretell memory and disk alone: fit nothing to tell the time.")]
Resume = Annotated[bool, Option("Go on with the run that was stopped, in OUT.converting.")]
ResumeOnly = Annotated[bool, Option("The same, but refuse where there is nothing to go on from.")]
Clean = Annotated[bool, Option("First remove what a run before left in OUT.converting.")]
