"""Errors a user can mend. The message says what is wrong, why it matters and what to do."""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 2


def shown(value: Any) -> str:
    """Return a value from a file as a message can hold it: on one line, without control characters, cut if long."""
    return _SHORT.repr(value)


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
