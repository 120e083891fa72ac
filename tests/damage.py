"""Damage done to a checkpoint folder, and the check that it is refused with the right message."""

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.headers import SINGLE
from qectomy.errors import CheckpointError, QectomyError


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE)


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused(folder: Path, message: str, error: type[QectomyError] = CheckpointError, **options: Any) -> None:
    with pytest.raises(error) as caught:
        open_checkpoint(folder, **options)
    assert re.search(message, str(caught.value)), str(caught.value)


def allow_interrupts() -> None:
    """For a child process: obey the signals that shells and nohup make background jobs ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
