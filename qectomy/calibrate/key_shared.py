"""`key-shared`: the joint start of W_K and the mixes A_h, from second moments alone.

With independent positions, the logits' error of head h is |C^½ (W_Q^h R W_Kᵀ - W A_h R Wᵀ) C_k^½|² at RoPE offset R,
where C = E[x̂ᵀx̂] weighs queries and C_k, the covariance of x̂ under the teacher's attention, weighs keys: the
Kronecker factors of the attention KL's Gauss-Newton matrix. It costs no attention pass, however much text there is.
Weights here are (D, out), as in x̂ W; key heads of a group come first: G n_kv_heads, r heads a group, K d_head.
"""

import math
from collections.abc import Iterator

import torch

from qectomy.calibrate.moments import ridge
from qectomy.calibrate.preconditioning import adam, diagonal_key_parameter, mix_parameter
from qectomy.calibrate.rope import Rope

STEPS = 120
OFFSETS_A_STEP = 6  # drawn anew: the mean over all offsets starts the fit worse (docs/LOG.md)


def least_squares_mix(C: torch.Tensor, W_Q: torch.Tensor, W_K: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Return A (H, K, K): the mix of a head's own key nearest to its query, A_h = (KᵀCK)⁻¹ KᵀC W_Q^h."""
    keys = W_K.view(len(C), rope.n_kv_heads, 1, rope.d_head).expand(-1, -1, rope.per_group, -1).flatten(1, 2)
    queries = W_Q.view(len(C), -1, rope.d_head)
    mixes = []
    for h in range(queries.shape[1]):
        K = keys[:, h]
        mixes.append(ridge(K.T @ C @ K, K.T @ C @ queries[:, h], 1e-5))
    return torch.stack(mixes)


def joint_start(
    C: torch.Tensor,
    C_k: torch.Tensor,
    W_Q: torch.Tensor,
    W_K: torch.Tensor,
    rope: Rope,
    generator: torch.Generator,
    steps: int = STEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (W_K' (D, G*K), A (H, K, K)) that lower the error above; C (D, D), C_k (G, D, D), which is used up.

    It runs in the eigenbasis of C: there C is diagonal and so is the step of W_K, and C_k W is the one wide product
    left of a step. In bfloat16 it would be quicker, and cost perplexity (docs/LOG.md).
    """
    d_model, groups, per, K = len(C), rope.n_kv_heads, rope.per_group, rope.d_head
    C, C_k, W_Q, W_K = (tensor.float() for tensor in (C, C_k, W_Q, W_K))
    rope = Rope(rope.cos.float(), rope.sin.float(), groups, per)
    mix = mix_parameter(least_squares_mix(C, W_Q, W_K, rope), W_Q, W_K, C, rope, lr=1e-2)
    variances, V = torch.linalg.eigh(C)
    C = variances.clamp_min(0)[:, None]
    for own in C_k:
        own.copy_(V.T @ own @ V)
    W_Q, W_K = V.T @ W_Q, V.T @ W_K
    key = diagonal_key_parameter(W_K, variances, rope, power=0.25, lr=5e-3)
    theirs = W_K.view(d_model, groups, K).transpose(0, 1)  # (G, D, K)
    queries = W_Q.view(d_model, groups, per, K).permute(1, 2, 0, 3)  # (G, r, D, K)
    C_queries, C_theirs = C * queries, C_k @ theirs
    query_gram, key_gram = queries.mT @ C_queries, theirs.mT @ C_theirs
    scale, turns = (query_gram * key_gram[:, None]).sum(), bool(rope.sin.any())

    def loss(values: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        ours = values[0].view(d_model, groups, K).transpose(0, 1)
        A = values[1].view(groups, per, K, K)
        cross = (C_queries.mT @ ours[:, None]) @ A
        own = A.mT @ (ours.mT @ (C * ours))[:, None] @ A
        query_blocks = _blocks(query_gram, -cross, own)  # (G, r, 2K, 2K)
        key_blocks = _blocks(key_gram, C_theirs.mT @ ours, ours.mT @ (C_k @ ours))  # (G, 2K, 2K)
        if not turns:
            yield (query_blocks * key_blocks[:, None]).sum() / scale
            return
        draws = torch.rand(OFFSETS_A_STEP, generator=generator)  # log-uniform: octaves of distance weigh alike
        offsets = (torch.exp(draws * math.log(len(rope.cos))) - 1).long().to(C.device)
        yield (query_blocks * mean_turn(key_blocks, offsets, rope)[:, None]).sum() / scale

    adam([key, mix], loss, steps=steps, warmup=15, betas=(0.9, 0.95))
    return V @ key.value().detach(), mix.value().detach()


def _blocks(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Return [[a, b], [bᵀ, d]]."""
    return torch.cat([torch.cat([a, b], -1), torch.cat([b.mT, d], -1)], -2)


def mean_turn(matrix: torch.Tensor, offsets: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Return the mean over offsets p of R_pᵀ M R_p, block by block, of symmetric M (G, nK, nK).

    With R = diag(cos) + half-turn diag(sin), M takes part with the means of c cᵀ, c sᵀ and s sᵀ alone: no offset axis.
    """
    cos, sin = rope.cos[offsets], rope.sin[offsets]
    # (K, 1, K): rows and columns of a block, with the column's block number between
    cc, cs, ss = ((a.T @ b / len(offsets))[:, None] for a, b in ((cos, cos), (cos, sin), (sin, sin)))
    M = matrix.unflatten(-1, (-1, rope.d_head)).unflatten(-3, (-1, rope.d_head))  # (G, n, K, n, K)
    right, down = _half_turn(M, -1), _half_turn(M, -3)
    turned = cc * M + cs * right + cs.transpose(0, 2) * down + ss * _half_turn(right, -3)
    return turned.flatten(-4, -3).flatten(-2)


def _half_turn(M: torch.Tensor, axis: int) -> torch.Tensor:
    """Return M with (a, b) made (-b, a), the two halves of an axis."""
    first, second = M.chunk(2, axis)
    return torch.cat([-second, first], axis)
