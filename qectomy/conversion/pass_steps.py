"""What the journal of a conversion says of a step, as `LayerPass` notes it."""

from typing import Annotated, Any

import torch
from pydantic import Field, ValidationError

from qectomy.record.base import Amount, Flag, Record, Text
from qectomy.record.reduced import FittedLayer

STATE = f"[0-9a-f]{{{2 * torch.Generator().get_state().numel()}}}"


class PassStep(Record):
    """All that a conversion goes on from."""

    record: FittedLayer | None = None  # of the layer that the step wrote; None: what no layer holds, the first step
    generator: Annotated[str, Field(pattern=f"^{STATE}$")]
    drifted: Flag
    seconds: dict[Text, Amount]
    total_seconds: Amount
    teacher_seconds: Amount


def is_whole(number: int, entry: dict[str, Any]) -> bool:
    """Whether an entry of the journal is such a step, of its number."""
    try:
        step = PassStep.model_validate(entry)
    except ValidationError:
        return False
    return (step.record is None) == (number == 0)
