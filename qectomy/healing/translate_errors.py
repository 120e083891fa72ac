"""Errors from deep inside a run that a user can mend, in words that say how."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from qectomy.errors import OutputError, QectomyError, Stopped, resumable
from qectomy.healing.settings import HealSettings
from qectomy.runs.output import cause
from qectomy.runs.run_dir import RunDir

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)


@contextmanager
def explained(settings: HealSettings, folder: RunDir) -> Iterator[None]:
    """Turn lack of memory, a full or failing disk, what stops a run, and Ctrl-C, into errors that say what to do."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise resumable(Stopped(f"interrupted; {folder.path} holds the run, --resume goes on with it")) from error
    except Stopped as error:
        if not folder.path.exists():
            raise
        said = f"{str(error).rstrip('.')}. {folder.path} holds the run: go on with --resume"
        raise resumable(Stopped(said)) from error
    except OutputError as error:  # of the result
        said = f"{error}. {folder.path} holds what was trained; --resume goes on from there"
        raise resumable(OutputError(said)) from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise QectomyError(_memory(settings)) from error
    except (RuntimeError, SafetensorError, OSError) as error:
        text = str(error)
        # torch.save names no disk: its container finds that fewer bytes were written than it gave.
        unwritten = "No space left" in text or ("inline_container" in text and "unexpected pos" in text)
        failing = isinstance(error, OSError) and error.errno in DISK
        if unwritten or failing:
            what = cause(error) if isinstance(error, OSError) else "the disk is full"
            then = "Free some room" if what == "the disk is full" else "Mend the disk"
            said = f"{what}; {folder.path} holds the last whole checkpoint. {then}, then --resume"
            raise resumable(OutputError(said)) from error
        if "can't allocate memory" in text or "not enough memory" in text:
            raise QectomyError(_memory(settings)) from error
        raise


def _memory(settings: HealSettings) -> str:
    return (
        f"out of memory. Run fewer windows at a time with --micro-batch (the step keeps its --batch-tokens), use a "
        f"--context below {settings.context}, --activation-checkpointing, or --train attention"
    )
