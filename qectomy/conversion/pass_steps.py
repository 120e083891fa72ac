"""What the journal of a conversion says of a step, held against what `LayerPass` notes of one."""

import math
import re
from typing import Any

import torch


def is_whole(number: int, entry: dict[str, Any]) -> bool:
    """Whether an entry has all that a conversion goes on from, each in its type; step 0 is what no layer holds."""
    record, generator = entry.get("record"), entry.get("generator")
    return (
        (record is None if number == 0 else _is_record(record))
        and isinstance(generator, str)
        and re.fullmatch(f"[0-9a-f]{{{2 * torch.Generator().get_state().numel()}}}", generator) is not None
        and isinstance(entry.get("drifted"), bool)
        and _is_numbers(entry.get("seconds"))
        and _is_number(entry.get("total_seconds"))
        and _is_number(entry.get("teacher_seconds"))
    )


def _is_record(record: Any) -> bool:
    """Whether this is what is known of a layer that was fitted."""
    if not isinstance(record, dict) or not isinstance(record.get("map"), str):
        return False
    kl, moved = record.get("attention_kl"), record.get("moved", {})  # which older versions did not note
    return (
        _is_number(record.get("index"))
        and isinstance(kl, dict)
        and _is_numbers(kl)
        and {"fitted", "heldout"} <= set(kl)
        and isinstance(moved, dict)
        and all(value is None or _is_number(value) for value in moved.values())
    )


def _is_numbers(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_number, value.values()))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
