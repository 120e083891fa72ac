"""Errors from deep inside a run that a user can mend, in words that say how."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError

from qectomy.calibrate.healing.run_folder import RunFolder
from qectomy.calibrate.healing.settings import HealSettings
from qectomy.errors import OutputError, QectomyError


@contextmanager
def explained(settings: HealSettings, folder: RunFolder) -> Iterator[None]:
    """Turn running out of memory or of disk, and Ctrl-C, into errors that say what to do."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise QectomyError(f"interrupted; {folder.path} holds the run, --resume goes on with it") from error
    except OutputError as error:  # of the result, whose own words are that nothing is left
        said = str(error).removesuffix(" Nothing was left behind.")
        raise OutputError(f"{said} {folder.path} holds what was trained; --resume goes on from there") from error
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise QectomyError(_memory(settings)) from error
    except (RuntimeError, SafetensorError, OSError) as error:
        text = str(error)
        # torch.save names no disk: its container finds that fewer bytes were written than it gave.
        unwritten = "No space left" in text or ("inline_container" in text and "unexpected pos" in text)
        if unwritten or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
            raise OutputError(
                f"the disk is full; {folder.path} holds the last whole checkpoint. Free some room, then --resume"
            ) from error
        if "can't allocate memory" in text or "not enough memory" in text:
            raise QectomyError(_memory(settings)) from error
        raise


def _memory(settings: HealSettings) -> str:
    return (
        f"out of memory. Run fewer windows at a time with --micro-batch (the step keeps its --batch-tokens), use a "
        f"--context below {settings.context}, --activation-checkpointing, or --train attention"
    )
