"""Fold one layer: its tensors in the bases that its streams have taken, its heads in their gauge, its W_Q gone.

    x ──► norm ──► Q, K, V ──► heads ──► W_O ──► (+ x) ──► norm ──► MLP ──► W_down ──► (+) ──► next
    before              gauge: A, pivots     middle                            after

A query bias lies in the state that attention reads: there x' = x Θ + c with c = b_Q A. The norm's shift holds c, or,
without a norm, the bias of the writer before it, and W_O's bias takes it away again; the values' bias gives up c W_V,
and keys need nothing, since softmax does not see a constant in them.
Dimensions: D d_model, H n_heads, K d_head; weights (in, out), as in x W. All algebra in float64.
"""

from dataclasses import dataclass

import torch

from qectomy.models.family import Dimensions, LayerRoles, LinearView
from qectomy.models.heads import join_heads, split_heads
from qectomy.models.linear_views import Projection, read_view, store_views, without_views
from qectomy.models.query_maps import QueryMapSpec
from qectomy.surgery.basis import Basis, QueryFold
from qectomy.surgery.gauge import fold_pivots
from qectomy.surgery.norm_fusion import absorb_gain, without_gain

Tensors = dict[str, torch.Tensor]
PARTS = ("weight", "bias")  # of a norm


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What happens to one layer. `pivots` (n, K) are those of all heads of the projections that `spec` names gauged."""

    spec: QueryMapSpec
    before: Basis | None = None
    middle: Basis | None = None
    after: Basis | None = None
    fold: QueryFold | None = None
    pivots: torch.Tensor | None = None
    shift_after: torch.Tensor | None = None  # c of the next layer's queries, which W_down's bias brings in

    @property
    def moves_mlp(self) -> bool:
        """Whether the MLP's matrices change: they are most of a layer, and stay as they are stored otherwise."""
        moved = (self.middle, self.after, self.shift_after)
        return self.spec.output == "merged" or any(change is not None for change in moved)


@dataclass
class _Parts:
    """A layer's logical parts, float64."""

    query: Projection
    key: Projection
    value: Projection
    output: Projection
    mlp_readers: list[Projection]  # none of them, nor ...
    mlp_out: Projection | None  # ... this one, where the MLP stays as it is
    taken_away: torch.Tensor | None = None  # c (D,), which W_O's bias takes out of the stream again


def fold_layer(tensors: Tensors, dims: Dimensions, roles: LayerRoles, plan: LayerPlan) -> Tensors:
    """Return the tensors of the folded layer, by name inside the layer; those that change in float64."""
    parts = _parts(tensors, roles, mlp=plan.moves_mlp)
    norms = _fold_norms(tensors, dims, roles, plan, parts)
    if plan.fold is not None:
        _fold_query(dims, roles, plan.fold, norms, parts)
    _fold_value_bias(dims, plan.spec, parts)
    gauge = _gauge(dims, roles, plan, parts)
    _write_streams(plan, parts)
    if plan.spec.name != "dense" and parts.query[1] is not None:
        gauge[f"{roles.gauge if plan.spec.name == 'gauge' else roles.query_map}.bias"] = parts.query[1]
        parts.query = parts.query[0], None
    kept = [(view, getattr(parts, role)) for role, view in roles.views(plan.spec).items()]
    kept += [(roles.output, parts.output)] if plan.spec.output == "dense" else []
    gone: tuple[LinearView, ...] = (roles.query, roles.key, roles.value, roles.output)
    if parts.mlp_out is not None:
        kept += [(roles.mlp_out, parts.mlp_out), *zip(roles.mlp_readers, parts.mlp_readers, strict=True)]
        gone += (*roles.mlp_readers, roles.mlp_out)
    return without_views(tensors, gone) | norms | gauge | store_views(kept)


def readers_in_basis(
    tensors: Tensors, dims: Dimensions, roles: LayerRoles, plan: LayerPlan
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return W_Q and W_V as they read their stream once it has its new basis: what pivots are chosen for."""
    parts = _parts(tensors, roles, mlp=False)
    _fold_norms(tensors, dims, roles, plan, parts)
    return parts.query[0], parts.value[0]


def fold_norm(
    gamma: torch.Tensor, beta: torch.Tensor | None, basis: Basis, keep: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return (gain', shift', the gain g (D,) that its readers absorb) of a norm whose input becomes x Θ.

    norm(x Θ) gain' + shift' read by Θ⁻¹ diag(g) W is norm(x) γ + β read by W, for an orthogonal Θ. The gain goes into
    the readers, g = γ, and the shift follows as β / γ; with `keep`, one gain common to all channels stays.
    Raises UnsupportedArchitecture where a gain is 0 and its shift is not.
    """
    stays = keep and bool((gamma == gamma[0]).all())
    gain, absorbed = (gamma, torch.ones_like(gamma)) if stays else (torch.ones_like(gamma), gamma)
    if beta is None:
        return gain, None, absorbed
    return gain, without_gain(beta, absorbed, "a norm of a folded stream") @ basis.theta, absorbed


def _parts(tensors: Tensors, roles: LayerRoles, mlp: bool) -> _Parts:
    def read(view: LinearView) -> Projection:
        W, bias = read_view(tensors, view)
        return W.double(), None if bias is None else bias.double()

    return _Parts(
        query=read(roles.query),
        key=read(roles.key),
        value=read(roles.value),
        output=read(roles.output),
        mlp_readers=[read(view) for view in roles.mlp_readers] if mlp else [],
        mlp_out=read(roles.mlp_out) if mlp else None,
    )


def _fold_norms(tensors: Tensors, dims: Dimensions, roles: LayerRoles, plan: LayerPlan, parts: _Parts) -> Tensors:
    """Turn the readers into their streams' bases; return the norms' new tensors."""
    new: Tensors = {}
    absorbed: dict[str, torch.Tensor | None] = {roles.attention_norm: None, roles.mlp_norm: None}
    for norm, basis in ((roles.attention_norm, plan.before), (roles.mlp_norm, plan.middle)):
        if not dims.norms:
            continue
        gain, shift = (tensors[f"{norm}.{name}"].double() if f"{norm}.{name}" in tensors else None for name in PARTS)
        assert gain is not None
        if basis is not None:
            gain, shift, absorbed[norm] = fold_norm(gain, shift, basis)
        elif norm == roles.attention_norm and plan.fold is not None and plan.fold.scale is not None:
            gain, absorbed[norm] = gain * plan.fold.scale, 1 / plan.fold.scale
        new[f"{norm}.weight"] = gain
        if shift is not None:
            new[f"{norm}.bias"] = shift

    def turned(reader: Projection, norm: str, basis: Basis | None) -> Projection:
        gain = absorbed[norm]
        W, bias = reader if gain is None else absorb_gain(gain, reader)
        return (W if basis is None else basis.inverse @ W), bias

    for role in ("query", "key", "value"):
        setattr(parts, role, turned(getattr(parts, role), roles.attention_norm, plan.before))
    parts.mlp_readers = [turned(reader, roles.mlp_norm, plan.middle) for reader in parts.mlp_readers]
    return new


def _fold_query(dims: Dimensions, roles: LayerRoles, fold: QueryFold, norms: Tensors, parts: _Parts) -> None:
    """Bring the heads into the fold's gauge, and the queries' bias to where it can lie."""
    (W_K, b_K), (W_Q, b_Q) = parts.key, parts.query
    inverse = torch.linalg.inv(fold.gauge[:: dims.n_heads // dims.n_kv_heads]).mT  # heads that share a key share A
    bias = None if b_K is None else (b_K.view(-1, 1, dims.d_head) @ inverse).flatten()
    parts.key = join_heads(split_heads(W_K, dims.d_head) @ inverse), bias
    if b_Q is None:
        return
    if dims.absorbs_query_bias and dims.norms:  # the shift becomes what the queries are of a state that it alone makes
        name = f"{roles.attention_norm}.bias"
        shift = query_shift(b_Q + norms[name] @ W_Q, fold, dims)
        c, norms[name] = shift - norms[name], shift
    else:
        c = query_shift(b_Q, fold, dims)
    parts.query = W_Q, None if dims.absorbs_query_bias else c[: len(b_Q)]
    if not dims.absorbs_query_bias:
        return
    if not dims.norms and dims.attention_skip:
        parts.taken_away = c
    W_V, b_V = parts.value
    assert b_V is not None
    parts.value = W_V, b_V - c @ W_V


def query_shift(b_Q: torch.Tensor, fold: QueryFold, dims: Dimensions) -> torch.Tensor:
    """Return c (D,): what the state that attention reads must hold beside x Θ for its slices to be the queries."""
    turned = (b_Q.double().view(dims.n_heads, 1, dims.d_head) @ fold.gauge).flatten()
    return torch.cat([turned, turned.new_zeros(dims.d_model - len(turned))])


def _fold_value_bias(dims: Dimensions, spec: QueryMapSpec, parts: _Parts) -> None:
    """Drop the keys' bias where softmax alone sees it, and put the values' into W_O's, where that has one."""
    (W_V, b_V), (W_O, b_O) = parts.value, parts.output
    if not dims.rope and spec.name != "dense":
        parts.key = parts.key[0], None
    leaves = spec.value == "gauge" or (not dims.rope and spec.name != "dense")
    if b_V is None or b_O is None or not leaves:
        return
    parts.value = W_V, None
    b_V = b_V.view(-1, dims.d_head).repeat_interleave(dims.n_heads // dims.n_kv_heads, 0).flatten()
    parts.output = W_O, b_O + b_V @ W_O


def _gauge(dims: Dimensions, roles: LayerRoles, plan: LayerPlan, parts: _Parts) -> Tensors:
    """Give the projections that `spec` names identity blocks at their pivots, and leave their other rows.

    Returns what is stored beside them.
    """
    if plan.pivots is None:
        return {}
    pivots = dict(zip(plan.spec.gauged, plan.pivots.chunk(len(plan.spec.gauged)), strict=True))
    if "query" in pivots:
        (W_Q, b_Q), (W_K, b_K) = parts.query, parts.key
        rest, inverse = fold_pivots(split_heads(W_Q, dims.d_head), pivots["query"])
        if b_Q is not None:
            b_Q = torch.linalg.solve(inverse, b_Q.view(-1, 1, dims.d_head), left=False).flatten()
        parts.query = join_heads(rest), b_Q
        parts.key = join_heads(split_heads(W_K, dims.d_head) @ inverse.mT), b_K
    if "value" in pivots:
        rest, inverse = fold_pivots(split_heads(parts.value[0], dims.d_head), pivots["value"])
        b_V = parts.value[1]
        if b_V is not None:
            b_V = torch.linalg.solve(inverse, b_V.view(-1, 1, dims.d_head), left=False).flatten()
        parts.value = join_heads(rest), b_V
        rows = parts.output[0].unflatten(0, (-1, dims.d_head))  # (H, K, D)
        inverse = inverse.repeat_interleave(dims.n_heads // dims.n_kv_heads, 0)
        parts.output = (inverse @ rows).flatten(0, 1), parts.output[1]
    return {f"{roles.gauge}.pivots": plan.pivots.to(torch.int32)}


def _write_streams(plan: LayerPlan, parts: _Parts) -> None:
    """Turn the writers into their streams' bases, or put W_O into the MLP's readers."""
    W_O, b_O = parts.output
    if plan.spec.output == "merged":
        parts.mlp_readers = [(W_O @ W, b if b_O is None or b is None else b + b_O @ W) for W, b in parts.mlp_readers]
    elif plan.middle is not None:
        W_O, b_O = W_O @ plan.middle.theta, None if b_O is None else b_O @ plan.middle.theta
    if parts.taken_away is not None:
        assert b_O is not None
        b_O = b_O - parts.taken_away
    parts.output = W_O, b_O
    if parts.mlp_out is None:
        return
    W, b = parts.mlp_out
    if plan.after is not None:
        W, b = W @ plan.after.theta, None if b is None else b @ plan.after.theta
    if plan.shift_after is not None:
        assert b is not None
        b = b + plan.shift_after
    parts.mlp_out = W, b
