"""The theorems, on scrambled models: the logits stay in float64, and what goes is gone from the file.

Theory: arXiv 2510.23912 (norm-free nets with skips or shared weights) and arXiv 2404.12362 (skipless nets).
"""

import json

import pytest
from foldings import fold, logits, relative, stored
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, save_variant, tokens

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.errors import QueryMapError
from qectomy.models.query_maps import QueryMapSpec
from qectomy.surgery.checkpoint import plan_exact

EXACT = 1e-10
ATTENTION_SKIP, MLP_SKIP = dict(mlp_skip=False), dict(attention_skip=False)
SKIPLESS = dict(attention_skip=False, mlp_skip=False)
SHARED = dict(shared_layers=True)

# What a layer's attention stores, by hand: D = 32 in 4 heads of 8, Llama's with 2 key heads; (in, out) for GPT-2.
GPT2 = {
    "gauge": {
        "c_attn.weight": (32, 32),  # W_K
        "c_attn.gauge.pivots": (8, 8),  # of 4 heads of W_Q and 4 of W_V
        "c_attn.gauge.weight": (24, 64),  # their other rows
        "c_attn.gauge.bias": (32,),  # of the queries
        "c_proj.weight": (32, 32),
        "c_proj.bias": (32,),
    },
    "identity": {
        "c_attn.weight": (32, 32),
        "c_attn.gauge.pivots": (4, 8),
        "c_attn.gauge.weight": (24, 32),
        "c_proj.weight": (32, 32),
        "c_proj.bias": (32,),
    },
}
GPT2["merged"] = {name: shape for name, shape in GPT2["identity"].items() if not name.startswith("c_proj")}
LLAMA = {
    "dense": {
        "q_proj.weight": (32, 32),
        "k_proj.weight": (16, 32),
        "v_proj.pivots": (2, 8),
        "v_proj.weight": (16, 24),
        "o_proj.weight": (32, 32),
    },
}
LLAMA["identity"] = {name: shape for name, shape in LLAMA["dense"].items() if not name.startswith("q_proj")}
LLAMA["merged"] = {name: shape for name, shape in LLAMA["identity"].items() if not name.startswith("o_proj")}
STORED = {
    "gpt2": ("transformer.h.{}.attn.", GPT2),
    "llama": ("model.layers.{}.self_attn.", LLAMA),
    "mistral": ("model.layers.{}.self_attn.", LLAMA),
}
REST = {"gpt2": "gauge", "llama": "dense", "mistral": "dense"}  # of a layer that keeps its W_Q


def check_attention(folder, family, kinds):
    """The attention tensors of every stored layer are those of its kind, and there are no others."""
    prefix, shapes = STORED[family]
    found, expected = stored(folder), {}
    for layer, kind in enumerate(kinds):
        expected |= {prefix.format(layer) + name: shape for name, shape in shapes[kind].items()}
    part = ".attn." if family == "gpt2" else ".self_attn."
    assert {name: shape for name, shape in found.items() if part in name} == expected


def check_logits(source, out):
    ids = tokens(2, 40)
    expected = logits(source, ids)
    assert expected.isfinite().all()
    assert relative(logits(out, ids), expected) < EXACT


def fold_variant(tmp_path, family, **fields):
    """Fold a scrambled model, check its logits; return (the plan, the folders)."""
    source = save_variant(tmp_path / "source", family, **fields)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    plan = fold(source, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    check_logits(source, tmp_path / "out")
    return plan, source, tmp_path / "out"


def only_one(plan, family, n_layers):
    """Exactly one layer lost its W_Q; return the kinds of all."""
    exact = [layer for layer, verdict in plan.choice.verdicts.items() if verdict.how == "exact"]
    assert len(exact) == 1
    return ["identity" if layer in exact else REST[family] for layer in range(n_layers)]


@pytest.mark.parametrize("family", STORED)
def test_any_single_layer_of_a_norm_free_net(tmp_path, family):
    plan, source, out = fold_variant(tmp_path, family, num_hidden_layers=3, norms=False, tie_word_embeddings=False)
    check_attention(out, family, only_one(plan, family, 3))
    for layer in range(3):  # whichever it is to be: the others are asked to stay whole
        kept = frozenset({0, 1, 2} - {layer})
        only = fold(source, tmp_path / f"only-{layer}", kept=kept)
        check_logits(source, tmp_path / f"only-{layer}")
        assert [spec.name for spec in only.recipe] == ["dense" if i in kept else "identity" for i in range(3)]
        assert [only.choice.verdicts[i].how for i in range(3)] == ["kept" if i in kept else "exact" for i in range(3)]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("skip", [ATTENTION_SKIP, MLP_SKIP], ids=["attention-skip", "mlp-skip"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_layer_with_one_skip_alone(tmp_path, family, skip, tied):
    plan, _, out = fold_variant(tmp_path, family, num_hidden_layers=3, norms=False, tie_word_embeddings=tied, **skip)
    check_attention(out, family, ["identity"] * 3)
    assert plan.dims.tied == tied  # the tie holds, for the embedding's stream and the head's are two
    assert ("lm_head.weight" in stored(out)) == (not tied)
    assert not plan.choice.untied


@pytest.mark.parametrize("skips", [{}, ATTENTION_SKIP, MLP_SKIP], ids=["skips", "attention-skip", "mlp-skip"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_layer_where_layers_share_their_weights(tmp_path, family, skips):
    plan, _, out = fold_variant(
        tmp_path, family, num_hidden_layers=3, norms=False, tie_word_embeddings=False, **SHARED, **skips
    )
    assert [spec.name for spec in plan.recipe] == ["identity"] * 3
    bias = {"attn.c_attn.query.bias": (32,)} if family == "gpt2" else {}  # no writer of its own could hold it
    prefix, shapes = STORED[family]
    found = {name: shape for name, shape in stored(out).items() if ".h." in name or ".layers." in name}
    attention = {name: shape for name, shape in found.items() if "attn." in name}
    assert attention == {prefix.format(0) + n: s for n, s in shapes["identity"].items()} | {
        f"transformer.h.0.{n}": s for n, s in bias.items()
    }
    assert {name.split(".")[2] for name in found} == {"0"}


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_skipless_nets_lose_the_output_projection_too(tmp_path, family, tied, shared):
    source = save_variant(
        tmp_path / "source", family, norms=False, tie_word_embeddings=tied, shared_layers=shared, **SKIPLESS
    )
    if shared and tied:  # one stream then holds the tied matrix twice: W_Q stays, W_O goes all the same
        plan = fold(source, tmp_path / "out")
        assert {verdict.how for verdict in plan.choice.verdicts.values()} == {
            "gauge" if family == "gpt2" else "refused"
        }
    else:
        plan = fold(source, tmp_path / "out")
        assert [spec.name for spec in plan.recipe] == ["identity"] * 2
    assert [spec.output for spec in plan.recipe] == ["merged"] * 2
    check_logits(source, tmp_path / "out")
    assert not any(name.endswith(("attn.c_proj.weight", "o_proj.weight")) for name in stored(tmp_path / "out"))
    if not shared:
        check_attention(tmp_path / "out", family, ["merged"] * 2)


@pytest.mark.parametrize(
    "name, saved",
    [
        ("gpt2", 2 * (4 * 8 * 8 + 4 * 8 * 8 + 2 * 32 - 8 * 8)),  # W_Q and W_V, key and value biases; less the pivots
        ("gpt2-untied", 2 * (4 * 8 * 8 + 4 * 8 * 8 + 2 * 32 - 8 * 8)),
        ("gpt2-inverse", 2 * (4 * 8 * 8 + 4 * 8 * 8 + 2 * 32 - 8 * 8)),
        ("gpt2-unscaled", 2 * (4 * 8 * 8 + 4 * 8 * 8 + 2 * 32 - 8 * 8)),
        ("llama", 2 * (2 * 8 * 8 - 2 * 8)),  # W_V, a key head at a time
        ("mha", 2 * (4 * 8 * 8 - 4 * 8)),
        ("mqa", 2 * (1 * 8 * 8 - 8)),
        ("tied", 2 * (2 * 8 * 8 - 2 * 8)),
        ("biases", 2 * (2 * 8 * 8 + 16 - 2 * 8)),  # W_O's bias takes in the values'
        ("attention-bias", 2 * (2 * 8 * 8 + 16 - 2 * 8)),
        ("mlp-bias", 2 * (2 * 8 * 8 - 2 * 8)),
        ("narrow-heads", 2 * (2 * 6 * 6 + 12 - 2 * 6)),
        ("wide-heads", 2 * (2 * 12 * 12 - 2 * 12)),
        ("mistral", 2 * (2 * 8 * 8 - 2 * 8)),
        ("qwen2", 2 * (2 * 8 * 8 - 2 * 8)),  # W_O has no bias for the values'
        ("rope-yarn", 2 * (2 * 8 * 8 - 2 * 8)),
    ],
)
def test_ordinary_models_have_their_gauge_alone(tmp_path, name, saved):
    source = save_tiny(tmp_path / "source", name, dtype="float64")
    plan = fold(source, tmp_path / "out")
    check_logits(source, tmp_path / "out")
    how = "gauge" if name.startswith("gpt2") else "least squares"
    assert [verdict.how for verdict in plan.choice.verdicts.values()] == [how] * 2
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / "out", reduced=True)
    assert before.parameters - after.parameters == saved
    assert after.parameters == sum(tensor.numel() for tensor in load_file(tmp_path / "out/model.safetensors").values())
    spec = QueryMapSpec("gauge" if name.startswith("gpt2") else "dense", value="gauge")
    assert plan.recipe == after.recipe == (spec, spec)
    if name == "gpt2":
        check_attention(tmp_path / "out", "gpt2", ["gauge"] * 2)
    if name == "llama":
        check_attention(tmp_path / "out", "llama", ["dense"] * 2)


@pytest.mark.parametrize("name", ["gpt2-one-head", "mqa"])
def test_a_single_head_without_rope_loses_its_query(tmp_path, name):
    """x̂ W_Q (x̂ W_K)ᵀ = x̂ (x̂ W_K W_Qᵀ)ᵀ: one head of all channels needs one matrix, norms or not; RoPE forbids it."""
    source = save_tiny(tmp_path / "source", name, dtype="float64", num_attention_heads=1, num_hidden_layers=3)
    if name != "gpt2-one-head":
        with pytest.raises(QueryMapError, match="nothing of this checkpoint goes exactly"):
            plan_exact(open_checkpoint(source))
        return
    plan = fold(source, tmp_path / "out")
    check_logits(source, tmp_path / "out")
    assert plan.recipe == (QueryMapSpec("identity"),) * 3
    assert stored(tmp_path / "out")["transformer.h.1.attn.c_attn.weight"] == (32, 64)
    assert stored(tmp_path / "out")["transformer.h.1.attn.c_proj.bias"] == (32,)
    assert not any("pivots" in name or "query" in name for name in stored(tmp_path / "out"))


SHAPES = {
    "gqa": dict(num_key_value_heads=2),
    "mqa": dict(num_key_value_heads=1),
    "mha": dict(num_key_value_heads=4),
    "narrow": dict(head_dim=6),
    "attention-bias": dict(attention_bias=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "mlp-bias": dict(mlp_bias=True),
    "narrow-biases": dict(head_dim=6, attention_bias=True, mlp_bias=True),
    "one-layer": dict(num_hidden_layers=1),
}


@pytest.mark.parametrize("structure", ["skips", "attention-skip", "skipless", "shared"])
@pytest.mark.parametrize("shape", SHAPES)
def test_heads_and_biases_of_llama(tmp_path, shape, structure):
    """Grouped, narrow and biased heads go as the others do: all of W_Q, a bias only where it is stored."""
    skips = {"skips": {}, "attention-skip": ATTENTION_SKIP, "skipless": SKIPLESS, "shared": SHARED}[structure]
    _, _, out = fold_variant(tmp_path, "llama", norms=False, **SHAPES[shape], **skips)
    names = stored(out)
    layers = 1 if structure == "shared" or shape == "one-layer" else 2
    whole = sum("q_proj.weight" in name for name in names)
    assert whole == (1 if structure == "skips" and layers == 2 else 0)
    biased = shape in ("attention-bias", "biases", "narrow-biases")
    assert sum(name.endswith("self_attn.query.bias") for name in names) == (layers - whole if biased else 0)
    assert not any("v_proj.bias" in name for name in names)
    assert sum("k_proj.bias" in name for name in names) == (layers if biased else 0)
    # W_O merges where it is square and the MLP has a place for its bias
    merges = structure == "skipless" and shape not in ("narrow", "narrow-biases", "attention-bias")
    assert sum("o_proj.weight" in name for name in names) == (0 if merges else layers)


@pytest.mark.parametrize("structure", [{}, ATTENTION_SKIP, SKIPLESS, SHARED], ids=["skips", "one", "none", "shared"])
def test_wide_heads_are_refused(tmp_path, structure):
    """48 query channels are no slices of 32; what is left is the values' gauge."""
    plan, _, out = fold_variant(tmp_path, "llama", norms=False, head_dim=12, **structure)
    layers = 1 if structure == SHARED else 2
    for verdict in plan.choice.verdicts.values():
        assert (verdict.how, verdict.ill) == ("refused", False)
        assert "n_heads * d_head > d_model" in verdict.reason
    assert sum("q_proj.weight" in name for name in stored(out)) == layers
    assert sum("o_proj.weight" in name for name in stored(out)) == layers


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("vocab_size, breaks", [(24, True), (31, True), (32, False), (48, False)])
def test_a_tie_is_broken_where_that_saves(tmp_path, family, vocab_size, breaks):
    """In one stream an untied head costs V * D, W_Q is worth 32 * D."""
    fields = dict(norms=False, tie_word_embeddings=True, vocab_size=vocab_size)
    source = save_variant(tmp_path / "source", family, **fields)
    plan = fold(source, tmp_path / "out")
    ids = tokens(2, 40, vocab_size=vocab_size)
    assert relative(logits(tmp_path / "out", ids), logits(source, ids)) < EXACT
    assert plan.choice.untied == breaks
    assert plan.dims.tied == (not breaks)
    assert ("lm_head.weight" in stored(tmp_path / "out")) == breaks
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] == (not breaks)
    if breaks:
        check_attention(tmp_path / "out", family, only_one(plan, family, 2))
    else:
        check_attention(tmp_path / "out", family, [REST[family]] * 2)
        for verdict in plan.choice.verdicts.values():
            assert verdict.how == {"gpt2": "gauge", "llama": "refused"}[family]
            assert f"costs {vocab_size * 32:,} parameters" in verdict.reason


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_comparison_can_fail(tmp_path, family):
    """One part in a million of one number of the folded keys shows."""
    _, source, out = fold_variant(tmp_path, family, norms=False, tie_word_embeddings=False)
    tensors = load_file(out / "model.safetensors")
    name = "transformer.h.0.attn.c_attn.weight" if family == "gpt2" else "model.layers.0.self_attn.k_proj.weight"
    tensors[name][3, 3] *= 1 + 1e-6
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError):
        check_logits(source, out)
