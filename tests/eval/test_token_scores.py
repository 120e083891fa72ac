"""Scores from slices of the vocabulary are those of the whole row in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qectomy.eval import token_scores as module
from qectomy.eval.token_scores import TokenScores, join_scores, score_tokens


def draw(n, vocab, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (scale * torch.randn(n, vocab, generator=generator) for _ in range(2))
    return ours, theirs, torch.randint(vocab, (n,), generator=generator)


def sliced(logits):
    return lambda start, stop: logits[:, start:stop]


def check(ours, theirs, targets, atol=1e-5):
    found = score_tokens(sliced(ours), targets, ours.shape[1], sliced(theirs))
    s, t = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    close = dict(rtol=1e-5, atol=atol)
    torch.testing.assert_close(found.nll, -s.gather(1, targets[:, None])[:, 0], **close)
    torch.testing.assert_close(found.kl, (t.exp() * (t - s)).sum(-1), **close)
    assert torch.equal(found.agree, (ours.argmax(-1) == theirs.argmax(-1)).double())
    assert found.nll.dtype == found.kl.dtype == torch.float64
    alone = score_tokens(sliced(ours), targets, ours.shape[1])
    assert torch.equal(alone.nll, found.nll)
    assert alone.kl is None
    assert alone.agree is None


@given(
    vocab=st.integers(1, 70),
    size=st.integers(1, 80),
    n=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
)
def test_any_vocabulary_and_any_slice(vocab, size, n, seed, scale):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SLICE", size)
        check(*draw(n, vocab, seed, scale), atol=1e-5 * max(1.0, scale))


def test_a_vocabulary_of_several_real_slices():
    check(*draw(3, 2 * module.SLICE + 123))


@pytest.mark.parametrize("shift", [-1e4, 500.0, 1e4])
def test_a_large_shift_of_all_logits_changes_little(shift):
    """Log-sum-exp with the running maximum taken out: no overflow, and only float32's rounding of the logits."""
    ours, theirs, targets = draw(4, 30)
    check(ours + shift, theirs - shift, targets, atol=2e-2)


def test_one_logit_far_above_the_rest_in_any_slice(monkeypatch):
    monkeypatch.setattr(module, "SLICE", 7)
    for peak in (0, 6, 7, 29):
        ours, theirs, targets = draw(4, 30)
        ours[:, peak] += 200.0
        theirs[:, 29 - peak] += 200.0
        check(ours, theirs, targets, atol=1e-3)


def test_equal_models_have_no_divergence_and_agree():
    ours, _, targets = draw(50, 100)
    found = score_tokens(sliced(ours), targets, 100, sliced(ours.clone()))
    assert found.kl.abs().max() < 1e-12
    assert (found.agree == 1).all()


def test_agreement_counts_equal_first_choices():
    ours = torch.tensor([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    theirs = torch.tensor([[0.0, 9.0, 1.0], [0.0, 0.5, 0.1]])
    found = score_tokens(sliced(ours), torch.tensor([0, 0]), 3, sliced(theirs))
    assert found.agree.tolist() == [1.0, 0.0]


def test_half_precision_logits_are_taken_to_float32():
    ours, theirs, targets = draw(4, 30)
    check(ours.bfloat16().float(), theirs.bfloat16().float(), targets)
    found = score_tokens(sliced(ours.bfloat16()), targets, 30)
    expected = score_tokens(sliced(ours.bfloat16().float()), targets, 30)
    assert torch.equal(found.nll, expected.nll)


def test_nan_logits_show():
    ours, _, targets = draw(4, 30)
    ours[2, 11] = torch.nan
    assert torch.isfinite(score_tokens(sliced(ours), targets, 30).nll).tolist() == [True, True, False, True]


def test_joining_batches():
    ours, theirs, targets = draw(10, 20)
    whole = score_tokens(sliced(ours), targets, 20, sliced(theirs))
    parts = [
        score_tokens(sliced(ours[i:j]), targets[i:j], 20, sliced(theirs[i:j])) for i, j in ((0, 1), (1, 7), (7, 10))
    ]
    joined = join_scores(parts)
    for name in ("nll", "kl", "agree"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    assert join_scores([TokenScores(torch.zeros(2)), TokenScores(torch.ones(1))]).kl is None
