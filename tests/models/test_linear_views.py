"""Views read and store the logical projections of every layout; a wrong orientation or part shows."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_model
from transformers.pytorch_utils import Conv1D

from qectomy.models.architectures import FAMILIES
from qectomy.models.family import LinearView, Orientation
from qectomy.models.linear_views import oriented, read_view, store_views

IN_OUT, OUT_IN = Orientation.IN_OUT, Orientation.OUT_IN
D = 6


def other(view):
    """The same view, turned over."""
    return replace(view, orientation=OUT_IN if view.orientation is IN_OUT else IN_OUT)


def fused(orientation, parts, bias, width=4):
    """Views of a fused projection, and random projections (D, width) to lie in it."""
    generator = torch.Generator().manual_seed(parts)
    views = [LinearView("attn.fused", orientation, (i, parts)) for i in range(parts)]
    pairs = [
        (torch.randn(D, width, generator=generator), torch.randn(width, generator=generator) if bias else None)
        for _ in views
    ]
    return list(zip(views, pairs, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("orientation", list(Orientation))
def test_what_is_stored_reads_back(orientation, parts, bias):
    made = fused(orientation, parts, bias)
    before = [W.clone() for _, (W, _) in made]
    tensors = store_views(made[::-1])  # in whatever order they come
    assert tensors.keys() == {"attn.fused.weight", *(["attn.fused.bias"] if bias else [])}
    out = 4 * parts
    assert tensors["attn.fused.weight"].shape == ((D, out) if orientation is IN_OUT else (out, D))
    assert all(tensor.is_contiguous() for tensor in tensors.values())  # as safetensors wants them
    for (view, (W, b)), original in zip(made, before, strict=True):
        found, found_bias = read_view(tensors, view)
        assert torch.equal(found, W)
        assert torch.equal(W, original)
        assert (found_bias is None) == (not bias)
        if bias:
            assert torch.equal(found_bias, b)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("orientation", list(Orientation))
def test_the_module_computes_what_the_view_says(orientation, parts):
    """x W + b of every part is that part of what torch's Linear or GPT-2's Conv1D gives with the stored tensors."""
    made = fused(orientation, parts, bias=True)
    module = Conv1D(4 * parts, D) if orientation is IN_OUT else torch.nn.Linear(D, 4 * parts)
    module.load_state_dict({n.removeprefix("attn.fused."): t for n, t in store_views(made).items()}, strict=True)
    x = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        given = module(x).unflatten(-1, (parts, 4))
    for i, (_, (W, b)) in enumerate(made):
        torch.testing.assert_close(given[:, :, i], x @ W + b)


@pytest.mark.parametrize("orientation", list(Orientation))
def test_a_square_projection_turned_over_is_another(orientation):
    """A square matrix passes every shape check either way; only what it computes tells."""
    ((view, (W, _)),) = fused(orientation, 1, bias=False, width=D)
    tensors = store_views([(view, (W, None))])
    wrong, _ = read_view(tensors, other(view))
    assert wrong.shape == W.shape
    assert torch.equal(wrong, W.T)
    assert not torch.allclose(wrong, W, atol=0.1)
    assert torch.equal(oriented(oriented(W, view), view), W)


@pytest.mark.parametrize("orientation", list(Orientation))
def test_a_fused_projection_turned_over_is_cut_across_its_inputs(orientation):
    made = fused(orientation, 3, bias=False)
    tensors = store_views(made)
    for view, (W, _) in made:
        found, _ = read_view(tensors, other(view))
        assert found.shape != W.shape


def test_reading_copies_nothing():
    ((view, (W, _)),) = fused(OUT_IN, 1, bias=False)
    tensors = store_views([(view, (W, None))])
    read_view(tensors, view)[0][0, 0] = 7.0
    assert tensors["attn.fused.weight"][0, 0] == 7.0


def test_a_fused_projection_is_stored_whole_or_not_at_all():
    made = fused(IN_OUT, 3, bias=True)
    for wrong in (made[:2], made[1:], [made[0], made[0], made[2]], made + made[2:]):
        with pytest.raises(AssertionError, match=r"attn\.fused"):
            store_views(wrong)


def test_several_modules_at_once():
    one, two = fused(IN_OUT, 2, bias=True), fused(OUT_IN, 1, bias=False)
    two = [(replace(view, module="attn.other"), pair) for view, pair in two]
    tensors = store_views([one[1], *two, one[0]])
    assert tensors.keys() == {"attn.fused.weight", "attn.fused.bias", "attn.other.weight"}
    assert torch.equal(read_view(tensors, one[0][0])[0], one[0][1][0])
    assert torch.equal(read_view(tensors, two[0][0])[0], two[0][1][0])


@pytest.mark.parametrize("name", ["gpt2", "gpt2-one-head", "biases", "wide-heads"])
def test_the_roles_of_a_family_are_those_of_its_layers(name):
    """Every view's x W + b is its share of what the stock layer's module gives; turned over, it is not."""
    model, gpt2 = tiny_model(name).double(), name.startswith("gpt2")
    block = model.transformer.h[0] if gpt2 else model.model.layers[0]
    state, roles = block.state_dict(), FAMILIES["gpt2" if gpt2 else "llama"].roles
    views = [roles.query, roles.key, roles.value, roles.output, *roles.mlp_readers, roles.mlp_out]
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for view in views:
        W, b = read_view(state, view)
        seen, (index, parts) = x[..., : len(W)], view.part
        with torch.no_grad():
            expected = block.get_submodule(view.module)(seen).chunk(parts, -1)[index]
        torch.testing.assert_close(seen @ W + (0 if b is None else b), expected, rtol=1e-12, atol=1e-12, msg=str(view))
        wrong, _ = read_view(state, other(view))
        assert wrong.shape != W.shape or (seen @ wrong - seen @ W).abs().max() > 0.1, view
