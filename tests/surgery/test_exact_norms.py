"""Folds that norms let through: W_Q that is the identity as it stands, and W_Q that is a turn of its stream."""

import pytest
import torch
from foldings import fold, logits, relative, stored
from tiny_models import save_reduced, save_tiny, tiny_model, tokens, variant_model

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.surgery.checkpoint import plan_exact
from qectomy.surgery.materialize import materialize

# D = 32, H = 4 heads of K = 8; W_Q (D, H*K), as in x W
EXACT = 1e-10
DRAWS = torch.Generator().manual_seed(7)


def draw(*shape):
    return torch.randn(*shape, generator=DRAWS, dtype=torch.float64)


def sizes(*shape):
    """Numbers between 0.5 and 1.5 of either sign."""
    return (0.5 + torch.rand(*shape, generator=DRAWS, dtype=torch.float64)) * draw(*shape).sign()


def orthogonal(n):
    return torch.linalg.qr(draw(n, n))[0]


def keeping_mean(n):
    """An orthogonal Θ with Θ 1 = 1: any turn of what is orthogonal to 1."""
    B = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), draw(n, n - 1)], 1))[0]
    return B @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), orthogonal(n - 1)) @ B.T


def set_query(model, layer, W_Q):
    """Put W_Q (D, H*K) into a stock model or one of ours."""
    with torch.no_grad():
        if hasattr(model, "transformer"):
            model.transformer.h[layer].attn.c_attn.weight[:, : W_Q.shape[1]] = W_Q
        else:
            model.model.layers[layer].self_attn.q_proj.weight.copy_(W_Q.T)


def gain(model, layer):
    block = (
        model.transformer.h[layer].ln_1 if hasattr(model, "transformer") else model.model.layers[layer].input_layernorm
    )
    return block.weight.detach()


def check(tmp_path, model, kinds, how=None):
    """Save and fold a model: the layers of `kinds` have these query maps, and the logits stay."""
    source, out, ids = tmp_path / "source", tmp_path / "out", tokens(2, 40)
    model.save_pretrained(source)
    plan = fold(source, out)
    assert [spec.name for spec in plan.recipe] == kinds
    expected = ["exact" if kind == "identity" else how for kind in kinds]
    assert [verdict.how for verdict in plan.choice.verdicts.values()] == expected
    assert relative(logits(out, ids), logits(source, ids)) < EXACT
    return plan


def block_diagonal():
    return torch.block_diag(*(draw(8, 8) for _ in range(4)))


def pairs(n_kv_heads=2, n_heads=4, d_head=8):
    """Scales (H*K,), one for each pair (i, i + K/2) and key head: all that passes RoPE."""
    return sizes(n_kv_heads, 1, 1, d_head // 2).expand(-1, n_heads // n_kv_heads, 2, -1).flatten()


@pytest.mark.parametrize("make", [lambda: torch.eye(32), lambda: sizes(32).diag(), block_diagonal])
@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "gpt2-inverse"])
def test_gpt2_stands_where_no_head_reads_another(tmp_path, name, make):
    model = tiny_model(name, num_hidden_layers=3).double()
    for layer in range(3):
        set_query(model, layer, make().double())
    plan = check(tmp_path, model, ["identity"] * 3)
    assert plan.choice.standing == {0, 1, 2}
    assert not plan.choice.claims
    shapes = stored(tmp_path / "out")
    for layer in range(3):
        assert shapes[f"transformer.h.{layer}.attn.c_attn.weight"] == (32, 32)
        assert shapes[f"transformer.h.{layer}.attn.c_attn.gauge.weight"] == (24, 32)
        assert f"transformer.h.{layer}.attn.c_attn.gauge.bias" not in shapes


@pytest.mark.parametrize(
    "name", ["llama", "mqa", "mha", "biases", "tied", "narrow-heads", "mistral", "qwen2", "rope-llama3"]
)
@pytest.mark.parametrize("make", ["identity", "pairs", "pairs-of-each-head", "diagonal"])
def test_llama_stands_where_each_channel_reads_itself(tmp_path, name, make):
    """What no pair of RoPE takes lies in the gain, and comes out of W_K and W_V."""
    model = tiny_model(name, num_hidden_layers=3).double()
    d_head = model.model.layers[0].self_attn.head_dim
    diagonal = {
        "identity": lambda: torch.ones(4 * d_head).double(),
        "pairs": lambda: pairs(model.config.num_key_value_heads, d_head=d_head),
        "pairs-of-each-head": lambda: pairs(4, d_head=d_head),
        "diagonal": lambda: sizes(4 * d_head),
    }[make]
    for layer in range(3):
        set_query(model, layer, torch.eye(32, 4 * d_head).double() * diagonal())
    gains = [gain(model, layer).clone() for layer in range(3)]
    plan = check(tmp_path, model, ["identity"] * 3)
    assert plan.choice.standing == {0, 1, 2}
    assert not any("q_proj" in name for name in stored(tmp_path / "out"))
    folded = open_checkpoint(tmp_path / "out", reduced=True)
    moved = [
        not torch.equal(folded.read(f"model.layers.{i}.input_layernorm.weight"), gains[i].double()) for i in range(3)
    ]
    moves = make == "diagonal" or (make == "pairs-of-each-head" and model.config.num_key_value_heads < 4)
    assert moved == [moves] * 3


def test_a_norm_free_llama_stands_only_where_rope_lets_the_scales_through(tmp_path):
    """Without a norm there is no gain to take in others; the layer then claims its stream."""
    for layer_scales, standing in ((pairs(), True), (sizes(32), False)):
        model = variant_model("llama", norms=False, num_hidden_layers=1).double()
        set_query(model, 0, layer_scales.diag())
        folder = tmp_path / str(standing)
        folder.mkdir()
        plan = check(folder, model, ["identity"])
        assert (plan.choice.standing, plan.choice.claims) == (({0}, {}) if standing else (set(), {0: 0}))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_all_standing_layers_go_and_the_others_stay(tmp_path, family):
    """Layer 1 could claim the stream of a norm-free net, but two layers stand in it as it is."""
    model = variant_model(family, norms=False, num_hidden_layers=3, tie_word_embeddings=False).double()
    for layer in (0, 2):
        set_query(model, layer, torch.eye(32).double() * pairs())
    rest = "gauge" if family == "gpt2" else "dense"
    plan = check(tmp_path, model, ["identity", rest, "identity"], how={"gpt2": "gauge", "llama": "refused"}[family])
    assert plan.choice.standing == {0, 2}
    verdict = plan.choice.verdicts[1]
    assert not verdict.ill
    assert "inf" not in verdict.reason


@pytest.mark.parametrize("spoil", ["another-row", "another-head", "singular", "pair-of-one-head"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_what_does_not_stand(tmp_path, name, spoil):
    """One number out of place, and the norm holds W_Q back."""
    model = tiny_model(name, num_hidden_layers=2).double()
    W = torch.eye(32).double() * pairs()
    set_query(model, 0, W)
    W = W.clone()
    if spoil == "another-row":
        W[1, 0] = 1e-12  # within a head, which a gauge takes out unless RoPE stands between
    elif spoil == "another-head":
        W[0, 31] = 1e-12
    elif spoil == "singular":
        W[5, 5] = 0
    else:
        W[0, 0], W[4, 4] = 1.0, -1.0  # the gain takes it in
    set_query(model, 1, W)
    source = tmp_path / "source"
    model.save_pretrained(source)
    plan = plan_exact(open_checkpoint(source))
    stands = spoil == "pair-of-one-head" or (spoil == "another-row" and name == "gpt2")
    assert plan.choice.standing == ({0, 1} if stands else {0})
    how = {"gpt2": "gauge", "llama": "least squares"}[name]
    assert plan.choice.verdicts[1].how == ("exact" if stands else how)


@pytest.mark.parametrize("name", ["gpt2", "llama", "biases", "narrow-heads"])
def test_a_materialised_identity_goes_again(tmp_path, name):
    """Convert to `identity`, write W_Q back, fold: every layer is exact and stores what it stored, less the gauge."""
    source = save_tiny(tmp_path / "stock", name, dtype="float64")  # the written layers' scales are rounded to its type
    reduced = save_reduced(tmp_path / "reduced", source, ("identity", "identity"))
    materialize(open_checkpoint(reduced, reduced=True), tmp_path / "dense")
    plan = fold(tmp_path / "dense", tmp_path / "out", "F64")
    assert [spec.name for spec in plan.recipe] == ["identity", "identity"]
    ids = tokens(2, 40)
    assert relative(logits(tmp_path / "out", ids), logits(reduced, ids)) < EXACT
    assert relative(logits(tmp_path / "out", ids), logits(tmp_path / "stock", ids)) > 1e-3
    assert (
        open_checkpoint(tmp_path / "out", reduced=True).parameters < open_checkpoint(reduced, reduced=True).parameters
    )


@pytest.mark.parametrize("name", ["llama", "mqa", "biases", "rope-yarn", "mistral", "qwen2"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_turn_passes_rmsnorm(tmp_path, name, layer):
    """diag(γ) W_Q = Θ times what RoPE lets through: that layer's W_Q goes, on an ordinary model with norms."""
    model = tiny_model(name, num_hidden_layers=3).double()
    turn = orthogonal(32) * pairs(model.config.num_key_value_heads).abs()
    set_query(model, layer, turn / gain(model, layer)[:, None])
    kinds = ["identity" if i == layer else "dense" for i in range(3)]
    plan = check(tmp_path, model, kinds, how="least squares")
    assert list(plan.choice.claims.values()) == [layer]
    assert "lm_head.weight" in stored(tmp_path / "out")


def test_a_narrow_turn_passes_rmsnorm(tmp_path):
    """24 orthonormal columns of 32 are completed to a turn."""
    model = tiny_model("narrow-heads", num_hidden_layers=2).double()
    turn = orthogonal(32)[:, :24] * pairs(d_head=6).abs()
    set_query(model, 1, turn / gain(model, 1)[:, None])
    check(tmp_path, model, ["dense", "identity"], how="least squares")


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("constant", [0.0, 1 / 32, None], ids=["centred", "as-kept", "any"])
def test_a_turn_that_keeps_the_mean_passes_layernorm(tmp_path, layer, constant):
    """States of mean 0 do not see a constant in a column of diag(γ) W_Q; the norm's shift does."""
    model = tiny_model("gpt2-untied", num_hidden_layers=3).double()
    theta = keeping_mean(32)
    row = draw(32) if constant is None else torch.full((32,), constant).double()
    set_query(model, layer, (theta - 1 / 32 + row) / gain(model, layer)[:, None])
    plan = check(tmp_path, model, ["identity" if i == layer else "gauge" for i in range(3)], how="gauge")
    assert list(plan.choice.claims.values()) == [layer]


def test_a_turn_that_moves_the_mean_does_not_pass_layernorm(tmp_path):
    model = tiny_model("gpt2-untied").double()
    set_query(model, 0, orthogonal(32) / gain(model, 0)[:, None])
    check(tmp_path, model, ["gauge", "gauge"], how="gauge")


@pytest.mark.parametrize("name", ["gpt2", "tied"])
@pytest.mark.parametrize("one_gain", [True, False])
def test_a_tied_head_lets_a_turn_through_its_final_norm_if_that_has_one_gain(tmp_path, name, one_gain):
    model = tiny_model(name).double()
    final = model.transformer.ln_f if name == "gpt2" else model.model.norm
    if one_gain:
        final.weight.data.fill_(1.7)
    turn = keeping_mean(32) if name == "gpt2" else orthogonal(32)
    set_query(model, 1, turn / gain(model, 1)[:, None])
    rest = "gauge" if name == "gpt2" else "dense"
    how = "gauge" if name == "gpt2" else "least squares"
    plan = check(tmp_path, model, [rest, "identity" if one_gain else rest], how=how)
    assert plan.dims.tied
    assert not any("lm_head" in name for name in stored(tmp_path / "out"))


@pytest.mark.parametrize("dtype, passes", [("float32", True), ("bfloat16", True)])
def test_rounding_of_the_stored_weights_is_allowed_for(tmp_path, dtype, passes):
    """A turn that was stored in half precision is one but for rounding, and is taken for one."""
    model = tiny_model("llama").double()
    for layer in range(2):  # gains of 1, so that the product is not rounded twice
        model.model.layers[layer].input_layernorm.weight.data.fill_(1.0)
    set_query(model, 0, orthogonal(32))
    source, ids = tmp_path / "source", tokens(2, 40)
    model.to(getattr(torch, dtype)).save_pretrained(source)
    plan = fold(source, tmp_path / "out")
    assert [spec.name for spec in plan.recipe] == ["identity", "dense"]
    assert not plan_exact(open_checkpoint(source), "F64").choice.claims  # nor is it exact to float64's precision
    error = relative(logits(tmp_path / "out", ids), logits(source, ids))
    assert 1e-12 < error < {"float32": 1e-5, "bfloat16": 0.2}[dtype]
    set_query(model, 0, 1.1 * orthogonal(32))
    model.to(getattr(torch, dtype)).save_pretrained(tmp_path / "longer")
    with torch.no_grad():  # a scale common to all is in RoPE's gauge; a single longer column is not
        model.model.layers[0].self_attn.q_proj.weight[3] *= 1.1
    model.save_pretrained(tmp_path / "uneven")
    assert open_checkpoint(tmp_path / "longer").dims.stock
    assert plan_exact(open_checkpoint(tmp_path / "longer")).choice.claims == {0: 0}
    assert plan_exact(open_checkpoint(tmp_path / "uneven")).choice.claims == {}


@pytest.mark.parametrize("vocab_size", [24, 320], ids=["untying-pays", "untying-costs"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_turn_keeps_the_tie_of_a_norm_free_net(tmp_path, family, vocab_size):
    """E Θ is the head of states x Θ for an orthogonal Θ: no head of its own is needed, and none is made."""
    fields = dict(norms=False, tie_word_embeddings=True, num_hidden_layers=2, vocab_size=vocab_size)
    model = variant_model(family, **fields).double()
    set_query(model, 1, orthogonal(32) * pairs().abs())
    model.save_pretrained(tmp_path / "source")
    plan = fold(tmp_path / "source", tmp_path / "out")
    assert plan.choice.claims == {0: 1}
    assert "orthogonal change of basis: it passes the tie" in plan.choice.verdicts[1].reason
    assert plan.dims.tied
    assert not plan.choice.untied
    assert "lm_head.weight" not in stored(tmp_path / "out")
    ids = tokens(2, 30, vocab_size=vocab_size)
    assert relative(logits(tmp_path / "out", ids), logits(tmp_path / "source", ids)) < EXACT
