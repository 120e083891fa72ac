"""all_finite sees one bad entry, wherever it stands and whatever the type."""

import pytest
import torch

from qectomy.checkpoint.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 7, 14])
def test_one_bad_entry(dtype, bad, place):
    tensor = torch.linspace(-3, 3, 15).to(dtype).view(3, 5)
    assert all_finite(tensor)
    tensor.view(-1)[place] = bad
    assert not all_finite(tensor)


def test_the_largest_numbers_and_no_number_at_all_are_finite():
    assert all_finite(torch.tensor([torch.finfo(torch.float32).max, torch.finfo(torch.float32).min]))
    assert all_finite(torch.empty(0, 3))


@pytest.mark.parametrize("place", [0, 123_456, 299_999])
def test_one_bad_entry_among_many_however_they_lie(place):
    tensor = torch.zeros(300, 1000)
    tensor.view(-1)[place] = float("nan")
    assert not all_finite(tensor)
    assert not all_finite(tensor.T)
    assert all_finite(torch.zeros(1, 1000).expand(300, 1000))
