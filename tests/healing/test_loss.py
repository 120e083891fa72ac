"""The fused loss against plain autograd over whole logits, and how much of them it holds."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from torch.utils._python_dispatch import TorchDispatchMode

from qectomy.healing import loss as loss_module
from qectomy.healing.loss import head_loss, hidden_loss

N, D, E, V = 23, 6, 5, 41


@pytest.fixture
def few_rows(monkeypatch):
    """Let the loss take 4 tokens at a time, the last time fewer."""
    monkeypatch.setitem(loss_module.ROW_NUMBERS, "cpu", 4 * V)


def case(dtype=torch.float64, seed=0):
    """Return states, head, teacher's states and head, and the tokens that came next."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((N, D), (V, D), (N, E), (V, E))
    states, head, theirs, their_head = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    parts = (states.to(dtype), head.to(dtype), theirs.to(dtype), 1.5 * their_head.to(dtype))
    return (*parts, torch.randint(V, (N,), generator=g))


def plain(states, head, theirs, their_head, targets, w):
    """The same by whole logits: mean loss, and KL and negative log-likelihood of each token."""
    s, t = (states @ head.T).log_softmax(-1), (theirs @ their_head.T).log_softmax(-1)
    kl = kl_div(s, t, reduction="none", log_target=True).sum(-1)
    nll = cross_entropy(states @ head.T, targets, reduction="none")
    return ((1 - w) * kl + w * nll).mean(), kl, nll


def gradients(function, states, head, *others, scale=1.0, frozen=()):
    leaves = [x.detach().clone().requires_grad_(i not in frozen) for i, x in enumerate((states, head))]
    found = function(*leaves, *others)
    (scale * found[0]).backward()
    return found, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("w", [0.0, 1.0, 0.3], ids=["kl", "ce", "mixed"])
@pytest.mark.parametrize("scale", [1.0, -3.5])
def test_loss_and_gradients_are_those_of_whole_logits(few_rows, dtype, w, scale):
    given = case(dtype)
    found, ours = gradients(head_loss, *given, w, scale=scale)
    wanted, theirs = gradients(plain, *case(), w, scale=scale)
    for name, a, b in zip(("loss", "kl", "nll"), found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=3e-6, atol=3e-6, msg=name)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_the_same_in_one_piece_and_row_by_row(monkeypatch):
    given, found = case(torch.float32), []
    for numbers in (10**6, 1):
        monkeypatch.setitem(loss_module.ROW_NUMBERS, "cpu", numbers)
        found.append(gradients(head_loss, *given, 0.3))
    for a, b in zip(*((*values, *grads) for values, grads in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_each_tokens_numbers_are_finite_and_carry_no_gradient():
    states, head, *others = case(torch.float32)
    _, kl, nll = head_loss(states.requires_grad_(), head, *others)
    assert kl.shape == nll.shape == (N,)
    assert not kl.requires_grad
    assert not nll.requires_grad
    assert (kl > 0).all()


def test_a_student_like_its_teacher_has_no_loss_and_no_gradient():
    states, head, _, _, targets = case(torch.float32)
    (loss, _, _), grads = gradients(head_loss, states, head, states, head, targets, 0.0)
    assert abs(loss.detach()).item() < 1e-6
    assert all(grad.abs().max() < 1e-6 for grad in grads)


class Sizes(TorchDispatchMode):
    """The shapes of all tensors that are made."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes += [
            tuple(x.shape) for x in (out if isinstance(out, tuple | list) else [out]) if hasattr(x, "shape")
        ]
        return out


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_part_gets_no_gradient_and_costs_nothing(few_rows, frozen):
    given = case(torch.float32)
    with Sizes() as seen:
        loss, _, _ = head_loss(
            *(x.clone().requires_grad_(i == 1 - frozen) for i, x in enumerate(given[:2])), *given[2:]
        )
        before = len(seen.shapes)
        loss.backward()
    _, ours = gradients(head_loss, *given, frozen=(frozen,))
    _, theirs = gradients(plain, *given, 0.0)
    assert ours[frozen] is None
    torch.testing.assert_close(ours[1 - frozen], theirs[1 - frozen], rtol=1e-4, atol=1e-6)
    shape = tuple(given[frozen].shape)
    assert seen.shapes[2:before].count(shape) == 0, "a gradient that nobody asked for"


def test_nothing_to_train_makes_no_gradient(few_rows):
    """As in a validation: not even the products of the gradient."""
    given = case(torch.float32)
    with Sizes() as seen:
        found = head_loss(*given, 0.3)
    assert not {(N, D), (V, D)} & set(seen.shapes)
    for a, b in zip(found, plain(*given, 0.3), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_no_more_logits_are_held_than_a_few_rows(few_rows):
    given = case(torch.float32)
    with Sizes() as seen:
        gradients(head_loss, *given, 0.3)
    wide = {shape[0] for shape in seen.shapes if len(shape) == 2 and shape[1] == V}
    assert wide == {4, N % 4, D, E}  # D and E: the heads, transposed
    with Sizes() as seen:
        gradients(plain, *given, 0.3)
    assert (N, V) in seen.shapes


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32(few_rows):
    given = case(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        (loss, kl, nll), ours = gradients(head_loss, *given, 0.3)
    (wanted, their_kl, their_nll), theirs = gradients(plain, *given, 0.3)
    assert loss.dtype == kl.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=1e-2, atol=1e-3)
    assert not torch.equal(loss, wanted)
    assert 1e-5 < float((nll - their_nll.detach()).abs().max()) < 0.1
    assert float((kl - their_kl.detach()).abs().max()) < 0.1
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == torch.float32
        assert 1e-5 < float((a - b).norm() / b.norm()) < 0.02


def test_autocast_is_left_as_it_was():
    with torch.autocast("cpu", torch.bfloat16):
        head_loss(*case(torch.float32))
        assert torch.is_autocast_enabled("cpu")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


# Hidden states


def layers(seed, count=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [(1 + i) * torch.randn(2, 7, D, generator=g, dtype=dtype) for i in range(count)]


@pytest.mark.parametrize("turned", [False, True])
def test_hidden_loss_is_the_mean_of_relative_errors(turned):
    ours, theirs = layers(0), layers(1)
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))[0] * 1.3 if turned else None
    found = hidden_loss(ours, theirs, basis)
    wanted = []
    for a, b in zip(ours, theirs, strict=True):
        b = b.double() if basis is None else torch.einsum("btd,de->bte", b.double(), basis.double())
        wanted.append(((a.double() - b) ** 2).sum() / (b**2).sum())
    assert float(found) == pytest.approx(float(sum(wanted) / 3), rel=1e-5)


def test_hidden_loss_of_the_same_stream_is_zero_and_its_gradient_reaches_each_layer():
    theirs = layers(1)
    assert float(hidden_loss(theirs, theirs)) == 0.0
    ours = [x.requires_grad_() for x in layers(0)]
    hidden_loss(ours, theirs).backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, 2 * (a.detach() - b) / (b.square().sum() * 3), rtol=1e-4, atol=1e-7)


def test_hidden_loss_of_bfloat16_states_is_taken_in_float32():
    ours, theirs = ([x.bfloat16() for x in layers(seed)] for seed in (0, 1))
    found = hidden_loss(ours, theirs)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(
        float(hidden_loss(*([x.float() for x in y] for y in (ours, theirs)))), rel=1e-6
    )
