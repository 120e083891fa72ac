"""RoPE (Su et al., arXiv 2104.09864) by pairs of channels: which rotate slowly, and the angle that a pair may add.

Rotating pair f of a head's query and of its key by the same angle changes no logit, with RoPE in between, so a
closed-form start is free to choose the angle. Weights here are (D, out), as in x̂ W. Pair f joins channels f and
f + K/2 of a head (the rotate-half layout). Dimensions: D d_model, n heads, K d_head, F = K/2 pairs.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rope:
    """cos and sin of RoPE at positions 0 .. T-1, (T, K) float64, and the number of query heads a KV head serves.

    A model without RoPE is one that rotates nothing: cos is 1, sin is 0, and every channel is slow.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    n_kv_heads: int
    per_group: int

    @property
    def d_head(self) -> int:
        return self.cos.shape[1]

    def slow_channels(self, reach: int = 256, limit: float = 0.3) -> torch.Tensor:
        """Return the channels of a head that rotate by less than `limit` radians within `reach` positions."""
        pairs = self.d_head // 2
        angle = torch.atan2(self.sin[1], self.cos[1])[:pairs].abs()
        slow = (angle * reach < limit).nonzero()[:, 0]
        return torch.cat([slow, slow + pairs])


def rotate_pairs(weight: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Return weight (D, n*K) with pair f of head h rotated by angle[h, f]; angle is (n, F)."""
    heads = weight.view(weight.shape[0], *angle.shape[:1], 2, -1)  # (D, n, 2, F)
    first, second = heads[:, :, 0], heads[:, :, 1]
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos * first - sin * second, sin * first + cos * second], 2).reshape(weight.shape)


def best_angles(scores: torch.Tensor, weights: torch.Tensor, rope: Rope, steps: int = 16) -> torch.Tensor:
    """Return, for each KV head and pair, the angle (G, F) at which single channels match the queries best.

    `scores` (D, H*K): covariance of each unit-rms channel of x̂ with each query channel. `weights` (G, F): how much
    a pair matters, its key's power. The heads of a group share the angle, as they share the key.
    """
    n_heads = rope.n_kv_heads * rope.per_group
    angles = torch.arange(steps, dtype=scores.dtype, device=scores.device) * torch.pi / steps
    found = []
    for angle in angles:
        rotated = rotate_pairs(scores, angle.expand(n_heads, rope.d_head // 2))
        best = rotated.abs().amax(0).view(n_heads, 2, -1).square().sum(1)  # (H, F)
        found.append(best.view(rope.n_kv_heads, rope.per_group, -1).sum(1) * weights)
    return angles[torch.stack(found).argmax(0)]


def pair_power(covariance: torch.Tensor, W_K: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Return the variance (G, F) of each pair of each KV head's key; `covariance` (D, D) is that of x̂."""
    power = (W_K * (covariance @ W_K)).sum(0).clamp_min(0)
    return power.view(rope.n_kv_heads, 2, -1).sum(1)
