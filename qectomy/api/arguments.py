"""What the functions share: how they read their arguments, and what they refuse before anything is loaded."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qectomy.api.options import Name, Names, check_options
from qectomy.distributed.launch import launch
from qectomy.errors import UsageError
from qectomy.versions import check_transformers

if TYPE_CHECKING:
    from qectomy.runs.run_dir import GoOn


def begin(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """Refuse options that cannot be, before anything is loaded; return what a record says made it.

    That is the `command` that was given, or the call as it can be typed again.
    """
    check_transformers()
    check_options(function, given)
    return given.get("command") or call_of(function, given)


def call_of(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """Return the call of a function as it can be typed again, defaults left out."""
    told = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("command", "progress") or given[name] == parameter.default:
            continue
        value = _plain(given[name])
        told.append(repr(value) if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else f"{name}={value!r}")
    return f"qectomy.{function.__name__}({', '.join(told)})"


def _plain(value: Any) -> Any:
    """Return a value as its repr is Python that needs no import: paths as strings."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def names(given: Names | None) -> tuple[str, ...]:
    """Return one name, several or none as a tuple of strings."""
    if given is None:
        return ()
    return (os.fspath(given),) if isinstance(given, str | os.PathLike) else tuple(os.fspath(each) for each in given)


def name_or_none(given: Name | None) -> str | None:
    return None if given is None else os.fspath(given)


def path_or_none(given: Name | None) -> Path | None:
    return None if given is None else Path(given)


def check_out(out: Path, resume: bool, only: bool, clean: bool, kind: str = "converting") -> "GoOn":
    """Refuse an output that cannot be made before anything is loaded; return what a run takes as `resume`."""
    from qectomy.runs.run_dir import check_out as check

    wanted: GoOn = "only" if only else resume
    if wanted and clean:
        raise UsageError("--resume goes on with what --clean removes; give one or the other")
    check(out, wanted, kind)
    return wanted


def check_texts(given: Sequence[str | None], field: str | None, tokens: int) -> None:
    """Refuse a text that is mistyped, empty or too short for a window before anything is loaded."""
    from qectomy.text.documents import check_texts as check

    if launch().count == 1:  # of several processes the first one says it, once they have met
        check(given, field, tokens)
