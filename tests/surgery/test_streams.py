"""Streams: by hand for the paper's structures, by following the states one by one, and by turning them at random."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from foldings import in_float64, relative
from tiny_models import tokens, variant_model

from qectomy.models.architectures import FAMILIES
from qectomy.surgery.streams import HEAD, Group, derive_streams

FLAGS = ("attention_skip", "mlp_skip", "shared_layers")
STRUCTURES = [dict(zip(FLAGS, flags, strict=True)) for flags in product((True, False), repeat=3)]


def name_of(value):
    if not isinstance(value, dict):
        return str(value)
    skips = {(1, 1): "skips", (1, 0): "attention-skip", (0, 1): "mlp-skip", (0, 0): "skipless"}
    return skips[value["attention_skip"], value["mlp_skip"]] + ("-shared" if value["shared_layers"] else "")


def dims_of(family="llama", **fields):
    config = variant_model(family, **fields).config.to_dict()
    return FAMILIES[family].dimensions({**config, "model_type": f"qectomy_{family}"})


def plain(n_layers, **fields):
    return dims_of(num_hidden_layers=n_layers, norms=False, tie_word_embeddings=False, **fields)


def summary(streams):
    """Each stream as (queries, mlps, outputs, downs, embedded, headed), in order."""
    return {(s.queries, s.mlps, s.outputs, s.downs, s.embedded, s.headed) for s in streams.streams}


ALL, NONE = (0, 1, 2), ()
BY_HAND = {  # of three layers: who reads (W_Q, MLP), who writes (W_O, W_down), the embedding, the head
    "skips": {(ALL, ALL, ALL, ALL, True, True)},
    "attention-skip": {
        ((0,), (0,), (0,), NONE, True, False),
        ((1,), (1,), (1,), (0,), False, False),
        ((2,), (2,), (2,), (1,), False, False),
        (NONE, NONE, NONE, (2,), False, True),
    },
    "mlp-skip": {
        ((0,), NONE, NONE, NONE, True, False),
        ((1,), (0,), (0,), (0,), False, False),
        ((2,), (1,), (1,), (1,), False, False),
        (NONE, (2,), (2,), (2,), False, True),
    },
    "skipless": {
        ((0,), NONE, NONE, NONE, True, False),
        (NONE, (0,), (0,), NONE, False, False),
        ((1,), NONE, NONE, (0,), False, False),
        (NONE, (1,), (1,), NONE, False, False),
        ((2,), NONE, NONE, (1,), False, False),
        (NONE, (2,), (2,), NONE, False, False),
        (NONE, NONE, NONE, (2,), False, True),
    },
    "skips-shared": {((0,), (0,), (0,), (0,), True, True)},
    "attention-skip-shared": {((0,), (0,), (0,), (0,), True, True)},
    "mlp-skip-shared": {((0,), (0,), (0,), (0,), True, True)},
    "skipless-shared": {
        ((0,), NONE, NONE, (0,), True, True),  # W_down writes what W_Q reads and what the head reads
        (NONE, (0,), (0,), NONE, False, False),
    },
}
ONE_LAYER = {
    "skips": {((0,), (0,), (0,), (0,), True, True)},
    "attention-skip": {((0,), (0,), (0,), NONE, True, False), (NONE, NONE, NONE, (0,), False, True)},
    "mlp-skip": {((0,), NONE, NONE, NONE, True, False), (NONE, (0,), (0,), (0,), False, True)},
    "skipless": {
        ((0,), NONE, NONE, NONE, True, False),
        (NONE, (0,), (0,), NONE, False, False),
        (NONE, NONE, NONE, (0,), False, True),
    },
}


@pytest.mark.parametrize("structure", STRUCTURES, ids=name_of)
def test_by_hand(structure):
    assert summary(derive_streams(plain(3, **structure))) == BY_HAND[name_of(structure)]
    expected = ONE_LAYER[name_of({**structure, "shared_layers": False})]  # one layer shares with none
    assert summary(derive_streams(plain(1, **structure))) == expected


@pytest.mark.parametrize("structure", STRUCTURES, ids=name_of)
def test_only_skipless_outputs_write_alone(structure):
    writers = {stream.only_writer for stream in derive_streams(plain(3, **structure)).streams} - {None}
    assert writers == {"skipless": {0, 1, 2}, "skipless-shared": {0}}.get(name_of(structure), set())


def followed(dims):
    """Partition the places by following the states: whatever one sum or one stored matrix sees is one stream."""
    state_of, seen = {}, {}  # place -> state; (matrix, side) -> states that it has seen there
    merges, n_states = [], 1

    def matrix(name, layer, side, state):
        seen.setdefault((name, 0 if dims.shared_layers else layer, side), []).append(state)

    x = 0
    for layer in range(dims.n_layers):
        state_of["attention", layer] = x
        matrix("W_Q", layer, "reads", x)
        attended, thought, n_states = n_states, n_states + 1, n_states + 2
        matrix("W_O", layer, "writes", attended)
        if dims.attention_skip:
            merges.append((x, attended))
        state_of["mlp", layer] = attended
        matrix("W_up", layer, "reads", attended)
        matrix("W_down", layer, "writes", thought)
        if dims.mlp_skip:
            merges.append((attended, thought))
        x = thought
    state_of[HEAD] = x
    merges += [(states[0], other) for states in seen.values() for other in states]
    label, before = list(range(n_states)), None
    while label != before:
        before = list(label)
        for a, b in merges:
            label[a] = label[b] = min(label[a], label[b])
    return {frozenset(p for p, s in state_of.items() if label[s] == one) for one in set(label)}


@pytest.mark.parametrize("n_layers", [1, 2, 3, 6])
@pytest.mark.parametrize("structure", STRUCTURES, ids=name_of)
def test_following_the_states_finds_the_same_streams(structure, n_layers):
    dims = plain(n_layers, **structure)
    streams = derive_streams(dims)
    assert {stream.places for stream in streams.streams} == followed(dims)
    for index, stream in enumerate(streams.streams):
        assert {streams.of(place) for place in stream.places} == {index}


def turned(model, theta_of):
    """Put a norm-free Llama in the bases that `theta_of` gives each place, by the equations, in place."""
    layers, last = model.model.layers, len(model.model.layers) - 1
    done = set()  # layers that share their weights are one object

    def write(linear, place):
        if id(linear) not in done:
            done.add(id(linear))
            linear.weight.copy_(theta_of(place).T @ linear.weight)

    def read(linear, place):
        if id(linear) not in done:
            done.add(id(linear))
            linear.weight.copy_(torch.linalg.solve(theta_of(place), linear.weight.T).T)

    embedding = model.model.embed_tokens
    embedding.weight.copy_(embedding.weight @ theta_of(("attention", 0)))
    for index, layer in enumerate(layers):
        attention, mlp = ("attention", index), ("mlp", index)
        for name in ("q_proj", "k_proj", "v_proj"):
            read(getattr(layer.self_attn, name), attention)
        write(layer.self_attn.o_proj, mlp)
        read(layer.mlp.gate_proj, mlp)
        read(layer.mlp.up_proj, mlp)
        write(layer.mlp.down_proj, ("attention", index + 1) if index < last else HEAD)
    model.lm_head.weight.copy_(torch.linalg.solve(theta_of(HEAD), model.lm_head.weight.T).T)


def invertible(seed):
    """An invertible matrix of moderate condition, far from the identity."""
    generator = torch.Generator().manual_seed(seed)
    Q, _ = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64))
    return Q * (0.5 + torch.rand(32, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("structure", STRUCTURES, ids=name_of)
@torch.no_grad()
def test_a_stream_turns_as_one_and_not_in_parts(structure, n_layers):
    """One Θ a stream keeps the logits; another at any one place of a stream that has more does not."""
    fields = dict(num_hidden_layers=n_layers, norms=False, **structure)
    streams = derive_streams(plain(n_layers, **structure))
    expected = in_float64(variant_model("llama", **fields))(tokens()).logits

    def turned_logits(apart=None):
        model = in_float64(variant_model("llama", **fields))
        turned(model, lambda place: invertible(99 if place == apart else streams.of(place)))
        return model(tokens()).logits

    assert relative(turned_logits(), expected) < 1e-10
    for stream in streams.streams:
        stored = {("attention", 0), ("mlp", 0), HEAD} if structure["shared_layers"] else stream.places
        places = stream.places & stored
        for place in places if len(places) > 1 else ():
            assert relative(turned_logits(apart=place), expected) > 1e-3, place


@pytest.mark.parametrize(
    "family, fields, group",
    [
        ("llama", dict(norms=True), Group.ORTHOGONAL),
        ("llama", dict(norms=True, tie_word_embeddings=True), Group.ORTHOGONAL),
        ("gpt2", dict(norms=True, tie_word_embeddings=False), Group.ORTHOGONAL_KEEPING_MEAN),
        ("gpt2", dict(norms=True), Group.ORTHOGONAL_KEEPING_MEAN),
        ("llama", dict(norms=False), Group.GENERAL),
        ("llama", dict(norms=False, tie_word_embeddings=True), Group.ORTHOGONAL),
        ("gpt2", dict(norms=False), Group.ORTHOGONAL),
        ("gpt2", dict(norms=False, tie_word_embeddings=False), Group.GENERAL),
    ],
    ids=str,
)
def test_groups(family, fields, group):
    (stream,) = derive_streams(dims_of(family, **fields)).streams
    assert stream.group is group
    assert (
        {"llama": "RMSNorm", "gpt2": "LayerNorm"}[family] in stream.why
        if fields["norms"]
        else ("tied" in stream.why) == (group is Group.ORTHOGONAL)
    )
    assert not derive_streams(dims_of(family, **fields)).tie_spans_two


@pytest.mark.parametrize("structure", STRUCTURES, ids=name_of)
def test_a_tie_across_streams_binds_neither(structure):
    """A tied matrix that writes one stream and reads another leaves both free; in one stream it binds it."""
    dims = replace(plain(2, **structure), tied=True)
    streams = derive_streams(dims)
    one = structure["shared_layers"] or (structure["attention_skip"] and structure["mlp_skip"])
    assert streams.tie_spans_two == (not one)
    for stream in streams.streams:
        bound = one and stream.embedded
        assert stream.group is (Group.ORTHOGONAL if bound else Group.GENERAL)
    assert not derive_streams(replace(dims, tied=False)).tie_spans_two
