"""The audit's numbers against other formulas, on matrices whose answer is known, and under gauges that change nothing.

Dimensions: D d_model, H n_heads, G n_kv_heads, K d_head.
"""

import numpy as np
import pytest
import torch

from qectomy.models.family import Dimensions
from qectomy.surgery.audit import condition_number, distance_from_orthogonal, leading_rank
from qectomy.surgery.stream_basis import random_orthogonal

# name: (D, H, G, K, rope, centred)
CASES = {
    "layer-norm": (24, 4, 4, 6, False, True),
    "layer-norm-two-heads": (24, 2, 2, 12, False, True),
    "no-mean-taken": (24, 4, 4, 6, False, False),
    "no-mean-taken-narrow": (24, 3, 3, 6, False, False),
    "rope": (24, 4, 4, 6, True, False),
    "rope-grouped": (24, 4, 2, 6, True, False),
    "rope-one-kv-head": (24, 4, 1, 6, True, False),
    "rope-narrow": (24, 4, 2, 4, True, False),
}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def dims(d_model, n_heads, n_kv_heads, d_head, rope):
    sizes = dict(d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=d_head, rope=rope)
    rest = dict(n_layers=1, d_mlp=1, vocab_size=1, tied=True, attention_bias=False, n_positions=1)
    rest |= dict(output_bias=False, mlp_bias=False)
    return Dimensions(**sizes, **rest)


def case(name):
    *sizes, centred = CASES[name]
    return dims(*sizes), centred


def gain(d_model, seed=5):
    return 0.5 + torch.rand(d_model, generator=generator(seed), dtype=torch.float64)


def gauge(model, seed=1):
    """A random gauge (H*K, H*K) of the heads: any matrix a head, or what commutes with RoPE, one a KV group."""
    if not model.rope:
        return torch.block_diag(*(normal(model.n_heads, model.d_head, model.d_head, seed=seed)))
    blocks, half = [], model.d_head // 2
    for group in range(model.n_kv_heads):
        scale = 0.2 + torch.rand(half, generator=generator(seed + group), dtype=torch.float64)
        angle = 3 * normal(half, seed=seed + group)
        cos, sin = (scale * angle.cos()).diag(), (scale * angle.sin()).diag()
        blocks += [torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])] * (
            model.n_heads // model.n_kv_heads
        )
    return torch.block_diag(*blocks)


def turn(model, keeps_mean):
    """Return columns (D, H*K) of a random orthogonal matrix, of one that keeps the mean direction if told to."""
    theta = random_orthogonal(model.d_model, generator(2))
    if keeps_mean:
        basis, _ = torch.linalg.qr(torch.cat([torch.ones(model.d_model, 1).double(), normal(model.d_model, 23)], 1))
        inner = torch.block_diag(torch.ones(1, 1).double(), random_orthogonal(model.d_model - 1, generator(3)))
        theta = basis @ inner @ basis.T
    return theta[:, : model.n_heads * model.d_head]


def distance(W_Q, gamma, model, centred):
    found, why = distance_from_orthogonal(W_Q, gamma, model, centred=centred)
    assert why is None
    return found


@pytest.mark.parametrize("shape", [(9, 9), (12, 7), (7, 12)])
def test_condition_number_is_numpys(shape):
    W = normal(*shape).float()
    assert condition_number(W) == pytest.approx(np.linalg.cond(W.double().numpy()), rel=1e-10)


def test_a_singular_matrix_has_no_condition_number():
    W = normal(12, 9).bfloat16()
    W[:, 4] = W[:, 2]
    assert condition_number(W) == float("inf")
    assert condition_number(torch.zeros(5, 5)) == float("inf")
    assert condition_number(torch.diag(torch.tensor([1.0, 1e-9]))) == pytest.approx(1e9)


@pytest.mark.parametrize("name", CASES)
def test_a_turn_of_the_stream_in_any_gauge_is_at_0(name):
    model, centred = case(name)
    gamma = gain(model.d_model)
    M = turn(model, keeps_mean=centred) @ gauge(model)
    if centred:
        M = M + normal(model.n_heads * model.d_head, seed=7)  # of the channels' mean, which x̂ / gamma does not have
    W_Q = M / gamma[:, None]
    before = W_Q.clone()
    assert distance(W_Q, gamma, model, centred) < 1e-12
    assert torch.equal(W_Q, before)
    assert distance(M, None, model, centred) < 1e-12
    assert distance(M, gamma, model, centred) > 0.02  # the gain counts
    noise = normal(*M.shape, seed=8) @ gauge(model)
    assert distance((M + 0.05 * noise) / gamma[:, None], gamma, model, centred) > 0.02


def test_a_turn_that_moves_the_mean_direction_is_none_for_a_layer_norm():
    model, centred = case("layer-norm")
    W_Q = turn(model, keeps_mean=False) @ gauge(model)
    assert distance(W_Q, None, model, False) < 1e-12
    assert distance(W_Q, None, model, centred) > 1e-3


@pytest.mark.parametrize("centred", [False, True])
def test_one_head_without_rope_is_all_gauge(centred):
    assert distance(normal(8, 8), gain(8), dims(8, 1, 1, 8, False), centred) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_no_gauge_changes_the_distance(name):
    model, centred = case(name)
    W_Q, gamma = normal(model.d_model, model.n_heads * model.d_head), gain(model.d_model)
    plain = distance(W_Q, gamma, model, centred)
    assert 0.1 < plain < 1
    for seed in range(3):
        assert distance(W_Q @ gauge(model, seed), gamma, model, centred) == pytest.approx(plain, rel=1e-9)


def test_the_heads_of_a_group_share_their_gauge():
    model, centred = case("rope-grouped")
    W_Q = turn(model, keeps_mean=False)
    W_Q[:, : model.d_head] *= 2  # one of the two that share a key
    assert distance(W_Q, None, model, centred) > 0.1
    W_Q[:, model.d_head : 2 * model.d_head] *= 2
    assert distance(W_Q, None, model, centred) < 1e-12


@pytest.mark.parametrize("name", ["no-mean-taken", "no-mean-taken-narrow", "rope", "rope-grouped", "rope-one-kv-head"])
def test_the_distance_is_that_to_the_polar_factor(name):
    model, _ = case(name)
    W_Q, gamma = normal(model.d_model, model.n_heads * model.d_head), gain(model.d_model)
    U = np.diag(gamma.numpy()) @ W_Q.numpy()
    per_group, half = model.n_heads // model.n_kv_heads, model.d_head // 2
    for head in range(model.n_heads):
        block = slice(head * model.d_head, (head + 1) * model.d_head)
        if not model.rope:
            values, vectors = np.linalg.eigh(U[:, block].T @ U[:, block])
            U[:, block] = U[:, block] @ (vectors * values**-0.5) @ vectors.T
    for group in range(model.n_kv_heads if model.rope else 0):
        for i in range(half):
            first = [(group * per_group + j) * model.d_head + i for j in range(per_group)]
            columns = first + [column + half for column in first]
            U[:, columns] /= np.sqrt(np.mean([np.sum(U[:, column] ** 2) for column in columns]))
    values, vectors = np.linalg.eigh(U.T @ U)
    polar = U @ (vectors * values**-0.5) @ vectors.T
    expected = np.linalg.norm(U - polar) / np.linalg.norm(polar)
    assert distance(W_Q, gamma, model, False) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rope", [False, True])
def test_a_random_square_matrix_is_at_about_055(rope):
    """The quarter-circle law on [0, 2], in many heads: mean sigma² 1 and mean sigma 8 / (3 pi)."""
    expected = (2 - 16 / (3 * np.pi)) ** 0.5
    assert expected == pytest.approx(0.55, abs=0.001)
    found = distance(normal(512, 512), None, dims(512, 32, 32, 16, rope), not rope)
    assert found == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("name", ["layer-norm", "rope-grouped"])
def test_where_there_is_no_distance_the_reason_is_said(name):
    model, centred = case(name)
    wide = normal(model.d_model - 1, model.d_model)
    found, why = distance_from_orthogonal(wide, None, model, centred=centred)
    assert found is None
    assert why is not None
    assert "n_heads * d_head is 24, more than d_model 23" in why
    W_Q = normal(model.d_model, model.d_model)
    W_Q[:, 2 * model.d_head] = 3 * W_Q[:, 2 * model.d_head + 1]
    found, why = distance_from_orthogonal(W_Q, gain(model.d_model), model, centred=centred)
    assert found is None
    assert why is not None
    assert "the block of head 2 is singular" in why


@pytest.mark.parametrize(
    "energies, expected",
    [([90, 8.9, 1.05, 0.05], 3), ([99.1, 0.9], 1), ([98.9, 1.1], 2), ([1] * 8, 8), ([0, 0], 0), ([5], 1)],
)
@pytest.mark.parametrize("n_query", [8, 10, 13])
def test_rank_of_a_known_spectrum(energies, expected, n_query):
    """W_Q = C^-½ U diag(s) Vᵀ has the singular values s under C."""
    size = 10
    root = random_orthogonal(size, generator(4)) * torch.linspace(0.1, 3, size, dtype=torch.float64)
    root = root @ root.T  # symmetric, so C^½ for C = root²
    s = torch.tensor(energies, dtype=torch.float64)[torch.randperm(len(energies), generator=generator())].sqrt()
    left = random_orthogonal(size, generator(5))[:, : len(s)]
    right = random_orthogonal(n_query, generator(6))[:, : len(s)]
    W_Q = torch.linalg.inv(root) @ (left * s) @ right.T
    assert leading_rank(W_Q, root @ root) == expected


def test_all_the_energy_is_the_whole_rank():
    assert leading_rank(normal(6, 6), torch.eye(6), energy=1 - 1e-12) == 6
