"""The choice of what goes: pure functions against other formulas, and verdicts that name what stands in the way.

Dimensions: D d_model, H n_heads, K d_head; W_Q (D, H*K), as in x W.
"""

import numpy as np
import pytest
import torch
from foldings import fold, logits, relative, stored
from safetensors.torch import load_file
from tiny_models import save_variant, tiny_model, tokens, variant_model
from variant_reference import rotate

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.errors import NonFiniteError, QueryMapError
from qectomy.models.architectures import FAMILIES
from qectomy.surgery.basis import basis_fold, read_query, standing_fold
from qectomy.surgery.checkpoint import plan_exact
from qectomy.surgery.choice import choose_folds
from qectomy.surgery.layer import query_shift
from qectomy.surgery.streams import Group

TOLERANCE = 1e-9


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dims_of(family="llama", **fields):
    config = variant_model(family, **fields).config.to_dict()
    return FAMILIES[family].dimensions({**config, "model_type": f"qectomy_{family}"})


def diagonal_of(A):
    return torch.block_diag(*A)


@pytest.mark.parametrize("family, fields", [("gpt2", {}), ("llama", {}), ("llama", dict(head_dim=6))], ids=str)
def test_a_general_basis_makes_slices_of_the_queries(family, fields):
    """x Θ begins with x W_Q A, A is in the heads' gauge, and Θ⁻¹ undoes Θ."""
    dims = dims_of(family, norms=False, **fields)
    n_query = dims.n_heads * dims.d_head
    W, x = normal(32, n_query) * torch.linspace(0.2, 5, n_query, dtype=torch.float64), normal(2, 9, 32, seed=1)
    fold = basis_fold(W, dims, Group.GENERAL, TOLERANCE)
    theta, A = fold.basis.theta.numpy(), diagonal_of(fold.gauge)
    np.testing.assert_allclose(theta[:, :n_query], W.numpy() @ A.numpy(), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(theta @ fold.basis.inverse.numpy(), np.eye(32), atol=1e-9)
    assert fold.condition == pytest.approx(np.linalg.cond(theta), rel=1e-6)
    assert fold.condition < np.linalg.cond(W.numpy())  # which is what the gauge is chosen for
    if family == "llama":  # A passes RoPE, and heads that share a key share it
        q = x @ W
        torch.testing.assert_close(rotate(q @ A, dims.d_head, 500.0), rotate(q, dims.d_head, 500.0) @ A)
        assert torch.equal(fold.gauge[0], fold.gauge[1])
        assert not torch.equal(fold.gauge[1], fold.gauge[2])
    rest = theta[:, n_query:]  # the complement does not see what W_Q reads, and is no worse conditioned
    np.testing.assert_allclose(rest.T @ W.numpy(), 0, atol=1e-12)
    sizes = np.linalg.svd(theta[:, :n_query], compute_uv=False)
    assert ((np.linalg.norm(rest, axis=0) >= sizes[-1]) & (np.linalg.norm(rest, axis=0) <= sizes[0])).all()


def test_what_is_no_basis():
    dims = dims_of(norms=False)
    W = normal(32, 32)
    W[:, 3] = W[:, 17]
    assert basis_fold(W, dims, Group.GENERAL, TOLERANCE) is None
    W[:, [0, 4, 8, 12]] = 0  # the same pair of both heads that share a key
    assert basis_fold(W, dims, Group.GENERAL, TOLERANCE) is None
    assert basis_fold(normal(32, 48), dims_of(norms=False, head_dim=12), Group.GENERAL, TOLERANCE) is None


def turn(keeps_mean):
    noise = normal(32, 32, seed=5)
    if not keeps_mean:
        return torch.linalg.qr(noise)[0]
    B = torch.linalg.qr(torch.cat([torch.ones(32, 1).double(), noise[:, 1:]], 1))[0]
    return B @ torch.block_diag(torch.ones(1, 1).double(), torch.linalg.qr(noise[1:, 1:])[0]) @ B.T


def test_an_orthogonal_group_takes_turns_alone():
    dims = dims_of()
    scales = torch.linspace(0.5, 2, 8).double().view(2, 1, 1, 4).expand(-1, 2, 2, -1).flatten()
    fold = basis_fold(turn(False) * scales, dims, Group.ORTHOGONAL, TOLERANCE)
    torch.testing.assert_close(fold.basis.theta, turn(False), rtol=1e-12, atol=1e-12)
    assert torch.equal(fold.basis.inverse, fold.basis.theta.T)
    torch.testing.assert_close(fold.gauge.diagonal(dim1=1, dim2=2).flatten() * scales, torch.ones(32).double())
    for spoil in (1 + 1e-7, 1.5):
        bent = turn(False) * scales
        bent[:, 3] *= spoil
        assert basis_fold(bent, dims, Group.ORTHOGONAL, TOLERANCE) is None
        assert basis_fold(bent, dims, Group.ORTHOGONAL, 1.0) is not None  # where rounding could have done it


def test_a_group_that_keeps_the_mean():
    dims = dims_of("gpt2")
    for constant in (0.0, 0.7):
        W = turn(True) + constant * normal(1, 32)
        fold = basis_fold(W, dims, Group.ORTHOGONAL_KEEPING_MEAN, TOLERANCE)
        torch.testing.assert_close(fold.basis.theta, turn(True), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fold.basis.theta.sum(1), torch.ones(32).double(), rtol=1e-12, atol=1e-12)
        x = normal(5, 32, seed=8)
        x = x - x.mean(-1, keepdim=True)
        torch.testing.assert_close(x @ fold.basis.theta, x @ W, rtol=1e-12, atol=1e-12)
    assert basis_fold(turn(False), dims, Group.ORTHOGONAL_KEEPING_MEAN, TOLERANCE) is None
    assert basis_fold(1.01 * turn(True), dims, Group.ORTHOGONAL_KEEPING_MEAN, TOLERANCE) is None


@pytest.mark.parametrize("family, norms", [("gpt2", True), ("gpt2", False), ("llama", True), ("llama", False)])
@pytest.mark.parametrize("kind", ["identity", "pairs", "diagonal", "blocks", "rows", "wide"])
def test_standing(family, norms, kind):
    """Slices of what the attention then reads are the old queries in the gauge."""
    dims = dims_of(family, norms=norms, **(dict(head_dim=12) if kind == "wide" and family == "llama" else {}))
    scales = torch.linspace(0.5, 2, 8).double().view(2, 1, 1, 4).expand(-1, 2, 2, -1).flatten()
    W = {
        "identity": torch.eye(32).double(),
        "pairs": scales.diag(),
        "diagonal": torch.linspace(0.5, 2, 32).double().diag(),
        "blocks": torch.block_diag(*normal(4, 8, 8)),
        "rows": torch.eye(32).double() + 1e-12 * normal(32, 32),
        "wide": normal(32, dims.n_heads * dims.d_head),
    }[kind]
    stands = {
        "identity": True,
        "pairs": True,
        "diagonal": family == "gpt2" or norms,
        "blocks": family == "gpt2",
    }.get(kind, False)
    fold = standing_fold(W, dims)
    assert (fold is not None) == stands
    if fold is None:
        return
    assert fold.basis is None
    x = normal(5, 32, seed=3)
    A = diagonal_of(fold.gauge)
    read = x if fold.scale is None else x * fold.scale
    torch.testing.assert_close(read, x @ W @ A, rtol=1e-11, atol=1e-11)
    assert (fold.scale is not None) == (kind == "diagonal" and family == "llama")


def test_narrow_queries_stand_on_the_first_channels_alone():
    dims = dims_of(head_dim=6)
    W = torch.eye(32, 24).double()
    fold = standing_fold(W * torch.linspace(1, 2, 24).double(), dims)
    torch.testing.assert_close(fold.scale, torch.cat([torch.linspace(1, 2, 24), torch.ones(8)]).double())
    W[30, 3] = 1e-9
    assert standing_fold(W, dims) is None


def test_the_query_bias_in_the_gauge():
    dims = dims_of(norms=False, head_dim=6, attention_bias=True)
    fold = basis_fold(normal(32, 24), dims, Group.GENERAL, TOLERANCE)
    b = normal(24, seed=2)
    c = query_shift(b, fold, dims)
    torch.testing.assert_close(c[:24], b @ diagonal_of(fold.gauge))
    assert torch.equal(c[24:], torch.zeros(8).double())


@torch.no_grad()
def spoiled(tmp_path, family, spoil, layer=1, n_layers=3, **fields):
    """A norm-free net with one layer's W_Q spoiled."""
    model = variant_model(family, norms=False, tie_word_embeddings=False, num_hidden_layers=n_layers, **fields).double()
    for at in range(n_layers) if layer is None else [layer]:
        if family == "gpt2":
            W = model.transformer.h[at].attn.c_attn.weight[:, :32]
        else:
            W = model.model.layers[at].self_attn.q_proj.weight.T
        W[:, 9] = W[:, 1] + spoil * W[:, 9]  # two heads read nearly one direction
    model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


ONE_SKIP = dict(mlp_skip=False)  # every layer alone on its stream


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize(
    "layer, recipe", [(0, "0=dense,1-2=exact"), (1, "0=exact,1=dense,2=exact"), (2, "0-1=exact,2=dense")]
)
def test_a_singular_query_alone_on_its_stream_is_named(tmp_path, family, layer, recipe):
    source = spoiled(tmp_path, family, 0.0, layer, **ONE_SKIP)
    with pytest.raises(QueryMapError) as raised:
        plan_exact(open_checkpoint(source))
    message = str(raised.value)
    assert message.startswith(f"layer {layer}: W_Q is singular to the precision of its type (condition number ")
    assert message.endswith(f"To fold the others, leave it whole: --query {recipe}")
    plan = fold(source, tmp_path / "out", kept=frozenset({layer}))
    assert [spec.name for spec in plan.recipe] == ["dense" if i == layer else "identity" for i in range(3)]
    ids = tokens(2, 30)
    assert relative(logits(tmp_path / "out", ids), logits(source, ids)) < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_ill_conditioned_query_is_refused_for_the_dtype_that_it_is_too_much_for(tmp_path, family):
    source = spoiled(tmp_path, family, 1e-9, **ONE_SKIP)
    condition = np.linalg.cond(read_query(open_checkpoint(source), 1).numpy())
    assert condition > 1e9
    with pytest.raises(
        QueryMapError, match=r"layer 1: its change of basis has condition number \d\.\de\+\d\d, too much"
    ):
        plan_exact(open_checkpoint(source), "F32")
    assert plan_exact(open_checkpoint(source), "F64").choice.folded(1)
    verdict = choose_folds(open_checkpoint(source), "F32").verdicts[1]
    assert (verdict.how, verdict.ill) == ("refused", True)
    assert verdict.condition == pytest.approx(condition, rel=1e-3)
    assert verdict.basis_condition > 1e8


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_best_conditioned_layer_takes_a_shared_stream(tmp_path, family):
    """A singular layer leaves the stream to others, and says why it is not it."""
    source = spoiled(tmp_path, family, 0.0)
    choice = choose_folds(open_checkpoint(source))
    assert list(choice.claims.values()) != [1]
    (claimed,) = choice.claims.values()
    fits = {i: choose_folds(open_checkpoint(source), kept=frozenset({0, 1, 2}) - {i}).verdicts[i] for i in (0, 2)}
    assert claimed == min(fits, key=lambda i: fits[i].basis_condition)
    assert choice.verdicts[claimed].basis_condition == fits[claimed].basis_condition
    assert (choice.verdicts[1].how, choice.verdicts[1].ill) == ("refused", True)
    other = ({0, 2} - {claimed}).pop()
    assert f"layer {claimed}" in choice.verdicts[other].reason
    fold(source, tmp_path / "out")  # which is no error
    assert relative(logits(tmp_path / "out"), logits(source)) < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_singular(tmp_path, family):
    with pytest.raises(QueryMapError, match="layer 0: W_Q is singular"):
        plan_exact(open_checkpoint(spoiled(tmp_path, family, 0.0, layer=None)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_kept_layers_stay_whole(tmp_path, family):
    """On an ordinary model, bit for bit; on a stream that turns, whole but turned."""
    model = tiny_model(family, num_hidden_layers=3)
    model.save_pretrained(tmp_path / "source")
    plan = fold(tmp_path / "source", tmp_path / "out", kept=frozenset({1}))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("source", "out"))
    own = [name for name in before if ".h.1." in name or ".layers.1." in name]
    assert len(own) >= 9
    assert all(torch.equal(before[name], after[name]) for name in own)
    assert [spec.value for spec in plan.recipe] == ["gauge", "dense", "gauge"]
    assert plan.choice.verdicts[1].how == "kept"
    free = save_variant(tmp_path / "free", family, norms=False, tie_word_embeddings=False, num_hidden_layers=3)
    fold(free, tmp_path / "free-out", kept=frozenset({1}))
    assert relative(logits(tmp_path / "free-out"), logits(free)) < 1e-9
    shapes = {n: s for n, s in stored(tmp_path / "free-out").items() if ".h.1." in n or ".layers.1." in n}
    assert shapes == {n: s for n, s in stored(free).items() if n in shapes}
    turned, whole = (load_file(folder / "model.safetensors") for folder in (tmp_path / "free-out", free))
    assert not any(torch.equal(turned[name], whole[name]) for name in shapes if name.endswith("weight"))


def test_what_does_not_fit_the_type_is_named(tmp_path):
    """Float16 ends at 65,504: a folded weight beyond it is an error, not an infinity."""
    model = variant_model("llama", norms=False, tie_word_embeddings=False, num_hidden_layers=1).double()
    model.lm_head.weight.data *= 3e5
    torch.nn.init.orthogonal_(model.model.layers[0].self_attn.q_proj.weight)  # float16 would refuse a scrambled one
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(NonFiniteError, match=r"lm_head.weight does not fit in F16 once folded; use --dtype float32"):
        fold(tmp_path / "source", tmp_path / "out", "F16")


def test_progress_counts_every_layer_twice(tmp_path):
    source = save_variant(tmp_path / "source", "llama", norms=False, num_hidden_layers=3)
    steps = []
    plan_exact(open_checkpoint(source), progress=lambda *step: steps.append(step))
    assert [step[:2] for step in steps] == [(i, 6) for i in range(1, 7)]
    assert [step[2] for step in steps] == ["conditioning of W_Q"] * 3 + ["pivots"] * 3
