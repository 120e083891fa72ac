"""The heads' gauge: pure functions against other formulas. Dimensions: D d_model, K d_head, n heads."""

from itertools import combinations

import numpy as np
import pytest
import torch
from foldings import fold, logits, relative, stored
from tiny_models import save_tiny, tiny_model, tokens, variant_model
from variant_reference import rotate

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.errors import QueryMapError
from qectomy.models.heads import join_heads, other_channels, split_heads, unfold_pivots
from qectomy.surgery.checkpoint import plan_exact
from qectomy.surgery.gauge import choose_pivots, fold_pivots, orthonormal_gauge, pair_scales, pivot_condition


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_heads_are_columns_side_by_side():
    W = normal(7, 12)
    blocks = split_heads(W, 4)
    assert blocks.shape == (3, 7, 4)
    for head in range(3):
        assert torch.equal(blocks[head], W[:, 4 * head : 4 * head + 4])
    assert torch.equal(join_heads(blocks), W)


def test_the_orthonormal_gauge_is_the_inverse_root_of_the_gram_matrix():
    blocks = normal(3, 12, 4)
    gauge = orthonormal_gauge(blocks)
    for W, A in zip(blocks.numpy(), gauge.numpy(), strict=True):
        values, vectors = np.linalg.eigh(W.T @ W)
        np.testing.assert_allclose(A, vectors / np.sqrt(values) @ vectors.T, rtol=1e-11, atol=1e-12)
        np.testing.assert_allclose((W @ A).T @ W @ A, np.eye(4), atol=1e-13)
    blocks[1, :, 2] = blocks[1, :, 0] - 2 * blocks[1, :, 3]
    with pytest.raises(torch.linalg.LinAlgError, match="not full rank"):
        orthonormal_gauge(blocks)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_pair_scales_pass_rope_and_are_one_for_heads_that_share_a_key(group):
    d_head, blocks = 6, normal(4, 12, 6) * torch.arange(1.0, 5.0, dtype=torch.float64)[:, None, None]
    gauge = pair_scales(blocks, group)
    x = normal(2, 9, 4 * d_head, seed=1)
    A = torch.block_diag(*gauge)
    torch.testing.assert_close(rotate(x @ A, d_head, 500.0), rotate(x, d_head, 500.0) @ A, rtol=1e-13, atol=1e-13)
    uneven = A.clone()
    uneven[0, 0] *= 1.1  # without its pair
    assert not torch.allclose(rotate(x @ uneven, d_head, 500.0), rotate(x, d_head, 500.0) @ uneven, atol=1e-3)
    W = (blocks @ gauge).numpy()
    for first in range(0, 4, group):
        for i in range(d_head // 2):
            norms = [np.square(W[h, :, c]).sum() for h in range(first, first + group) for c in (i, i + d_head // 2)]
            assert np.mean(norms) == pytest.approx(1, rel=1e-13)
        assert all(torch.equal(gauge[h], gauge[first]) for h in range(first, first + group))
    assert (gauge.diagonal(dim1=1, dim2=2) > 0).all()
    assert torch.equal(gauge, torch.diag_embed(gauge.diagonal(dim1=1, dim2=2)))


def test_a_pair_of_nothing_has_no_scale():
    blocks = normal(4, 12, 6)
    blocks[2:, :, [1, 4]] = 0  # both channels of a pair, in both heads of a group
    with pytest.raises(torch.linalg.LinAlgError, match="a pair of query channels is 0"):
        pair_scales(blocks, 2)
    blocks[3, 5, 4] = 1e-3
    assert pair_scales(blocks, 2).isfinite().all()


def volume(W, channels):
    """|det W A [channels]| of one head (D, K), in its orthonormal coordinates."""
    return abs(np.linalg.det(np.linalg.qr(W.numpy())[0][list(channels)]))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("n, d_model, d_head", [(1, 7, 2), (3, 7, 2), (2, 8, 3), (4, 6, 1), (2, 5, 5)])
def test_no_swap_of_one_pivot_is_better(n, d_model, d_head, seed):
    blocks = normal(n, d_model, d_head, seed=seed)
    pivots, condition = choose_pivots(blocks)
    for W, own in zip(blocks, pivots.tolist(), strict=True):
        assert own == sorted(set(own))
        best = volume(W, own)
        for other in combinations(range(d_model), d_head):
            if len(set(other) & set(own)) == d_head - 1:
                assert volume(W, other) <= best * 1.11
        assert best > max(volume(W, other) for other in combinations(range(d_model), d_head)) / 4
    conditions = [
        np.linalg.cond(np.linalg.qr(W)[0][own]) for W, own in zip(blocks.numpy(), pivots.tolist(), strict=True)
    ]
    assert condition == pytest.approx(max(conditions), rel=1e-9)
    assert pivot_condition(blocks, pivots) == condition


def test_pivots_avoid_what_a_head_does_not_read():
    blocks = normal(3, 10, 2)
    blocks[0, :4], blocks[1, 6:] = 0, 0
    pivots, condition = choose_pivots(blocks)
    assert pivots[0].min() >= 4
    assert pivots[1].max() < 6
    assert condition < 10


@pytest.mark.parametrize("case", ["dead", "rank-deficient"])
def test_a_head_without_pivots(case):
    blocks = normal(3, 8, 2)
    if case == "dead":
        blocks[1] = 0
    else:
        blocks[1, :, 1] = 3 * blocks[1, :, 0]
    assert choose_pivots(blocks)[1] > 1e12


def test_the_other_channels():
    assert other_channels(torch.tensor([[2, 5], [0, 6]]), 7).tolist() == [[0, 1, 3, 4, 6], [1, 2, 3, 4, 5]]


def test_folding_the_pivots_leaves_an_identity_and_keeps_every_product():
    W_Q, W_K = normal(3, 9, 4), normal(3, 9, 4, seed=1)
    pivots = torch.tensor([[1, 4, 6, 7], [0, 1, 2, 8], [2, 3, 5, 6]])
    before = W_Q.clone()
    rest, inverse = fold_pivots(W_Q, pivots)
    assert torch.equal(W_Q, before)
    folded = unfold_pivots(rest, pivots)
    for head, own in enumerate(pivots):
        assert torch.equal(folded[head, own], torch.eye(4).double())
        A = np.linalg.inv(W_Q[head, own].numpy())
        np.testing.assert_allclose(folded[head], W_Q[head].numpy() @ A, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(inverse[head].numpy() @ A, np.eye(4), atol=1e-10)
        keys = W_K[head] @ inverse[head].T
        np.testing.assert_allclose(folded[head] @ keys.T, W_Q[head] @ W_K[head].T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("role", ["query", "value"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@torch.no_grad()
def test_a_dead_head_keeps_its_layer_whole(tmp_path, family, role):
    """No A makes a block of zeros an identity: that layer's gauge is refused, and the others' are not."""
    model = tiny_model(family, num_hidden_layers=3).double()
    if family == "gpt2":
        model.transformer.h[1].attn.c_attn.weight[:, {"query": 8, "value": 72}[role] :][:, :8] = 0
    else:
        attention = model.model.layers[1].self_attn
        (attention.q_proj if role == "query" else attention.v_proj).weight[8:16] = 0
    model.save_pretrained(tmp_path / "source")
    plan = fold(tmp_path / "source", tmp_path / "out")
    whole = family == "gpt2" or role == "value"  # RoPE's queries have no gauge that could fail
    assert [spec.value for spec in plan.recipe] == ["gauge", "dense" if whole else "gauge", "gauge"]
    assert sorted(plan.pivots) == ([0, 2] if whole else [0, 1, 2])
    ids = tokens(2, 30)
    assert relative(logits(tmp_path / "out", ids), logits(tmp_path / "source", ids)) < 1e-10
    if family == "gpt2":
        assert stored(tmp_path / "out")["transformer.h.1.attn.c_attn.weight"] == (32, 96)


def test_a_gauge_that_would_save_nothing_is_left(tmp_path):
    """Heads of one channel: a block of one number, for one channel's number."""
    folder = save_tiny(tmp_path / "source", "gpt2", num_attention_heads=32)
    with pytest.raises(QueryMapError, match="nothing of this checkpoint goes exactly"):
        plan_exact(open_checkpoint(folder))


@torch.no_grad()
def test_an_ill_conditioned_basis_leaves_no_room_for_a_gauge(tmp_path):
    """W_V[P] and Θ multiply each other's condition: in bfloat16 that costs more than all the rest of the fold."""
    model = variant_model("gpt2", norms=False, tie_word_embeddings=False, num_hidden_layers=1).double()
    W = model.transformer.h[0].attn.c_attn.weight
    W[:, :32] = torch.linalg.qr(normal(32, 32))[0] * torch.linspace(1, 6, 32, dtype=torch.float64)[:, None]
    W[:, 64:] *= torch.logspace(-2.5, 0, 8, dtype=torch.float64).repeat(4)
    model.save_pretrained(tmp_path / "source")
    half, single = (fold(tmp_path / "source", tmp_path / dtype, dtype) for dtype in ("BF16", "F32"))
    assert [spec.value for plan in (half, single) for spec in plan.recipe] == ["dense", "gauge"]
    assert "too much for the target dtype" in half.left[0]
    assert not any(name.endswith(".pivots") for name in stored(tmp_path / "BF16"))
    ids = tokens(2, 30)
    expected = logits(tmp_path / "source", ids)
    assert relative(logits(tmp_path / "F32", ids), expected) < 1e-4
    assert relative(logits(tmp_path / "BF16", ids), expected) < 0.1


@torch.no_grad()
def test_a_bias_that_a_gauge_would_blow_up_leaves_the_layer_whole(tmp_path):
    """A head that hardly reads: W[P]⁻¹ is huge, and so would be its query's bias, in which rounding drowns the rest."""
    model = tiny_model("gpt2", num_hidden_layers=2)
    W, b = model.transformer.h[1].attn.c_attn.weight, model.transformer.h[1].attn.c_attn.bias
    U, S, Vh = torch.linalg.svd(W[:, :8], full_matrices=False)
    W[:, :8] = U @ (S * torch.logspace(0, -7, 8)).diag() @ Vh
    model.save_pretrained(tmp_path / "source")
    plan = fold(tmp_path / "source", tmp_path / "out")
    assert [spec.name for spec in plan.recipe] == ["gauge", "dense"]
    assert "with its basis and bias" in plan.left[1]
    ids = tokens(2, 30)
    assert relative(logits(tmp_path / "out", ids), logits(tmp_path / "source", ids)) < 1e-5
    b[:32] = 0  # without which nothing is blown up
    model.save_pretrained(tmp_path / "unbiased")
    plan = fold(tmp_path / "unbiased", tmp_path / "out2")
    assert [spec.name for spec in plan.recipe] == ["gauge", "gauge"]
    assert relative(logits(tmp_path / "out2", ids), logits(tmp_path / "unbiased", ids)) < 1e-5
