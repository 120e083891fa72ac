"""Without RoPE keys can take in any invertible change of a head's queries; what the maps' starts make of that.

A head's logits are (x̂ W_Q + b) W_Kᵀ x̂_kᵀ. With queries made of chosen channels, x̂_S + b', and a new key K' = W_K Mᵀ,
they are (x̂_S + b') M W_Kᵀ x̂_kᵀ: M and b' M are an ordinary affine regression from the channels to the teacher's query,
so no gain is stored, and no channel need match a query channel alone. Errors are weighed by L, where
L Lᵀ = W_Kᵀ C_k W_K and C_k is the covariance of x̂ under the teacher's attention.
Weights are (D, out). Dimensions: D d_model, H n_heads, K d_head.
"""

import torch

from qectomy.calibrate.channels import channel_rms
from qectomy.calibrate.moments import ridge
from qectomy.calibrate.problem import LayerProblem

RIDGE = 1e-4
DAMPING = 1e-2  # of the bias: a channel that the keys hardly see is not moved far


def roots(grams: torch.Tensor) -> torch.Tensor:
    """Return L (H, K, K) with L Lᵀ = W_Kᵀ C_k W_K, each head's `grams`; a head of zeros has a tiny one."""
    values, vectors = torch.linalg.eigh(grams.double())
    least = (1e-6 * values.amax(-1, keepdim=True)).clamp_min(1e-30)
    return vectors * values.clamp_min(least).sqrt()[:, None]


def per_head(W: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Return (H, D, K) of W (D, H*K), or (H, K) of a bias (H*K,)."""
    return W.unflatten(-1, (n_heads, -1)).movedim(-2, 0)


def regress_on_channels(
    problem: LayerProblem, channels: torch.Tensor, roots: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (W_K' (D, D), b' (H, K)) for queries x̂[channels] + b'; channels is (H, K)."""
    C, keys, biases = problem.spread.student, [], []
    assert problem.mean_query is not None
    heads = (per_head(part, len(roots)) for part in (*problem.carried, problem.mean_query))
    for own, Q, K, mean, L in zip(channels, *heads, roots, strict=True):
        M = ridge(C[own][:, own], C[own] @ Q, RIDGE)
        keys.append(K @ M.T)
        seen, rms = M @ L, channel_rms(C)[own]  # (mean x̂_S + b') M L = wanted L, where it can be had
        gram = rms[:, None] * (seen @ seen.T) * rms
        residual = mean @ L - problem.moments.student_mean[own] @ seen
        biases.append(rms * ridge(gram, rms * (seen @ residual), DAMPING))
    return torch.cat(keys, 1), torch.stack(biases)
