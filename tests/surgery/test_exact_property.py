"""On any architecture: what is called exact keeps the logits, and what is not, forced, changes them."""

from dataclasses import dataclass, replace

import torch
from foldings import in_float64, logits, relative, write_fold
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tiny_models import load_reduced, tiny_model, tokens, variant_model

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.errors import QueryMapError
from qectomy.models.query_maps import QueryMapSpec
from qectomy.surgery.basis import Choice
from qectomy.surgery.checkpoint import ExactPlan, plan_exact
from qectomy.surgery.choice import choose_folds
from qectomy.surgery.streams import Group, derive_streams

EXACT, CHANGED = 1e-10, 1e-4
IDS = tokens(2, 12, vocab_size=24)


@dataclass(frozen=True)
class Net:
    """A random net: its family, its fields, what kind of matrix each layer's W_Q is, and which layers are kept."""

    family: str
    fields: dict
    queries: tuple
    one_final_gain: bool
    kept: frozenset
    seed: int


@st.composite
def nets(draw):
    family = draw(st.sampled_from(["gpt2", "llama"]))
    n_layers = draw(st.integers(1, 3))
    fields = dict(num_hidden_layers=n_layers, vocab_size=draw(st.sampled_from([24, 48])))
    for name in ("norms", "attention_skip", "mlp_skip", "shared_layers", "tie_word_embeddings"):
        fields[name] = draw(st.booleans())
    n_heads = fields["num_attention_heads"] = draw(st.sampled_from([1, 2, 4]))
    if family == "llama":
        fields["num_key_value_heads"] = draw(st.sampled_from([n for n in (1, 2, 4) if n_heads % n == 0]))
        fields["head_dim"] = draw(st.sampled_from([6, 8, 12])) * (4 // n_heads)
        fields["attention_bias"], fields["mlp_bias"] = draw(st.booleans()), draw(st.booleans())
    kinds = st.sampled_from(["random", "random", "identity", "diagonal", "blocks", "turn"])
    kept = draw(st.frozensets(st.integers(0, n_layers - 1), max_size=1))
    return Net(
        family=family,
        fields=fields,
        queries=tuple(draw(kinds) for _ in range(n_layers)),
        one_final_gain=draw(st.booleans()),
        kept=frozenset() if fields["shared_layers"] else kept,
        seed=draw(st.integers(0, 2**16)),
    )


def turn(n, generator, keeps_mean):
    first = torch.ones(n, 1, dtype=torch.float64)
    noise = torch.randn(n, n, generator=generator, dtype=torch.float64)
    if not keeps_mean:
        return torch.linalg.qr(noise)[0]
    B = torch.linalg.qr(torch.cat([first, noise[:, 1:]], 1))[0]
    inner = torch.linalg.qr(torch.randn(n - 1, n - 1, generator=generator, dtype=torch.float64))[0]
    return B @ torch.block_diag(first[:1], inner) @ B.T


@torch.no_grad()
def made(net):
    """The net, its W_Q of the kinds asked for."""
    model = variant_model(net.family, **net.fields, initializer_range=0.02 + net.seed * 1e-7).double()
    generator = torch.Generator().manual_seed(net.seed)
    gpt2 = net.family == "gpt2"
    final = model.transformer.ln_f if gpt2 else model.model.norm
    if net.one_final_gain and net.fields["norms"]:
        final.weight.fill_(1.3)
    for layer, kind in enumerate(net.queries[:1] if net.fields["shared_layers"] else net.queries):
        block = (model.transformer.h if gpt2 else model.model.layers)[layer]
        weight = block.attn.c_attn.weight[:, :32] if gpt2 else block.self_attn.q_proj.weight.T  # a view, (D, H*K)
        norm = block.ln_1 if gpt2 else block.input_layernorm
        gain = norm.weight if net.fields["norms"] else torch.ones(32, dtype=torch.float64)
        n_query, d_head = weight.shape[1], weight.shape[1] // net.fields["num_attention_heads"]
        noise = torch.randn(32, n_query, generator=generator, dtype=torch.float64)
        if kind == "identity":
            weight.copy_(torch.eye(32, n_query))
        elif kind == "diagonal":
            weight.copy_(torch.eye(32, n_query) * (0.5 + noise[0].abs()))
        elif kind == "blocks":
            own = torch.arange(32)[:, None] // d_head == torch.arange(n_query) // d_head
            weight.copy_(torch.where(own, noise, 0.0))
        elif kind == "turn" and n_query <= 32:
            weight.copy_(turn(32, generator, gpt2)[:, :n_query] / gain[:, None])
    return model


def load(folder):
    """A folder's model in float64, to change."""
    return in_float64(load_reduced(folder, torch.float64))


@torch.no_grad()
def sliced(model, family, layer):
    """Take a layer's queries for slices of what its attention reads, the keys in the gauge that fits best."""
    n_heads = model.config.num_attention_heads
    if family == "gpt2":
        attention = model.transformer.h[layer].attn.c_attn
        W_Q, W_K = attention.weight[:, :32], attention.weight[:, 32:64]
        for head in range(n_heads):
            own = slice(head * 32 // n_heads, (head + 1) * 32 // n_heads)
            block = W_Q[own, own].clone()  # the one block that slices can be
            W_K[:, own] = W_K[:, own] @ block.T
            attention.bias[own] = torch.linalg.solve(block.T, attention.bias[own])
        W_Q.copy_(torch.eye(32))
    else:
        attention = model.model.layers[layer].self_attn
        attention.q_proj.weight.copy_(torch.eye(*attention.q_proj.weight.shape))


def claimed(source, layer):
    """A plan that lets a layer claim its stream as if any change of basis passed and the tie held."""
    streams = derive_streams(source.dims)
    general = replace(streams, streams=tuple(replace(s, group=Group.GENERAL) for s in streams.streams))
    choice = Choice(general, eps=2e-16, claims={streams.of(("attention", layer)): layer})
    specs = [
        QueryMapSpec("identity" if source.dims.stored_layer(i) == layer else "dense")
        for i in range(source.dims.n_layers)
    ]
    return ExactPlan(choice, source.dims, tuple(specs), {}, {})


@settings(max_examples=40, deadline=None)
@given(net=nets())
@torch.no_grad()
def test_exact_is_exact_and_nothing_else_is(tmp_path_factory, net):
    folder = tmp_path_factory.mktemp("net")
    source_folder = folder / "source"
    made(net).save_pretrained(source_folder)
    source = open_checkpoint(source_folder)
    choice = choose_folds(source, kept=net.kept)
    exact = {layer for layer, verdict in choice.verdicts.items() if verdict.how == "exact"}
    assert exact == {layer for layer in choice.verdicts if choice.folded(layer)}
    expected = logits(source_folder, IDS)
    for verdict in choice.verdicts.values():
        event(verdict.how)
    try:
        plan = plan_exact(source, kept=net.kept)
    except QueryMapError:
        assert not exact or any(verdict.ill for verdict in choice.verdicts.values())
        plan = None
    # a gauge in an ill-conditioned basis multiplies the two
    bases = [verdict.basis_condition for verdict in choice.verdicts.values() if verdict.basis_condition is not None]
    allowed = max(EXACT, 1e-16 * max([1.0, *bases]) ** 2)
    if plan is not None:
        write_fold(source_folder, folder / "out", plan)
        assert relative(logits(folder / "out", IDS), expected) < allowed
        assert {source.dims.stored_layer(i) for i, spec in enumerate(plan.recipe) if spec.name == "identity"} == exact

    others = set(choice.verdicts) - exact - net.kept
    if others and exact:  # each layer that is not exact, whole, beside those that are
        whole = plan_exact(source, kept=net.kept | others)
        assert whole.choice.claims == choice.claims
        write_fold(source_folder, folder / "whole", whole)
    for layer in others:
        if source.dims.n_heads * source.dims.d_head > 32:
            assert choice.verdicts[layer].how == ("least squares" if source.dims.stock else "refused")
            continue
        model = load(folder / "whole" if exact else source_folder)
        assert relative(model(IDS).logits, expected) < allowed
        sliced(model, net.family, layer)
        assert relative(model(IDS).logits, expected) > CHANGED
        index = choice.streams.of(("attention", layer))
        if index not in choice.claims and not choice.standing.intersection(choice.streams.streams[index].queries):
            forced = folder / f"claimed-{layer}"
            write_fold(source_folder, forced, claimed(source, layer))
            assert relative(logits(forced, IDS), expected) > CHANGED


@torch.no_grad()
def test_the_forcing_is_no_change_where_it_is_right(tmp_path):
    """The forced folds above are right where a fold is: their change is the rule's doing, not theirs."""
    for family in ("gpt2", "llama"):
        model = variant_model(family, norms=False, tie_word_embeddings=False, num_hidden_layers=2).double()
        model.save_pretrained(tmp_path / family)
        source, expected = open_checkpoint(tmp_path / family), logits(tmp_path / family, IDS)
        for layer in (0, 1):
            write_fold(tmp_path / family, tmp_path / f"{family}-{layer}", claimed(source, layer))
            assert relative(logits(tmp_path / f"{family}-{layer}", IDS), expected) < EXACT
        model = in_float64(tiny_model(family))
        if family == "gpt2":
            W = torch.block_diag(*torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)).double())
            model.transformer.h[1].attn.c_attn.weight[:, :32] = W
        else:
            model.model.layers[1].self_attn.q_proj.weight.copy_(torch.eye(32))
        expected = model(IDS).logits
        sliced(model, family, 1)
        assert relative(model(IDS).logits, expected) < EXACT
