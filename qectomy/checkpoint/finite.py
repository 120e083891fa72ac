"""Whether a tensor holds NaN or Inf, found without making another one of its size."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def all_finite(tensor: "torch.Tensor") -> bool:
    """Return whether no entry is NaN or Inf: the least and the largest show it, and NaN is both."""
    return tensor.numel() == 0 or all(bool(end.isfinite()) for end in tensor.aminmax())
