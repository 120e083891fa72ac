"""Errors a user can mend. The message says what is wrong, why it matters and what to do."""

import reprlib
from typing import Any

CONTROLS = {code: chr(0x2400 + code) for code in range(32) if code not in (9, 10)}  # as pictures: ␀, ␇, ␍
CONTROLS |= dict.fromkeys((*range(0x7F, 0xA0), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")
# What turns the order of the text around it: a command must read as it would be pasted.
CONTROLS |= dict.fromkeys((*range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")

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
    """Return the first line of what an error says, cut; its kind where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0][:most] if said else type(error).__name__


class QectomyError(Exception):
    """Base of everything the command line prints without a traceback (exit code 1)."""


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


class Stopped(QectomyError):
    """A run that ended before its end, for a reason that can pass; it can be resumed."""


class Untrusted(Stopped):
    """A run whose steps contradict what it has to make: it can be made anew, not gone on with."""


class UnreadableError(CheckpointError, Stopped):
    """A file of a checkpoint that was sound when it was opened cannot be read now."""
