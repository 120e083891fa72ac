"""What a layer's fit begins from, the teacher's projections, and what it moves and gives back.

Weights are (D, out), as in x̂ W. Dimensions: D d_model, H n_heads, G n_kv_heads, K d_head.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Projections:
    """The teacher's query and key: W (D, out) and bias (out,) or None, float64."""

    W_Q: torch.Tensor
    b_Q: torch.Tensor | None
    W_K: torch.Tensor
    b_K: torch.Tensor | None


@dataclass(frozen=True)
class Start:
    """The new W_K (D, G*K), the query map's tensors by the names its module stores, and the key's bias if one stays.

    `identity` has a gain (D,) or a shift (D,) of the norm's output, which go into the norm.
    """

    W_K: torch.Tensor
    query: dict[str, torch.Tensor]
    b_K: torch.Tensor | None = None
    norm_gain: torch.Tensor | None = None
    norm_shift: torch.Tensor | None = None
