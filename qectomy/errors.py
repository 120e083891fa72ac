"""Errors a user can mend. The message says what is wrong, why it matters and what to do."""

import difflib
import os
import reprlib
import sys
from typing import Any, TypeVar

CONTROLS = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)}  # as pictures: ␀, ␇, ␍
CONTROLS |= dict.fromkeys((*range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")
# What turns the order of the text around it: a command must read as it would be pasted.
CONTROLS |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")

CLOSE = 0.8  # of names, from 0 to 1: one letter of five

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Return a value from a file as a message can hold it: on one line, without control characters, cut if long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # of an int with more digits than Python writes out
        return f"a {type(value).__name__} too long to write out"


def clean(text: str) -> str:
    """Return text that UTF-8 and HTML can hold, and in which nothing is invisible or turns the reading order."""
    return text.translate(CONTROLS)


def reason_of(error: BaseException, most: int = 200) -> str:
    """Return on one line, cut, why an error came; its kind where it says nothing.

    That is its first line, or, where that only announces what follows, as "validate_architecture:" does, all of them.
    """
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if not lines[0].endswith(":"):
        return lines[0][:most]
    whole = " ".join(lines)
    if len(whole) <= most:
        return whole
    last = lines[-1][:most]  # of several lines, the last one tends to say what to do
    return f"{whole[: max(0, most - len(last) - 5)].rstrip()} ... {last}"


STOPPED_SAFELY = 75  # exit code: EX_TEMPFAIL of sysexits.h, which asks to try again later
AnyError = TypeVar("AnyError", bound="QectomyError")


def nearest(name: str, holding: str | None = None) -> str | None:
    """Return the path of what lies where `name` leads to nothing and is called nearly so; None where nothing is.

    `holding`: only of folders that hold a file of this name.
    """
    if ":" in name:
        return None
    where, own = os.path.split(name.rstrip("/"))
    try:
        there = [
            entry.name for entry in os.scandir(where or ".") if not holding or os.path.isfile(f"{entry.path}/{holding}")
        ]
    except (OSError, ValueError):
        return None
    if holding:
        there = [other for other in there if os.path.isfile(os.path.join(where, other, holding))]
    found = difflib.get_close_matches(own, there, 1, CLOSE)
    return os.path.join(where, found[0]) if found else None


_NOTED: set[str] = set()


def note(text: str) -> None:
    """Tell on stderr what a user should know though it stops nothing, once a run however often it is found.

    Of several processes that a launcher started, the first one alone tells.
    """
    if text not in _NOTED and os.environ.get("RANK", "0") == "0":
        print(f"note: {clean(text)}", file=sys.stderr, flush=True)
    _NOTED.add(text)


class QectomyError(Exception):
    """Base of everything the command line prints without a traceback; exit code 1, or STOPPED_SAFELY if `resumable`."""

    resumable = False  # whether what was done is on the disk, and what ended the run can pass
    go_on = ""  # the command that goes on, where it is not the same one with --resume


def resumable(error: AnyError, go_on: str = "") -> AnyError:
    """Return an error, marked as the end of a run that can be gone on with."""
    error.resumable, error.go_on = True, go_on
    return error


class UsageError(QectomyError):
    """Options that contradict each other or that no run can use; exit code 2 on the command line."""

    def __init__(self, message: str, option: str = ""):
        super().__init__(message, option)
        self.message, self.option = message, option

    def __str__(self) -> str:
        return f"{self.option}: {self.message}" if self.option else self.message


class CheckpointError(QectomyError):
    """A checkpoint folder is missing something, damaged, or holds values no model can use."""


class UnsupportedArchitecture(QectomyError):
    """The model's attention is not one whose W_Q this tool can take out."""


class QueryMapError(QectomyError):
    """A query-map specification that cannot be read or does not fit the model."""


class TextError(QectomyError):
    """Calibration or evaluation text that cannot be used."""


class NonFiniteError(QectomyError):
    """NaN or Inf in weights, hidden states or logits."""


class OutputError(QectomyError):
    """The output folder exists, cannot be written, or the disk is full."""


class ReportError(QectomyError):
    """A record that cannot be read, or a page that cannot be made of it or written."""


class Stopped(QectomyError):
    """A run that ended before its end, for a reason that can pass; it can be resumed."""


class Untrusted(Stopped):
    """A run whose steps contradict what it has to make: it can be made anew, not gone on with."""


class UnreadableError(CheckpointError, Stopped):
    """A file of a checkpoint that was sound when it was opened cannot be read now."""
