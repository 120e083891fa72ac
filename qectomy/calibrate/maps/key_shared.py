"""`key-shared`: queries and keys share one projection; the joint start of W_K and the mixes A_h, from second moments.

With independent positions, the logits' error of head h is |C^½ (W_Q^h R W_Kᵀ - W A_h R Wᵀ) C_k^½|² at RoPE offset R,
where C = E[x̂ᵀx̂] weighs queries and C_k, the covariance of x̂ under the teacher's attention, weighs keys: the
Kronecker factors of the attention KL's Gauss-Newton matrix (as in K-FAC, Martens & Grosse, arXiv 1503.05671). It costs
no attention pass, however much text there is.
Weights here are (D, out), as in x̂ W; key heads of a group come first: G n_kv_heads, r heads a group, K d_head.
"""

import math
from collections.abc import Iterator

import torch

from qectomy.calibrate.free_keys import RIDGE, per_head
from qectomy.calibrate.moments import ridge
from qectomy.calibrate.preconditioning import (
    Preconditioned,
    adam,
    key_in_eigenbasis,
    output_rms,
    precondition_keys,
    precondition_mix,
    scaled,
)
from qectomy.calibrate.problem import LayerProblem, QueryKeyParams
from qectomy.calibrate.refine import RefineSettings
from qectomy.calibrate.rope import Rope
from qectomy.models.query_maps import QueryMapSpec

STEPS = 120
OFFSETS_A_STEP = 6  # drawn anew: the mean over all offsets starts the fit worse (docs/LOG.md)


def init(problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator) -> QueryKeyParams:
    W_K, mix = joint_init(problem, generator)
    query, b_K = {"mix": mix}, problem.teacher.b_K
    if problem.mean_query is not None:
        keys = problem.moments.student_mean @ W_K.double() + (0 if b_K is None else b_K)
        query["bias"] = problem.mean_query - mixed(keys, mix.double())
    return QueryKeyParams(W_K, query, b_K)


def init_without_rope(problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator) -> QueryKeyParams:
    W_K, mix = (part.double() for part in joint_init(problem, generator))
    assert problem.mean_query is not None
    assert problem.key_moments is not None
    V = problem.spread.eigen[1].double()  # in this basis C_k was left
    heads = (per_head(part, len(mix)) for part in (V.T @ W_K, V.T @ problem.carried[1], problem.mean_query))
    parts = zip(*heads, problem.key_moments, strict=True)  # one head's moments in float64 at a time
    bias = torch.cat([mean @ key_change(own, K, C_k.double()).T for own, K, mean, C_k in parts])
    return QueryKeyParams(W_K, {"mix": mix, "bias": bias - mixed(problem.moments.student_mean @ W_K, mix)})


def preconditioned(
    params: QueryKeyParams, problem: LayerProblem, settings: RefineSettings
) -> dict[str, Preconditioned]:
    C, W_Q, lr = problem.moments.student, problem.teacher.W_Q, settings.lr_query
    free = precondition_keys(params, problem, settings.lr_key)
    free["query.mix"] = precondition_mix(params.query["mix"], W_Q, params.W_K.double(), C, problem.rope, lr=lr)
    if "bias" in params.query:
        free["query.bias"] = scaled(params.query["bias"], output_rms(C, W_Q), lr)
    return free


def joint_init(
    problem: LayerProblem, generator: torch.Generator, steps: int = STEPS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (W_K' (D, G*K), A (H, K, K)) that lower the error above. C_k, (G, D, D), goes to the eigenbasis of C.

    It runs in the eigenbasis of C: there C is diagonal and so is the step of W_K, and C_k W is the one wide product
    left of a step. In bfloat16 it would be quicker, and cost perplexity (docs/LOG.md).
    """
    C_k, rope = problem.key_moments, problem.rope
    assert C_k is not None
    d_model, groups, per, K = problem.dims.d_model, rope.n_kv_heads, rope.per_group, rope.d_head
    C, W_Q, W_K = (tensor.float() for tensor in (problem.spread.student, *problem.carried))
    rope = Rope(rope.cos.float(), rope.sin.float(), groups, per)
    mix = precondition_mix(least_squares_mix(C, W_Q, W_K, rope), W_Q, W_K, C, rope, lr=1e-2)
    variances, V = problem.spread.eigen
    C = variances.clamp_min(0)[:, None]
    for own in C_k:
        own.copy_(V.T @ own @ V)
    W_Q, W_K = V.T @ W_Q, V.T @ W_K
    key = key_in_eigenbasis(W_K, variances, rope, power=0.25, lr=5e-3)
    teacher = W_K.view(d_model, groups, K).transpose(0, 1)  # (G, D, K)
    queries = W_Q.view(d_model, groups, per, K).permute(1, 2, 0, 3)  # (G, r, D, K)
    C_queries, C_teacher = C * queries, C_k @ teacher
    query_gram, key_gram = queries.mT @ C_queries, teacher.mT @ C_teacher
    scale = (query_gram * key_gram[:, None]).sum()

    def loss(values: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        student = values[0].view(d_model, groups, K).transpose(0, 1)
        A = values[1].view(groups, per, K, K)
        cross = (C_queries.mT @ student[:, None]) @ A
        own = A.mT @ (student.mT @ (C * student))[:, None] @ A
        query_blocks = _blocks(query_gram, -cross, own)  # (G, r, 2K, 2K)
        key_blocks = _blocks(key_gram, C_teacher.mT @ student, student.mT @ (C_k @ student))  # (G, 2K, 2K)
        if problem.dims.rope:
            draws = torch.rand(OFFSETS_A_STEP, generator=generator)  # log-uniform: octaves of distance weigh alike
            offsets = (torch.exp(draws * math.log(len(rope.cos))) - 1).long().to(C.device)
            key_blocks = mean_rotation(key_blocks, offsets, rope)
        yield (query_blocks * key_blocks[:, None]).sum() / scale

    adam([key, mix], loss, steps=steps, warmup=15, betas=(0.9, 0.95))
    return V @ key.value().detach(), mix.value().detach()


def least_squares_mix(C: torch.Tensor, W_Q: torch.Tensor, W_K: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Return A (H, K, K): the mix of a head's own key nearest to its query, A_h = (KᵀCK)⁻¹ KᵀC W_Q^h."""
    keys = W_K.view(len(C), rope.n_kv_heads, 1, rope.d_head).expand(-1, -1, rope.per_group, -1).flatten(1, 2)
    queries = W_Q.view(len(C), -1, rope.d_head)
    mixes = []
    for h in range(queries.shape[1]):
        K = keys[:, h]
        mixes.append(ridge(K.T @ C @ K, K.T @ C @ queries[:, h], 1e-5))
    return torch.stack(mixes)


def mixed(keys: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Return the queries (H*K,) that keys (G*K,) are mixed to."""
    own = keys.view(-1, 1, 1, mix.shape[-1])  # (G, 1, 1, K)
    return (own @ mix.unflatten(0, (len(own), -1))).flatten()


def key_change(W: torch.Tensor, K: torch.Tensor, C_k: torch.Tensor) -> torch.Tensor:
    """Return N (K', K) with x̂ W N nearest to x̂ W_K under C_k: a query q of the old keys is q Nᵀ of the new."""
    return ridge(W.T @ C_k @ W, W.T @ C_k @ K, RIDGE)


def _blocks(a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Return [[a, b], [bᵀ, d]]."""
    return torch.cat([torch.cat([a, b], -1), torch.cat([b.mT, d], -1)], -2)


def mean_rotation(matrix: torch.Tensor, offsets: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Return the mean over offsets p of R_pᵀ M R_p, block by block, of symmetric M (G, nK, nK).

    With R = diag(cos) + rotate-half diag(sin), M meets with the means of c cᵀ, c sᵀ and s sᵀ alone: no offset axis.
    """
    cos, sin = rope.cos[offsets], rope.sin[offsets]
    # (K, 1, K): rows and columns of a block, with the column's block number between
    cc, cs, ss = ((a.T @ b / len(offsets))[:, None] for a, b in ((cos, cos), (cos, sin), (sin, sin)))
    M = matrix.unflatten(-1, (-1, rope.d_head)).unflatten(-3, (-1, rope.d_head))  # (G, n, K, n, K)
    right, down = _rotate_half(M, -1), _rotate_half(M, -3)
    rotated = cc * M + cs * right + cs.transpose(0, 2) * down + ss * _rotate_half(right, -3)
    return rotated.flatten(-4, -3).flatten(-2)


def _rotate_half(M: torch.Tensor, axis: int) -> torch.Tensor:
    """Return M with (a, b) made (-b, a), the two halves of an axis."""
    first, second = M.chunk(2, axis)
    return torch.cat([-second, first], axis)
