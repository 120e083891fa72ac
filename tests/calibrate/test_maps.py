"""Closed-form starts find the answer where a query map can express W_Q, and keep what must not change."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention_bench import AttentionBench
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qectomy.calibrate.maps.key_shared import least_squares_mix, mean_rotation
from qectomy.calibrate.maps.low_rank import factors
from qectomy.calibrate.moments import Moments, MomentSums, ridge
from qectomy.calibrate.problem import QueryKeyParams
from qectomy.calibrate.rope import rotate_pairs

SHAPES = [dict(), dict(n_kv_heads=4), dict(n_kv_heads=1), dict(d_head=12), dict(d_head=6)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# A teacher that the map can express: attention KL goes to (nearly) nothing.


def expressible_by_key_shared(bench):
    keys = bench.W_K.view(bench.d_model, bench.n_kv_heads, 1, bench.d_head)
    mixes = bench.normal(bench.n_heads, bench.d_head, bench.d_head) * bench.d_head**-0.5
    keys = keys.expand(-1, -1, bench.n_heads // bench.n_kv_heads, -1).flatten(1, 2)
    bench.W_Q = torch.einsum("dhi,hij->dhj", keys, mixes).flatten(1)
    return mixes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_least_squares_mix_recovers_the_mix(shape):
    bench = AttentionBench(**shape)
    mixes = expressible_by_key_shared(bench)
    found = least_squares_mix(bench.moments.student, bench.W_Q, bench.W_K, bench.rope)
    assert (found - mixes).abs().max() < 1e-3 * mixes.abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_key_shared_expresses_a_mix_of_keys(shape, bias):
    bench = AttentionBench(bias=bias, **shape)
    expressible_by_key_shared(bench)
    if bias:  # the bias of the mixed keys goes into the query's own
        bench.b_Q = bench.normal(len(bench.b_Q))
    start = bench.start("key-shared")
    assert bench.kl("key-shared", start) < 1e-3


def expressible_by_select(bench):
    index = torch.randint(bench.d_model, (bench.W_Q.shape[1],), generator=bench.generator)
    gain = 0.3 + torch.rand(len(index), generator=bench.generator, dtype=torch.float64)
    bench.W_Q = torch.zeros_like(bench.W_Q).index_put((index, torch.arange(len(index))), gain)
    return index


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_expresses_scaled_channels(shape, bias):
    bench = AttentionBench(bias=bias, **shape)
    index = expressible_by_select(bench)
    start = bench.start("select")
    assert start.query["index"].dtype == torch.int32
    assert torch.equal(start.query["index"].long(), index)
    assert bench.kl("select", start) < 1e-6


def rotate_teacher(bench):
    """Turn each pair of channels of the teacher's heads, those of a KV head by one angle; biases stay as they are."""
    angle = torch.randint(16, (bench.n_kv_heads, bench.d_head // 2), generator=bench.generator) * torch.pi / 16
    angle = angle.double()
    bench.W_K = rotate_pairs(bench.W_K, angle)
    bench.W_Q = rotate_pairs(bench.W_Q, angle.repeat_interleave(bench.n_heads // bench.n_kv_heads, 0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_biases_turn_with_their_pairs(shape):
    """What the start turns in W_Q and W_K it turns in their biases too, or keys and queries miss each other."""
    bench = AttentionBench(bias=True, **shape)
    expressible_by_select(bench)
    rotate_teacher(bench)
    assert bench.kl("select", bench.start("select")) < 1e-5
    if bench.n_heads * bench.d_head <= bench.d_model:
        bench.W_Q = torch.eye(bench.d_model, dtype=torch.float64)[:, : bench.W_Q.shape[1]]
        rotate_teacher(bench)
        assert bench.kl("identity", bench.start("identity")) < 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_select_chooses_slow_channels_jointly(shape):
    """Greedy choices need not find the one exact answer; they come near, and nearer than channel by channel."""
    bench = AttentionBench(theta=1e9, **shape)
    expressible_by_select(bench)
    assert len(bench.rope.slow_channels())
    start = bench.start("select")
    found = bench.refined("select", start)
    nothing = QueryKeyParams(bench.W_K, {**start.query, "gain": torch.zeros_like(start.query["gain"])})
    assert bench.kl("select", found) < 0.05 * bench.kl("select", nothing)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [dict(), dict(n_kv_heads=4), dict(n_kv_heads=1), dict(d_head=6)], ids=str)
def test_identity_expresses_a_gain(shape, bias):
    bench = AttentionBench(bias=bias, **shape)
    gain = 0.5 + torch.rand(bench.d_model, generator=bench.generator, dtype=torch.float64)
    gain = gain * torch.where(torch.arange(bench.d_model) % 3 == 0, -1.0, 1.0)
    bench.W_Q = torch.diag(gain)[:, : bench.W_Q.shape[1]]
    start = bench.start("identity")
    assert bench.kl("identity", start) < 1e-6
    torch.testing.assert_close(start.norm_gain[: bench.W_Q.shape[1]], gain[: bench.W_Q.shape[1]], rtol=1e-3, atol=1e-3)


def test_no_gain_of_identity_is_near_zero():
    """Some channel may match its query channel not at all; W_K and W_V are divided by its gain all the same."""
    bench = AttentionBench()
    bench.W_Q = torch.diag(torch.linspace(1, 2, 32, dtype=torch.float64))
    bench.W_Q[5, 5] = bench.W_Q[20, 20] = 0.0
    gain = bench.start("identity").norm_gain.abs()
    assert gain.min() > 0.03 * gain.mean()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_at_full_rank_is_W_Q(shape):
    bench = AttentionBench(**shape)
    query = factors(bench.moments, bench.W_Q, min(bench.W_Q.shape))
    channels = torch.arange(bench.W_Q.shape[1]) % bench.d_model
    rebuilt = query["down"].T @ query["up"].T
    rebuilt[channels, torch.arange(len(channels))] += query["gain"]
    torch.testing.assert_close(rebuilt, bench.W_Q, rtol=1e-9, atol=1e-9)
    assert bench.kl("low-rank:1", QueryKeyParams(bench.W_K, query)) < 1e-10


def test_low_rank_is_the_best_of_its_rank():
    """By Eckart and Young, no pair of factors leaves a smaller error under C (beside the same diagonal)."""
    bench = AttentionBench()
    C, rank = bench.moments.student, 3
    query = factors(bench.moments, bench.W_Q, rank)
    rest = bench.W_Q - torch.diag(query["gain"])
    root = torch.from_numpy(np.linalg.cholesky(C.numpy()))
    error = (root.T @ (rest - query["down"].T @ query["up"].T)).square().sum()
    values = torch.linalg.svdvals(root.T @ rest)
    torch.testing.assert_close(error, values[rank:].square().sum(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["identity", "select", "key-shared", "low-rank:3"])
def test_a_start_that_cannot_express_the_teacher_is_not_exact(name):
    """The bounds above can fail."""
    bench = AttentionBench()
    assert bench.kl(name, bench.start(name)) > 0.01


# What carries over, and what a rotation leaves alone


@pytest.mark.parametrize("seed", [0, 1])
def test_carry_over_is_exact_for_a_linear_image(seed, monkeypatch):
    monkeypatch.setattr("qectomy.calibrate.problem.SHRINKAGE", 1e-10)
    bench = AttentionBench(seed=seed)
    image = torch.eye(32, dtype=torch.float64) + 0.2 * bench.normal(32, 32)
    theirs = bench.hidden
    ours = (theirs.double() @ image).float()
    sums = MomentSums(32, torch.device("cpu"))
    for i in range(len(ours)):  # batch by batch
        sums.add(ours[i : i + 1], theirs[i : i + 1])
    W, _ = replace(bench.problem("identity"), moments=sums.moments()).carried
    expected = theirs.double() @ bench.W_Q
    assert (ours.double() @ W - expected).abs().max() < 1e-3 * expected.abs().max()
    assert (ours.double() @ bench.W_Q - expected).abs().max() > 0.1 * expected.abs().max()


def test_carry_over_leaves_an_undisturbed_stream_alone():
    bench = AttentionBench()
    W_Q, W_K = bench.problem("identity").carried
    assert torch.equal(W_Q, bench.W_Q)
    assert torch.equal(W_K, bench.W_K)


def test_moments_match_numpy():
    bench = AttentionBench()
    theirs = bench.hidden + 0.1
    sums = MomentSums(32, torch.device("cpu"))
    sums.add(bench.hidden[:2], theirs[:2])
    sums.add(bench.hidden[2:], theirs[2:])
    found, x, y = sums.moments(), bench.hidden.double().flatten(0, 1).numpy(), theirs.double().flatten(0, 1).numpy()
    np.testing.assert_allclose(found.student, x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.cross, x.T @ y / len(x), rtol=1e-4, atol=1e-4)
    centred = found.centred()
    np.testing.assert_allclose(centred.student, np.cov(x.T, bias=True), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(centred.cross, np.cov(x.T, y.T, bias=True)[:32, 32:], rtol=1e-3, atol=1e-4)
    assert isinstance(centred, Moments)
    assert not centred.student_mean.any()


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(1, 9), out=st.integers(1, 4))
def test_ridge_is_least_squares_in_the_limit_and_zero_beyond(seed, n, out):
    g = generator(seed)
    A, B = (torch.randn(40, width, generator=g, dtype=torch.float64) for width in (n, out))
    expected = np.linalg.lstsq(A.numpy(), B.numpy(), rcond=None)[0]
    np.testing.assert_allclose(ridge(A.T @ A, A.T @ B, 1e-14), expected, rtol=1e-8, atol=1e-10)
    assert ridge(A.T @ A, A.T @ B, 1e9).abs().max() < 1e-7
    loaded = torch.cat([A, (0.3 * (A.T @ A).diagonal().mean()).sqrt() * torch.eye(n, dtype=torch.float64)])
    padded = torch.cat([B, torch.zeros(n, out, dtype=torch.float64)])
    by_rows = np.linalg.lstsq(loaded.numpy(), padded.numpy(), rcond=None)[0]
    np.testing.assert_allclose(ridge(A.T @ A, A.T @ B, 0.3), by_rows, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotating_pairs_changes_no_logit(shape):
    bench = AttentionBench(**shape)
    per_group = bench.n_heads // bench.n_kv_heads
    angle = bench.normal(bench.n_kv_heads, bench.d_head // 2)
    before = [t.clone() for t in bench.teacher]
    bench.W_K = rotate_pairs(bench.W_K, angle)
    query_alone = bench.teacher[1]
    bench.W_Q = rotate_pairs(bench.W_Q, angle.repeat_interleave(per_group, 0))

    def logits(query, key):
        return query @ key.repeat_interleave(per_group, 1).mT

    expected = logits(*before)
    assert (logits(*bench.teacher) - expected).abs().max() < 1e-6 * expected.abs().max()  # cos, sin are float32
    assert (logits(before[0], query_alone) - expected).abs().max() > 0.1 * expected.abs().max()


def test_the_mean_rotation_is_that_of_ropes_offsets():
    """Against transformers' RoPE, offset by offset; one offset may come twice."""
    bench = AttentionBench()
    K, offsets = bench.d_head, torch.tensor([0, 3, 17, 3])
    root = bench.normal(3, 2 * K, 2 * K)
    matrix = root @ root.mT
    found = mean_rotation(matrix, offsets, bench.rope)
    expected = torch.zeros_like(matrix)
    for offset in offsets:
        cos, sin = bench.cos[:, offset].double(), bench.sin[:, offset].double()
        rows = matrix
        for _ in range(2):  # the rows, then the columns, block by block
            blocks = rows.unflatten(-1, (2, K)).flatten(1, 2)
            rows = apply_rotary_pos_emb(blocks[None], blocks[None], cos[None], sin[None])[0][0]
            rows = rows.unflatten(1, (2 * K, 2)).flatten(-2).mT
        expected += rows / len(offsets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found - matrix).abs().max() > 0.1 * matrix.abs().max()


def test_slow_channels_come_in_pairs_that_hardly_turn():
    bench = AttentionBench(theta=1e6, d_head=16)
    slow = bench.rope.slow_channels(reach=100, limit=0.3)
    frequencies = 1e6 ** (-torch.arange(8) / 8)
    expected = [f for f in range(8) if frequencies[f] * 100 < 0.3]
    assert expected
    assert slow.tolist() == expected + [f + 8 for f in expected]
