"""Refinement lowers the attention KL of every start, and does the same thing twice."""

import math
from dataclasses import replace

import pytest
import torch
from attention_bench import AttentionBench

from qectomy.calibrate.few_steps import few_steps
from qectomy.calibrate.preconditioning import Preconditioned, adam

MAPS = ["identity", "select", "key-shared", "low-rank:3"]
SHAPES = {
    "gqa": dict(),
    "mha": dict(n_kv_heads=4),
    "mqa": dict(n_kv_heads=1),
    "bias": dict(bias=True),
    "mqa-bias": dict(n_kv_heads=1, bias=True),
    "sliding-window": dict(window=5),
    "wide-heads": dict(d_head=12),  # more query channels than the model is wide
    "narrow-heads": dict(d_head=6, bias=True),
    "one-window": dict(n_windows=1),
    "gpt2": dict(gpt2=True),
    "gpt2-odd-heads": dict(gpt2=True, d_head=5),
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kl_goes_down(name, shape):
    bench = AttentionBench(**SHAPES[shape])
    start = bench.start(name)
    before = {key: tensor.clone() for key, tensor in start.query.items()}
    found = bench.refined(name, start)
    assert bench.kl(name, found) < 0.95 * bench.kl(name, start)
    assert (found.b_K is None) == (not bench.bias or bench.gpt2)
    assert found.query.keys() == start.query.keys()
    for key, tensor in before.items():
        assert torch.equal(start.query[key], tensor)  # the start is left alone
        assert found.query[key].shape == tensor.shape
    moved = {"mix", "gain", "down", "up", "bias"} & before.keys()
    assert all(not torch.equal(found.query[key].double(), before[key].double()) for key in moved)
    for shared in ("norm_gain", "norm_shift"):
        theirs, ours = getattr(start, shared), getattr(found, shared)
        assert (ours is None) == (theirs is None) == (name != "identity" or bench.gpt2 == (shared == "norm_gain"))
        assert theirs is None or not torch.equal(ours, theirs.float())
    if name == "select":
        assert torch.equal(found.query["index"], before["index"])


@pytest.mark.parametrize("name", MAPS)
def test_the_same_seed_gives_the_same_fit(name):
    bench = AttentionBench(bias=True)
    runs = [bench.refined(name, bench.start(name, seed=5), seed, steps=8) for seed in (3, 3, 4)]
    tensors = [{"W_K": found.W_K, "gain": found.norm_gain, "b_K": found.b_K, **found.query} for found in runs]
    for key, first in tensors[0].items():
        if first is not None:
            assert torch.equal(first, tensors[1][key]), key
    assert not torch.equal(tensors[0]["W_K"], tensors[2]["W_K"])


@pytest.mark.parametrize("pull", [1.0, -1.0])
def test_the_gain_of_identity_stays_away_from_zero(pull):
    """W_K and W_V are divided by it. However hard the loss pulls, it keeps its sign and its size within the bound."""
    bench = AttentionBench()
    start = bench.start("identity")
    assert start.norm_gain.abs().min() > 0.05 * start.norm_gain.abs().mean()
    wrong = replace(start, norm_gain=start.norm_gain * 20.0**pull)  # the best gain lies beyond the bound
    found = bench.refined("identity", wrong, steps=150, lr_gain=0.3, max_gain_change=3.0)
    ratio = found.norm_gain / wrong.norm_gain.float()
    assert ratio.min() > 1 / 3.001
    assert ratio.max() < 3.001
    assert (ratio.log() * -pull).max() > 1.0  # it did come near the bound


def test_no_step_is_no_change(monkeypatch):
    monkeypatch.setattr("qectomy.calibrate.refine.adam", lambda *_, **__: None)
    bench = AttentionBench(bias=True)
    start = bench.start("low-rank:3")
    found = bench.refined("low-rank:3", start)
    assert torch.equal(found.W_K, start.W_K.float())
    assert torch.equal(found.b_K, bench.b_K.float())
    assert all(torch.equal(found.query[key], start.query[key].float()) for key in start.query)


def test_the_answer_is_a_rest_point():
    """Fitted from the teacher's own projections as a low-rank map of full rank, there is next to nothing to gain."""
    bench = AttentionBench()
    start = bench.start("low-rank:3")
    U, S, V = torch.linalg.svd(bench.W_Q)
    exact = replace(
        start,
        W_K=bench.W_K,
        query={"gain": torch.zeros(32).double(), "down": (U * S).T.contiguous(), "up": V.T.contiguous()},
    )
    assert bench.kl("low-rank:3", exact) < 1e-10
    found = bench.refined("low-rank:32", exact, steps=20)
    assert bench.kl("low-rank:3", found) < 0.02


@pytest.mark.parametrize("taken, moved", [(1, 1 / 4), (2, 1 / 4 + 2 / 4 * 0.5 * (1 + math.cos(math.pi / 10)))])
def test_adam_warms_up_and_decays(taken, moved):
    """Under one gradient every step of Adam is its rate, whatever the gradient's size."""
    slope = torch.tensor([1e-6, -3.0, 2e4])
    parameter = Preconditioned(torch.ones(3), lambda u: 2 * u, 0.1)
    with few_steps(taken):
        adam([parameter], lambda values: [(slope * values[0]).sum()], steps=10, warmup=4, betas=(0.9, 0.95))
    torch.testing.assert_close(parameter.value().detach(), 1 - 2 * 0.1 * moved * slope.sign(), rtol=1e-5, atol=1e-6)
