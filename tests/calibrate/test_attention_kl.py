"""The loss of the fit is the KL that it says it is, and its hand-written gradient is that KL's."""

import pytest
import torch
from attention_bench import reference_kl
from hypothesis import given
from hypothesis import strategies as st

from qectomy.calibrate.attention_kl import BLOCK_LOGITS, MeanAttentionKL, attention_kl, attention_logits, row_blocks

SHAPES = [(4, 4), (4, 2), (6, 2), (4, 1)]  # (n_heads, n_kv_heads)


def draw(heads, groups, windows=3, rows=5, positions=9, width=4, seed=0, dtype=torch.float64):
    """Queries and keys of a teacher and of a student."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(windows, heads, rows, width), (windows, groups, positions, width)]
    return [tuple(torch.randn(s, generator=generator, dtype=dtype) for s in shapes) for _ in range(2)]


def causal(rows, positions, window=None):
    """The last `rows` rows of a causal mask over `positions`."""
    distance = torch.arange(positions)[-rows:, None] - torch.arange(positions)
    return (distance >= 0) & (distance < (window or positions))


@pytest.mark.parametrize("heads, groups", SHAPES)
@pytest.mark.parametrize("window", [None, 3])
def test_values_match_the_formula(heads, groups, window):
    teacher, student = draw(heads, groups)
    allowed = causal(5, 9, window)
    found = attention_kl(teacher, student, allowed)
    torch.testing.assert_close(found.double(), reference_kl(teacher, student, allowed), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads, groups", SHAPES)
@pytest.mark.parametrize("window", [None, 3])
def test_gradient_is_that_of_the_weighted_mean(heads, groups, window):
    teacher, student = draw(heads, groups)
    allowed = causal(5, 9, window)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64).view(-1, 1, 1, 1)
    leaves = [tensor.requires_grad_() for tensor in student]
    expected = torch.autograd.grad((reference_kl(teacher, student, allowed) * weight[..., 0]).mean(), leaves)

    found = torch.autograd.grad(3.0 * MeanAttentionKL.apply(*student, teacher, allowed, weight), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.abs().max() > 1e-3
        torch.testing.assert_close(ours, 3.0 * theirs, rtol=1e-10, atol=1e-12)


def test_gradient_is_zero_where_both_agree():
    teacher, _ = draw(4, 2)
    allowed = causal(5, 9)
    leaves = [tensor.clone().requires_grad_() for tensor in teacher]
    gradient = torch.autograd.grad(MeanAttentionKL.apply(*leaves, teacher, allowed, torch.ones(3, 1, 1, 1)), leaves)
    assert max(float(g.abs().max()) for g in gradient) < 1e-15


def test_masked_positions_carry_no_weight_and_no_gradient():
    teacher, (query, key) = draw(4, 2)
    allowed = causal(5, 9, 3)
    hidden = ~allowed.any(0)
    assert hidden.any()
    changed = key.clone()
    changed[:, :, hidden] += 100.0
    before = attention_kl(teacher, (query, key), allowed)
    assert torch.equal(before, attention_kl(teacher, (query, changed), allowed))
    key.requires_grad_()
    (gradient,) = torch.autograd.grad(
        MeanAttentionKL.apply(query.requires_grad_(), key, teacher, allowed, torch.ones(3, 1, 1, 1)), [key]
    )
    assert (gradient[:, :, hidden] == 0).all()
    assert (gradient[:, :, ~hidden] != 0).any()


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(0.05, 5.0))
def test_zero_for_equal_attention_and_positive_otherwise(seed, scale):
    (query, key), (noise, shift) = draw(4, 2, windows=1, seed=seed, dtype=torch.float32)
    allowed = causal(5, 9)
    same = attention_kl((query, key), (query.clone(), key.clone()), allowed)
    assert (same == 0).all()
    # A vector added to all keys of a group shifts every logit of a row alike: softmax does not see it.
    shifted = attention_kl((query, key), (query, key + shift[:, :, :1]), allowed)
    assert shifted.abs().max() < 1e-4
    other = attention_kl((query, key), (query + scale * noise, key), allowed)
    assert other.min() > -1e-5
    assert other.mean() > 1e-5


def test_half_precision_masks_without_overflow():
    teacher, _ = draw(2, 1, dtype=torch.float16)
    logits = attention_logits(*teacher, causal(5, 9))
    assert torch.isfinite(logits).all()
    assert (logits.softmax(-1)[:, :, ~causal(5, 9)] == 0).all()


@pytest.mark.parametrize("window", [None, 3, 90])
@pytest.mark.parametrize("stride", [1, 4])
@pytest.mark.parametrize("copies", [1, 200])
def test_row_blocks_miss_no_key(window, stride, copies):
    """Every allowed pair lies in one block, and no block is large; early ones leave late keys out, late ones early."""
    allowed = causal(300, 300, window)[stride - 1 :: stride]
    covered = torch.zeros_like(allowed, dtype=torch.int64)
    for rows, keys in row_blocks(allowed, copies):
        covered[rows, keys] += 1
        assert covered[rows, keys].numel() * copies <= 1.1 * BLOCK_LOGITS
    assert covered.max() == 1
    assert (covered[allowed] == 1).all()
    assert covered.float().mean() < 0.8


@pytest.mark.parametrize("window", [None, 40, 100])
def test_values_and_gradient_where_blocks_leave_keys_out(window):
    """130 and 200 positions: more than one block's keys, and not a multiple of what their number is rounded to."""
    for positions in (130, 200):
        teacher, student = draw(4, 2, windows=2, rows=positions // 2, positions=positions)
        allowed = causal(positions, positions, window)[1::2]
        assert len({(keys.start, keys.stop) for _, keys in row_blocks(allowed, 8)}) > 1
        leaves = [tensor.requires_grad_() for tensor in student]
        expected = reference_kl(teacher, student, allowed)
        found = attention_kl(teacher, student, allowed)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
        theirs = torch.autograd.grad(expected.mean(), leaves)
        weight = torch.ones(2, 1, 1, 1, dtype=torch.float64)
        ours = torch.autograd.grad(MeanAttentionKL.apply(*student, teacher, allowed, weight), leaves)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
