"""Without RoPE a head's queries are known up to an invertible change: starts find any form of a teacher's attention."""

from dataclasses import replace

import pytest
import torch
from attention_bench import AttentionBench

from qectomy.calibrate import free_keys
from qectomy.calibrate.channels import slices
from qectomy.calibrate.free_keys import per_head, roots
from qectomy.calibrate.maps import key_shared, select
from qectomy.calibrate.maps.low_rank import factors, near_slices
from qectomy.calibrate.maps.select import choose_free
from qectomy.calibrate.problem import QueryKeyParams
from qectomy.models.query_maps import parse_query_map

# D d_model, H n_heads, K d_head; H*K = D
SHAPES = [dict(), dict(d_head=12), dict(d_head=5), dict(n_heads=2, d_head=16)]


def bench_of(shape, seed=0):
    return AttentionBench(gpt2=True, seed=seed, **shape)


def changed(bench, W, changes):
    """Return W (D, H*K), or one row, with each head's columns times its change (K, K)."""
    heads = W.unflatten(-1, (bench.n_heads, -1))
    return torch.einsum("...hi,hij->...hj", heads, changes).flatten(-2)


def change_gauge(bench, changes):
    """Give the teacher other queries and keys of the very same attention."""
    inverse = torch.linalg.inv(changes).mT
    bench.W_Q, bench.b_Q = changed(bench, bench.W_Q, changes), changed(bench, bench.b_Q, changes)
    bench.W_K, bench.b_K = changed(bench, bench.W_K, inverse), changed(bench, bench.b_K, inverse)


def random_changes(bench, spread):
    """Return an invertible change (K, K) a head, of condition `spread`; 1 gives rotations."""
    shape = bench.n_heads, bench.d_head, bench.d_head
    first, second = (torch.linalg.qr(bench.normal(*shape))[0] for _ in range(2))
    return first * torch.linspace(1, spread, bench.d_head, dtype=torch.float64) @ second


def head_logits(bench, W_Q, W_K):
    """x̂ W_Q^h W_K^hᵀ x̂ᵀ as the matrices (H, D, D) between."""
    queries, keys = (W.view(len(W), bench.n_heads, -1).transpose(0, 1) for W in (W_Q, W_K))
    return queries @ keys.mT


# A teacher that the map can express


def expressible(bench, name):
    """Make every head's queries any invertible mix of its own channels, or of chosen ones; return the channels."""
    mixes = random_changes(bench, 5.0)
    channels = slices(bench.d_model, bench.n_heads, torch.device("cpu"))
    if name == "select":
        drawn = [torch.randperm(bench.d_model, generator=bench.generator) for _ in channels]
        channels = torch.stack(drawn)[:, : bench.d_head]
    bench.W_Q = torch.zeros_like(bench.W_Q)
    for h, (own, mix) in enumerate(zip(channels, mixes, strict=True)):
        bench.W_Q[own, h * bench.d_head : (h + 1) * bench.d_head] = mix
    return channels


@pytest.mark.parametrize("name", ["identity", "select"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_mix_of_channels_is_expressed(shape, name, monkeypatch):
    """W_Q^h = S_h M for any invertible M, with a query bias: exact but for the damping of the bias."""
    bench = bench_of(shape)
    channels = expressible(bench, name)
    start = bench.start(name)
    if name == "select":
        assert start.query["index"].dtype == torch.int32
        assert start.query.keys() == {"index", "bias"}
        found = start.query["index"].view(bench.n_heads, -1)
        assert [set(own.tolist()) for own in found] == [set(own.tolist()) for own in channels]
    else:
        assert not start.query
    assert start.b_K is None
    assert start.norm_gain is None
    assert (start.norm_shift is None) == (name == "select")
    assert bench.kl(name, start) < 0.02
    monkeypatch.setattr(free_keys, "DAMPING", 1e-10)
    exact = bench.start(name)
    assert bench.kl(name, exact) < 1e-6
    bias = exact.norm_shift if name == "identity" else exact.query["bias"]
    with torch.no_grad():
        bias += 0.3
    assert bench.kl(name, exact) > 1e-4


def test_a_start_that_cannot_express_the_teacher_is_not_exact(monkeypatch):
    """The bounds above can fail, also without damping."""
    monkeypatch.setattr(free_keys, "DAMPING", 1e-10)
    bench = bench_of({})
    for name in ("identity", "select", "low-rank:3"):
        assert bench.kl(name, bench.start(name)) > 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_low_rank_at_full_rank_is_W_Q(shape):
    """Whatever the gauge, and with its bias."""
    bench = bench_of(shape)
    change_gauge(bench, random_changes(bench, 20.0))
    start = bench.start(f"low-rank:{bench.d_model}")
    assert start.query.keys() == {"gain", "down", "up", "bias"}
    assert bench.kl(f"low-rank:{bench.d_model}", start) < 1e-10
    start.query["bias"].zero_()
    assert bench.kl(f"low-rank:{bench.d_model}", start) > 1e-3


# The gauge: queries times N and keys times N⁻ᵀ are the same attention


@pytest.mark.parametrize("name, spread", [("identity", 20.0), ("select", 20.0), ("low-rank:3", 1.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_start_does_not_depend_on_the_gauge(shape, name, spread):
    bench = bench_of(shape)
    before = bench.start(name)
    kl, teacher = bench.kl(name, before), bench.teacher
    change_gauge(bench, random_changes(bench, spread))
    assert not torch.allclose(bench.teacher[0], teacher[0], atol=0.1)
    torch.testing.assert_close(bench.teacher[0] @ bench.teacher[1].mT, teacher[0] @ teacher[1].mT, rtol=1e-9, atol=1e-9)
    after = bench.start(name)
    assert bench.kl(name, after) == pytest.approx(kl, rel=1e-5)
    if name == "select":
        assert torch.equal(after.query["index"], before.query["index"])


def test_without_the_keys_weights_it_does(monkeypatch):
    """The check above can fail: errors that are not weighed by the keys belong to one gauge."""
    monkeypatch.setattr(select, "roots", lambda grams: torch.eye(8, dtype=torch.float64).expand(4, 8, 8))
    bench = bench_of({})
    before = bench.start("select").query["index"]
    kl = bench.kl("select", bench.start("select"))
    change_gauge(bench, random_changes(bench, 20.0))
    after = bench.start("select")
    assert not torch.equal(after.query["index"], before)
    assert bench.kl("select", after) > 1.05 * kl


# Errors weighed by the keys


def key_roots(W_K, C_k):
    """Roots of the keys' covariance W_Kᵀ C_k W_K; C_k is (H, D, D)."""
    keys = per_head(W_K, len(C_k))
    return roots(keys.mT @ C_k.to(W_K.dtype) @ keys)


def test_key_roots_are_roots_of_the_keys_covariance():
    bench = bench_of({})
    spread = bench.normal(4, 32, 32)
    C_k = spread @ spread.mT
    found = key_roots(bench.W_K, C_k)
    for h, L in enumerate(found):
        K = bench.W_K[:, 8 * h : 8 * h + 8]
        torch.testing.assert_close(L @ L.T, K.T @ C_k[h] @ K, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(L @ L.T, K.T @ C_k[h - 1] @ K, rtol=0.1)


def test_a_head_whose_keys_are_zero_is_no_trouble():
    """Heads are pruned by zeroing them: their attention is even, whatever the queries."""
    for name in ("identity", "select", "low-rank:3", "key-shared"):
        bench = bench_of({})
        bench.W_K[:, :8] = 0.0
        start = bench.start(name)
        assert all(tensor.isfinite().all() for tensor in (start.W_K, *start.query.values()))
        assert bench.kl(name, start) < bench.kl(name, replace(start, W_K=start.W_K.flip(0)))


def test_a_key_that_sees_few_directions_has_an_invertible_root():
    bench = bench_of({})
    bench.W_K[:, :4] = 0.0
    (L, *_) = key_roots(bench.W_K, torch.eye(32).expand(4, 32, 32))
    assert torch.linalg.cond(L) < 1e4


def test_channels_are_chosen_for_what_the_keys_see():
    """Half of a head's query directions are ten times larger, and its keys hardly see them."""
    bench = bench_of(dict(n_heads=2, d_head=16))
    drawn = torch.stack([torch.randperm(32, generator=bench.generator) for _ in range(2)])
    seen, unseen = drawn[:, :16], drawn[:, 16:]
    W_Q, W_K = torch.zeros(2, 32, 16).double(), bench.normal(2, 32, 16)
    for h in range(2):  # eight directions that sixteen channels make, two each, and eight of one channel each
        W_Q[h, seen[h], torch.arange(16) // 2] = 1.0
        W_Q[h, unseen[h, :8], torch.arange(8, 16)] = 10.0
    W_K[:, :, 8:] *= 1e-3
    C = torch.eye(32, dtype=torch.float64)
    W_Q, W_K = (W.transpose(0, 1).flatten(1) for W in (W_Q, W_K))
    found = choose_free(C, W_Q, key_roots(W_K, C.expand(2, 32, 32)))
    assert [set(own.tolist()) for own in found] == [set(own.tolist()) for own in seen]
    plain = choose_free(C, W_Q, torch.eye(16, dtype=torch.float64).expand(2, 16, 16))
    assert all(set(own.tolist()) >= set(large.tolist()) for own, large in zip(plain, unseen[:, :8], strict=True))


def test_a_bias_that_no_key_sees_is_not_chased(monkeypatch):
    """A teacher's bias in a direction that its keys do not see moves no channel; undamped, it would move them far."""
    sizes = []
    for damping in (free_keys.DAMPING, 1e-12):
        monkeypatch.setattr(free_keys, "DAMPING", damping)
        bench = bench_of({})
        expressible(bench, "identity")
        bench.W_K[:, 3] *= 1e-3
        bench.b_Q[3] = 1000.0
        start = bench.start("identity")
        assert bench.kl("identity", start) < 0.05
        sizes.append((start.norm_shift + bench.moments.student_mean)[:8].abs().max())
    assert sizes[0] < 10
    assert sizes[1] > 100


# Low-rank: queries turned towards the heads' slices


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_turned_queries_and_keys_give_the_same_logits(shape):
    bench = bench_of(shape)
    C, C_k = bench.moments.centred().student, bench.normal(bench.n_heads, bench.d_model, bench.d_model)
    W_Q, W_K, changes = near_slices(C, bench.W_Q, bench.W_K, key_roots(bench.W_K, C_k @ C_k.mT))
    torch.testing.assert_close(W_Q, changed(bench, bench.W_Q, changes), rtol=1e-9, atol=1e-9)
    expected = head_logits(bench, bench.W_Q, bench.W_K)
    torch.testing.assert_close(head_logits(bench, W_Q, W_K), expected, rtol=1e-9, atol=1e-9)
    assert (head_logits(bench, W_Q, bench.W_K) - expected).abs().max() > 0.1 * expected.abs().max()
    # the keys that are left are whitened: every turned query channel weighs alike in the logits
    keys = W_K.view(len(W_K), bench.n_heads, -1).transpose(0, 1)
    whitened = keys.mT @ (C_k @ C_k.mT) @ keys
    scale = whitened.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    torch.testing.assert_close(
        whitened / scale, torch.eye(bench.d_head).double().expand_as(whitened), rtol=0, atol=1e-6
    )


def test_no_rotation_brings_the_queries_nearer_to_their_slices():
    """Among rotations in the keys' whitened coordinates, each channel taken to unit rms."""
    bench = bench_of({})
    C = bench.moments.centred().student
    rms = C.diagonal().sqrt()
    W_Q, _, _ = near_slices(C, bench.W_Q, bench.W_K, key_roots(bench.W_K, C.expand(4, 32, 32)))

    def nearness(W):
        """Sum over query channels of the covariance with the slice's own channel, of unit rms."""
        return ((C @ W) / rms[:, None]).diagonal().unflatten(0, (4, 8)).sum(1)

    best = nearness(W_Q)
    for spread in (0.01, 0.1, 1.0, 10.0):
        for _ in range(20):
            generators = spread * bench.normal(4, 8, 8)
            rotations = torch.linalg.matrix_exp(generators - generators.mT)
            assert (nearness(changed(bench, W_Q, rotations)) < best + 1e-9).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_turning_lets_a_low_rank_map_hold_more(seed):
    bench = bench_of({}, seed)
    expressible(bench, "identity")
    found = bench.kl("low-rank:3", bench.start("low-rank:3"))
    moments = bench.moments
    mean, query = moments.student_mean, factors(moments.centred(), bench.W_Q, 3)
    query["bias"] = mean @ bench.W_Q + bench.b_Q - mean * query["gain"] - query["up"] @ (query["down"] @ mean)
    assert found < 0.7 * bench.kl("low-rank:3", QueryKeyParams(bench.W_K, query))


def test_the_bias_of_key_shared_is_in_the_new_keys_coordinates():
    """The mean query of head h is q Nᵀ where x̂ W' N is nearest to x̂ W_K under the teacher's attention."""
    bench = bench_of({})
    problem = bench.problem("key-shared")
    attended = problem.key_moments.double()
    start = key_shared.init_without_rope(problem, parse_query_map("key-shared"), torch.Generator().manual_seed(0))
    mean = problem.moments.student_mean
    wanted = (mean @ bench.W_Q + bench.b_Q).view(bench.n_heads, -1)
    for h, own in enumerate(torch.arange(32).view(bench.n_heads, -1)):
        root = torch.linalg.cholesky(attended[h]).mT
        N = torch.linalg.lstsq(root @ start.W_K[:, own], root @ bench.W_K[:, own]).solution
        query = mean @ start.W_K[:, own] @ start.query["mix"][h] + start.query["bias"][own]
        torch.testing.assert_close(query, wanted[h] @ N.T, rtol=0.01, atol=0.01)
