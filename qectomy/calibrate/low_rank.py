"""`low-rank:R`: a diagonal by least squares, the rest by singular values, and the bias that goes with both.

Weights are (D, out), as in x̂ W. Dimensions: D d_model, H n_heads, K d_head, R rank.
"""

import torch

from qectomy.calibrate.select import channel_rms, correlations


def low_rank(C: torch.Tensor, W_Q: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    """Return gain (H*K,), down (R, D), up (H*K, R): diagonal by least squares, the rest by SVD of C^½ (W_Q - diag)."""
    d_model, n_query = W_Q.shape
    columns = torch.arange(n_query, device=C.device)
    channels = columns % d_model
    gain = correlations(C, W_Q)[channels, columns] / channel_rms(C)[channels]
    rest = W_Q.clone()
    rest[channels, columns] -= gain
    values, vectors = torch.linalg.eigh(C)
    root = values.clamp_min(1e-4 * values.mean()).sqrt()
    U, S, V = torch.linalg.svd(root[:, None] * (vectors.T @ rest), full_matrices=False)
    scale = S[:rank].sqrt()
    down = (vectors / root) @ U[:, :rank] * scale
    return {"gain": gain, "down": down.T.contiguous(), "up": (V[:rank] * scale[:, None]).T.contiguous()}


def low_rank_bias(wanted: torch.Tensor, mean: torch.Tensor, query: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the bias (H*K,) with which queries of x̂'s mean (D,) are `wanted` (H*K,)."""
    channels = torch.arange(len(wanted), device=mean.device) % len(mean)
    return wanted - mean[channels] * query["gain"] - query["up"] @ (query["down"] @ mean)
