"""Fold a norm's gain, shift and mean into the matrices around it. Each step is exact and can be used alone.

    gain    norm(x) γ W           = norm(x) (diag(γ) W)              into the readers; the gain becomes 1
    shift   (norm(x) γ + β) W + b = norm(x) γ W + (b + β W)          into the readers' biases; the shift becomes 0
    mean    LayerNorm(a W + b)    = LayerNorm((a W + b)(I - 11ᵀ/D))  out of the writers: LayerNorm takes it out anyway,
                                                                     and for states of mean 0 it is RMSNorm
Dimensions: D d_model; weights are (in, out), as in x W. All algebra in float64, cast once to the weight's type.
"""

import torch

from qectomy.errors import UnsupportedArchitecture
from qectomy.surgery.linear_views import Projection


def absorb_gain(gamma: torch.Tensor, reader: Projection) -> Projection:
    """Return W' with x W' = (γ x) W for every x; the bias stays."""
    W, bias = reader
    return (gamma.double()[:, None] * W.double()).to(W.dtype), bias


def absorb_shift(beta: torch.Tensor, reader: Projection) -> Projection:
    """Return b' with x W + b' = (x + β) W + b for every x. Raises UnsupportedArchitecture for want of a bias."""
    W, bias = reader
    if bias is None:
        raise UnsupportedArchitecture("a norm's shift cannot be folded into a projection that has no bias")
    return W, (bias.double() + beta.double() @ W.double()).to(bias.dtype)


def centre(writer: Projection) -> Projection:
    """Return the writer (in, D) whose output is that of `writer` less its mean over the channels."""
    W, bias = writer
    return centre_rows(W), None if bias is None else centre_rows(bias)


def centre_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows (..., D) less each one's mean: x (I - 11ᵀ/D)."""
    return (rows.double() - rows.double().mean(-1, keepdim=True)).to(rows.dtype)
