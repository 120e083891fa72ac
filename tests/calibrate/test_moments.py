"""Ridge regression against the formula, and what it may and may not use up."""

import pytest
import torch

from qectomy.calibrate.moments import COLUMNS, ridge, ridge_


def problem(n, *columns, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    root = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
    return (root @ root.T / n).to(dtype), torch.randn(n, *columns, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("columns", [(), (1,), (7,), (COLUMNS + 3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ridge_solves_its_normal_equations(columns, dtype):
    gram, target = problem(12, *columns, dtype=dtype)
    before = gram.clone(), target.clone()
    found = ridge(gram, target, 0.3)
    assert torch.equal(gram, before[0])
    assert torch.equal(target, before[1])
    assert (found.dtype, found.shape) == (dtype, target.shape)
    loaded = gram.double() + 0.3 * gram.double().diagonal().mean() * torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(found.double(), torch.linalg.inv(loaded) @ target.double(), rtol=1e-5, atol=1e-6)


def test_in_place_gives_the_same_and_leaves_the_factors_where_the_matrix_lay():
    gram, target = problem(12, 5)
    loaded = gram + 0.3 * gram.diagonal().mean() * torch.eye(12, dtype=torch.float64)
    expected = ridge(gram, target, 0.3)
    assert torch.equal(ridge_(gram, target, 0.3), expected)
    torch.testing.assert_close(gram.mT, torch.linalg.lu_factor(loaded)[0])


def test_targets_laid_out_by_columns_are_read_right():
    gram, target = problem(12, 5)
    turned = target.T.contiguous().T
    torch.testing.assert_close(ridge(gram, turned, 0.3), ridge(gram, target, 0.3), rtol=0, atol=0)
