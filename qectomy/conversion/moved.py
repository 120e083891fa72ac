"""How far a conversion moved what a layer keeps: each projection, bias and norm beside what stands in W_Q's place."""

import math

import torch

from qectomy.calibrate.hidden_states import batches
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.models.family import LayerRoles, LinearView
from qectomy.models.linear_views import Tensors, read_view
from qectomy.models.query_maps import QueryMapSpec
from qectomy.surgery.stream_basis import StreamBasis

Moved = dict[str, float | None]
ALWAYS = ("W_K", "W_V", "W_O", "W_down")  # told also where they did not move
AT_ONCE = 1_000_000  # numbers that are widened to float64 at a time


def moved_by(
    source: Checkpoint, layer: int, spec: QueryMapSpec, stored: Tensors, basis: StreamBasis | None = None
) -> Moved:
    """Return ‖W' - W‖ / ‖W‖ (Frobenius) of a layer's parts, W as the source stores it and W' as the output does.

    W_K, W_V, W_O and W_down always, others only where they moved; None: all numbers were 0 before. In a turned stream
    W is the source's in the new basis. A bias that only one of the two layers has is not compared.
    """
    family, found = source.family, Moved()
    turned = None
    if basis is not None:
        turned = basis.layer(family, source.read_layer(layer, torch.float32), scaled_embedding=layer == 0)

    def before(module: str) -> Tensors:
        if turned is not None:
            return turned
        names = {f"{module}.{kind}": f"{family.prefix(layer)}{module}.{kind}" for kind in ("weight", "bias")}
        return {short: source.read(name) for short, name in names.items() if name in source.tensors}

    for name, old, new in _projections(family.roles, spec):
        pairs = zip("Wb", read_view(before(old.module), old), read_view(stored, new), strict=True)
        found |= {
            f"{kind}_{name}": _relative(W, moved) for kind, W, moved in pairs if W is not None and moved is not None
        }
    norm = family.roles.attention_norm
    for name, tensor in before(norm).items():
        if name.rpartition(".")[0] == norm:
            found["norm_gain" if name.endswith("weight") else "norm_shift"] = _relative(tensor, stored[name])
    return {name: value for name, value in found.items() if name in ALWAYS or value != 0}


def _projections(roles: LayerRoles, spec: QueryMapSpec) -> list[tuple[str, LinearView, LinearView]]:
    """Return each projection's name, where a stock layer stores it, and where a layer of this map does."""
    stock = {"Q": (roles.query, "query"), "K": (roles.key, "key"), "V": (roles.value, "value")}
    now = roles.views(spec)
    attention = [(name, old, now[role]) for name, (old, role) in stock.items() if role in now]
    readers = dict(zip(("gate", "up")[-len(roles.mlp_readers) :], roles.mlp_readers, strict=True))
    rest = {"O": roles.output, **readers, "down": roles.mlp_out}
    return [*attention, *((name, view, view) for name, view in rest.items())]


def _relative(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Return ‖after - before‖ / ‖before‖, summed in float64 a few rows at a time."""
    change = size = 0.0
    for start, stop in batches(0, len(before), max(1, AT_ONCE * len(before) // before.numel())):
        old = before[start:stop].double()
        change += float((after[start:stop].double() - old).square().sum())
        size += float(old.square().sum())
    return math.sqrt(change / size) if size else None if change else 0.0
