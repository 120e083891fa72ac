"""The same function in weights that quantise well: changes of scale and of basis that no output sees.

A quantiser gives some 32 inputs of one output a common step, so it loses most where a block's numbers are of unlike
size. Two maps leave such blocks: `identity` has its scales in the norm's gain, and their inverses in W_K and W_V;
`exact` leaves ones and zeros in each head's block at its pivots.

    channels   norm(x) γ W      = norm(x) (γ s) (W / s)      s > 0: one for each channel of x̂; a shift β becomes β s
    heads      (W_l A)(A⁻¹ W_r) = W_l W_r                    A: invertible, one for each head

Dimensions: D d_model, K d_head, n heads. All algebra in float64.
"""

import math

import torch

from qectomy.models.linear_views import Projection

Norm = dict[str, torch.Tensor]  # its gain, and its shift if it has one


def balance_channels(
    norm: Norm, readers: dict[str, Projection], of: tuple[str, ...]
) -> tuple[Norm, dict[str, Projection]]:
    """Return a norm and its readers, W (D, out), rescaled: each channel's rms over the readers named in `of` is one.

    If W's blocks run over D, their steps are max |W / s| and the error in an output is that times |s x̂|: the product is
    least where all |W / s| are alike, whatever x̂ is. The rms is that of the median channel, so that gains stay near
    what they were. A channel stays as it is where it has no weights, or where rescaled it leaves the range of its type.
    """
    scales = _channel_scales([readers[role][0] for role in of])
    weights, stored = [W for W, _ in readers.values()], readers[of[0]][0].dtype
    fits = [_in_range(vector.double() * scales, vector) for vector in norm.values()]
    fits += [(W.double() / scales[:, None]).to(stored).isfinite().all(1) for W in weights]
    scales = torch.where(torch.stack(fits).all(0), scales, 1.0)
    scaled = {role: (W.double() / scales[:, None], bias) for role, (W, bias) in readers.items()}
    return {name: vector.double() * scales for name, vector in norm.items()}, scaled


def _channel_scales(weights: list[torch.Tensor]) -> torch.Tensor:
    """Return each channel's rms over weights (D, *), over the median channel's; 1 where it is 0 or overflows. (D,)"""
    rms = torch.cat([W.double() for W in weights], 1).square().mean(1).sqrt()
    usable = rms.isfinite() & (rms > 0)
    if not usable.any():
        return torch.ones_like(rms)
    return torch.where(usable, rms / rms[usable].median(), 1.0)


def _in_range(value: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Whether float64 values are finite and no coarser than others in the type of what is stored; 0 stays 0."""
    info = torch.finfo(stored.dtype)
    return (value.abs() <= info.max) & ((value.abs() >= info.tiny) | (stored == 0))


def balance_heads(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left A (n, D, K) and A⁻¹ right (n, K, M) of the same product, each with half of it, and no outliers.

    With left right = U S Vᵀ they are U √S R and Rᵀ √S Vᵀ: balanced, as training with weight decay leaves a pair. R, the
    orthogonal discrete cosine transform, spreads the singular values over all K coordinates, along which blocks of
    `right` run. QR first: what is decomposed is K x K, and nothing is inverted, so heads may lack rank.
    """
    Q_l, R_l = torch.linalg.qr(left.double())
    Q_r, R_r = torch.linalg.qr(right.double().mT)
    U, S, Vh = torch.linalg.svd(R_l @ R_r.mT)
    root, R = S.sqrt(), cosine_basis(left.shape[2])
    return Q_l @ (U * root[:, None]) @ R, R.T @ (root[..., None] * Vh) @ Q_r.mT


def cosine_basis(size: int) -> torch.Tensor:
    """Return the orthogonal DCT-II, (size, size) in float64: row i is cos(π (2j + 1) i / (2 size)), of norm 1."""
    place = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi * place[:, None] * (2 * place + 1) / (2 * size))
    return rows / rows.norm(dim=1, keepdim=True)
