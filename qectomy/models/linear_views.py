"""Read and write the logical projections of a layer, whatever tensors hold them. Weights are (in, out), as in x W."""

from collections.abc import Mapping

import torch

from qectomy.models.family import LayerRoles, LinearView, Orientation
from qectomy.models.heads import join_heads, split_heads, unfold_pivots
from qectomy.models.query_maps import QueryMapSpec

Tensors = Mapping[str, torch.Tensor]
Projection = tuple[torch.Tensor, torch.Tensor | None]  # W (in, out) and its bias (out,)


def oriented(W: torch.Tensor, view: LinearView) -> torch.Tensor:
    """Return W (in, out) as `view` stores it, or what it stores as (in, out)."""
    return W.T if view.orientation is Orientation.OUT_IN else W


def read_view(tensors: Tensors, view: LinearView) -> Projection:
    """Return a projection of a layer's tensors, by name inside the layer; no copy is made."""
    (index, parts), bias = view.part, tensors.get(f"{view.module}.bias")
    W = oriented(tensors[f"{view.module}.weight"], view)
    return W.chunk(parts, 1)[index], None if bias is None else bias.chunk(parts)[index]


def store_views(projections: list[tuple[LinearView, Projection]]) -> dict[str, torch.Tensor]:
    """Return the tensors, by name inside the layer, that hold the projections: all parts of a fused one, or none."""
    stored: dict[str, list[tuple[LinearView, Projection]]] = {}
    for view, projection in projections:
        stored.setdefault(view.module, []).append((view, projection))
    tensors = {}
    for module, parts in stored.items():
        parts.sort(key=lambda pair: pair[0].part)
        assert [view.part for view, _ in parts] == [(i, len(parts)) for i in range(len(parts))], module
        W = parts[0][1][0] if len(parts) == 1 else torch.cat([W for _, (W, _) in parts], 1)  # a copy may weigh a lot
        tensors[f"{module}.weight"] = oriented(W, parts[0][0]).contiguous()
        biases = [bias for _, (_, bias) in parts if bias is not None]
        assert len(biases) in (0, len(parts)), f"{module}: some parts have a bias and some have none"
        if biases:
            tensors[f"{module}.bias"] = torch.cat(biases)
    return tensors


def without_views(tensors: Tensors, views: tuple[LinearView, ...]) -> dict[str, torch.Tensor]:
    """Return the tensors of a layer that hold none of the projections, nor anything inside their modules."""
    prefixes = tuple(f"{view.module}." for view in views)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}


def read_maps(tensors: Tensors, roles: LayerRoles, spec: QueryMapSpec, d_head: int) -> dict[str, Projection]:
    """Return W_K and W_V, and W_Q if it is dense or in the gauge, of a layer of these maps, all (d_model, out)."""
    of_first = f"{roles.gauge}.bias"  # not one of all the projections that the module holds
    weights = {name: tensor for name, tensor in tensors.items() if not spec.gauged or name != of_first}
    found = {role: read_view(weights, view) for role, view in roles.views(spec).items()}
    for role in spec.gauged:
        (place, parts), rest = roles.views(spec)[role].part, split_heads(found[role][0], d_head)
        pivots = tensors[f"{roles.gauge}.pivots"].long().chunk(parts)[place]
        bias = tensors.get(of_first) if place == 0 else None
        found[role] = join_heads(unfold_pivots(rest, pivots)), bias
    return found


def add_through(tensors: Tensors, output: LinearView, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the tensors of `output` whose bias takes in what adding `value` (in,) to its input does; in float64."""
    W, bias = read_view(tensors, output)
    assert bias is not None
    return store_views([(output, (W, (bias.double() + value.double() @ W.double()).to(bias.dtype)))])


def with_query(tensors: Tensors, roles: LayerRoles, query: Projection) -> dict[str, torch.Tensor]:
    """Return a stock layer's tensors with another query; keys and values, fused with it or not, stay."""
    rest = [(view, read_view(tensors, view)) for view in (roles.key, roles.value)]
    return {**tensors, **store_views([(roles.query, query), *rest])}
