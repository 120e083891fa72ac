"""Fields of config.json whose values transformers takes in silence, and fails on later."""

from typing import Any

from qectomy.errors import shown


def check_activation(field: str, name: Any) -> None:
    """Raise ValueError if transformers does not know an activation."""
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"{field} {shown(name)} is not an activation that transformers knows")


def check_epsilon(field: str, value: Any) -> None:
    """Raise ValueError unless this can be added to a variance."""
    if not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{field} must be a number of 0 or more, got {shown(value)}")


def check_share(field: str, value: Any) -> None:
    """Raise ValueError unless this can be the share of what a dropout drops."""
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{field} must be a number from 0 to 1, got {shown(value)}")


def check_window(size: Any) -> None:
    """Raise ValueError unless this can be a sliding window's length, or says that there is none."""
    if size is not None and not 0 < size < 2**31:
        raise ValueError(f"sliding_window must be a positive whole number or null, got {shown(size)}")
