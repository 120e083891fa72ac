"""The one rule of exact folding: a model's streams, who writes and reads them, and which changes of basis they allow.

A *stream* is a maximal set of hidden states that must share a basis: those linked by an identity skip, and those that
one stored matrix reads or writes in several places (layers that share their weights). Its writers (embedding, W_O,
W_down) and readers (W_Q, W_K, W_V, W_up, W_gate, the head) are linear, so the model computes the same when every
writer W becomes W Θ and every reader W becomes Θ⁻¹ W, for each Θ that what stands before the readers lets through:

    nothing                  any invertible Θ
    RMSNorm (gain folded)    an orthogonal Θ
    LayerNorm (gain folded)  an orthogonal Θ that keeps the mean direction, Θ 1 = 1
    a tied embedding and head in one stream   an orthogonal Θ, or the tie breaks

Rule: W_Q of a layer becomes the identity exactly when Θ = W_Q, up to each head's gauge and completed to a basis where
n_heads * d_head < d_model, is in the group of the stream that it reads, and no other layer has claimed that stream.
Likewise W_O with Θ = W_O⁻¹ and the stream that it writes; done here where nothing else writes that stream, so that W_O
need not be inverted. From this follow, without a case of their own, the theorems
of arXiv 2510.23912 (any single layer of a norm-free net; every layer when only attention has a skip; every layer when
the layers share weights) and of arXiv 2404.12362 (skipless nets, where W_O goes too).

Where embedding and head are tied but lie in two streams, E Θ₀ and Θ_f⁻¹ Eᵀ are one matrix again for Θ_f = Θ₀⁻ᵀ, and the
tie is kept. Torch is not imported here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from qectomy.models.family import Dimensions
from qectomy.models.query_maps import IDENTITY, QueryMapSpec

Place = tuple[str, int]  # ("attention" | "mlp", layer): the state that block reads; ("head", 0): what the head reads
HEAD: Place = ("head", 0)


class Group(Enum):
    """Which changes of basis pass through what stands before a stream's readers."""

    GENERAL = "any invertible change of basis"
    ORTHOGONAL = "an orthogonal change of basis"
    ORTHOGONAL_KEEPING_MEAN = "an orthogonal change of basis that keeps the mean direction"


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Hidden states that share a basis. Layers are named as they are stored."""

    places: frozenset[Place]
    queries: tuple[int, ...]  # layers whose attention reads it
    mlps: tuple[int, ...]  # layers whose MLP reads it
    outputs: tuple[int, ...]  # layers whose W_O writes it
    downs: tuple[int, ...]  # layers whose W_down writes it
    embedded: bool  # the embedding writes it
    headed: bool  # the head reads it
    group: Group
    why: str  # this group
    breaks_tie: bool  # a Θ that is not orthogonal breaks the tie of embedding and head

    @property
    def only_writer(self) -> int | None:
        """The layer whose W_O alone writes it, for its MLP alone."""
        alone = len(self.outputs) == 1 and not (self.downs or self.embedded or self.queries or self.headed)
        return self.outputs[0] if alone else None


@dataclass(frozen=True)
class Streams:
    """All streams of a model, and where each place lies."""

    dims: Dimensions
    streams: tuple[Stream, ...]

    def of(self, place: Place) -> int:
        """Return the index of the stream of a place."""
        return next(index for index, stream in enumerate(self.streams) if place in stream.places)

    @property
    def tie_spans_two(self) -> bool:
        """Whether one matrix is the embedding of one stream and the head of another."""
        return self.dims.tied and self.of(("attention", 0)) != self.of(HEAD)


def derive_streams(dims: Dimensions) -> Streams:
    """Return the streams of a model from its structure alone."""
    last = dims.n_layers - 1
    after = [("attention", layer + 1) if layer < last else HEAD for layer in range(dims.n_layers)]
    places: list[Place] = [(kind, layer) for layer in range(dims.n_layers) for kind in ("attention", "mlp")] + [HEAD]
    root = {place: place for place in places}

    def find(place: Place) -> Place:
        while root[place] != place:
            root[place] = root[root[place]]
            place = root[place]
        return place

    for a, b in _links(dims, after):
        root[find(a)] = find(b)
    together: dict[Place, set[Place]] = {}
    for place in places:
        together.setdefault(find(place), set()).add(place)
    return Streams(dims, tuple(_stream(frozenset(found), dims, after) for found in together.values()))


def structural_verdict(streams: Streams, layer: int) -> tuple[str, str]:
    """Return what becomes of a layer's W_Q as far as structure tells, and why: (how, reason).

    how: `exact`, by `gauge`, by `least squares`, or `refused`, which no tool here can do for it.
    """
    dims, stream = streams.dims, streams.streams[streams.of(("attention", layer))]
    by_gauge = not dims.rope and dims.gauge_pays
    otherwise = "gauge" if by_gauge else "least squares" if dims.stock else "refused"
    if dims.all_gauge:
        return "exact", "the model has one head, without RoPE: any W_Q is a gauge of it"
    if dims.norms:
        return otherwise, f"with {stream.why} it goes whole only if it is {stream.group.value}"
    if dims.n_heads * dims.d_head > dims.d_model:
        return otherwise, "queries have more channels than the stream (n_heads * d_head > d_model)"
    if stream.breaks_tie and not dims.untying_pays:
        cost = f"{dims.vocab_size * dims.d_model:,}"
        return (
            otherwise,
            f"Θ = W_Q breaks the tie of embedding and head, which costs {cost} parameters, no fewer than W_Q has",
        )
    if len(stream.queries) > 1:
        return "exact", f"{stream.why}: one of the {len(stream.queries)} layers on its stream, the best conditioned"
    return "exact", f"{stream.why}, so Θ = W_Q passes"


def structural_recipe(streams: Streams) -> tuple[tuple[QueryMapSpec, ...], Dimensions]:
    """Return what exact folding leaves of each layer if nothing is ill-conditioned, and the sizes of the result."""
    dims, taken = streams.dims, set[int]()
    merged = mergeable(streams)
    recipe = []
    for index in range(dims.n_layers):
        layer = dims.stored_layer(index)
        stream = streams.of(("attention", layer))
        exact = structural_verdict(streams, layer)[0] == "exact"
        if exact and not dims.all_gauge:  # by a change of basis, one a stream
            exact = stream not in taken or dims.shared_layers
            taken.add(stream)
        value = "gauge" if dims.gauge_pays else "dense"
        query = IDENTITY if exact else value if not dims.rope else "dense"
        recipe.append(QueryMapSpec(query, value=value, output="merged" if layer in merged else "dense"))
    untied = any(streams.streams[index].breaks_tie for index in taken)
    return tuple(recipe), replace(dims, tied=dims.tied and not untied)


def mergeable(streams: Streams) -> set[int]:
    """Return the layers whose W_O can be multiplied into the MLP: square, no norm between, a place for its bias."""
    dims = streams.dims
    if dims.norms or dims.n_heads * dims.d_head != dims.d_model or dims.mlp_bias < dims.output_bias:
        return set()
    return {stream.only_writer for stream in streams.streams if stream.only_writer is not None}


def _links(dims: Dimensions, after: list[Place]) -> Iterator[tuple[Place, Place]]:
    """Yield the pairs of places whose states must share a basis."""
    for layer in range(dims.n_layers):
        if dims.attention_skip:
            yield ("attention", layer), ("mlp", layer)
        if dims.mlp_skip:
            yield ("mlp", layer), after[layer]
        if dims.shared_layers:  # one W_Q, W_up and W_down for all
            yield ("attention", layer), ("attention", 0)
            yield ("mlp", layer), ("mlp", 0)
            yield after[layer], after[0]


def _stream(places: frozenset[Place], dims: Dimensions, after: list[Place]) -> Stream:
    def stored(found: Iterator[int]) -> tuple[int, ...]:
        return tuple(sorted({dims.stored_layer(layer) for layer in found}))

    layers = range(dims.n_layers)
    embedded, headed = ("attention", 0) in places, HEAD in places
    if dims.norms:
        group = Group.ORTHOGONAL_KEEPING_MEAN if dims.norm_shift else Group.ORTHOGONAL
        why = f"{'LayerNorm' if dims.norm_shift else 'RMSNorm'} before its readers"
    elif dims.tied and embedded and headed:
        group, why = Group.ORTHOGONAL, "no norm before its readers, but one matrix, tied, writes and reads it"
    else:
        group, why = Group.GENERAL, "no norm before its readers"
    return Stream(
        places=places,
        queries=stored(layer for layer in layers if ("attention", layer) in places),
        mlps=stored(layer for layer in layers if ("mlp", layer) in places),
        outputs=stored(layer for layer in layers if ("mlp", layer) in places),
        downs=stored(layer for layer in layers if after[layer] in places),
        embedded=embedded,
        headed=headed,
        group=group,
        why=why,
        breaks_tie=dims.tied and embedded and headed and not dims.norms,
    )
