"""How a W_Q goes exactly, and the change of basis that takes it out: the rule of `streams.py`.

A layer's W_Q becomes the identity in one of two ways.
    standing   it is block-diagonal already, so that a gauge of its heads (or, under RoPE, the norm's gain) makes it the
               identity in the basis as it stands; any number of layers of a stream
    basis      Θ = [W_Q A, complement], if the stream's group has it; one layer claims a stream, the best conditioned
Dimensions: D d_model, H n_heads, K d_head; weights (in, out), as in x W. All algebra in float64.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import torch

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.shards import DTYPES
from qectomy.models.family import Dimensions
from qectomy.models.heads import join_heads, split_heads
from qectomy.models.linear_views import read_view
from qectomy.surgery.audit import condition_number
from qectomy.surgery.gauge import orthonormal_gauge, pair_scales
from qectomy.surgery.streams import HEAD, Group, Place, Stream, Streams

SINGULAR = 1e13  # a condition number beyond which float64 cannot tell a matrix from a singular one
LOST = 1.0  # rounding times condition beyond which the target dtype keeps nothing of a product


@dataclass(frozen=True)
class Basis:
    """A change of basis of a stream, x' = x Θ; both (D, D)."""

    theta: torch.Tensor
    inverse: torch.Tensor

    @property
    def orthogonal(self) -> bool:
        return torch.equal(self.inverse, self.theta.mT)


@dataclass(frozen=True, kw_only=True)
class QueryFold:
    """How a layer's queries become slices of what its attention reads.

    `gauge` A (H, K, K): the new queries are q A, the new keys k A⁻ᵀ. `scale` (D,): what the norm's gain takes in.
    `condition` of Θ, 1 where the basis stands.
    """

    gauge: torch.Tensor
    basis: Basis | None = None
    scale: torch.Tensor | None = None
    condition: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """What becomes of a layer's W_Q, and why, in one line; `condition` of W_Q where that matters, else None."""

    how: str  # exact, gauge, least squares, refused, or kept
    reason: str
    condition: float | None = None
    basis_condition: float | None = None
    ill: bool = False  # nothing but its conditioning stands in the way


@dataclass
class Choice:
    """What of a checkpoint goes exactly. Layers are named as they are stored."""

    streams: Streams
    eps: float  # rounding of the finer of the source's and the target's types
    claims: dict[int, int] = field(default_factory=dict)  # stream -> the layer whose W_Q is its Θ
    standing: set[int] = field(default_factory=set)  # layers that need no change of basis
    merged: set[int] = field(default_factory=set)  # layers whose W_O goes into the MLP
    untied: bool = False
    kept: frozenset[int] = frozenset()  # layers that stay whole, as asked
    verdicts: dict[int, Verdict] = field(default_factory=dict)

    def folded(self, layer: int) -> bool:
        """Whether a layer's W_Q becomes the identity."""
        return layer in self.standing or layer in self.claims.values()

    def condition(self, place: Place) -> float:
        """Return the condition number of the change of basis at a place; 1 where the basis stands."""
        index = self.streams.of(place)
        if index in self.claims:
            return self.verdicts[self.claims[index]].basis_condition or 1.0
        follows = self.streams.tie_spans_two and index == self.streams.of(HEAD)
        return self.condition(("attention", 0)) if follows else 1.0


def standing_fold(W_Q: torch.Tensor, dims: Dimensions) -> QueryFold | None:
    """Return the fold of a W_Q that is the identity up to its heads' gauge or the norm's gain, or None.

    Without RoPE W_Q (D, H*K) must be block-diagonal; with it, diagonal.
    """
    n_query = W_Q.shape[1]
    if n_query > dims.d_model:
        return None
    square = W_Q.double()[:n_query]
    blocks = square.unflatten(1, (dims.n_heads, -1)).unflatten(0, (dims.n_heads, -1))  # (H, K, H, K)
    own = blocks[torch.arange(dims.n_heads), :, torch.arange(dims.n_heads)]  # (H, K, K)
    if bool(W_Q[n_query:].any()) or not torch.equal(torch.block_diag(*own), square):
        return None
    if not float(torch.linalg.cond(own).max()) < SINGULAR:
        return None
    if not dims.rope:
        return QueryFold(gauge=torch.linalg.inv(own))
    diagonal = own.diagonal(dim1=1, dim2=2)  # (H, K)
    if not torch.equal(torch.diag_embed(diagonal), own):
        return None
    shared = diagonal.view(dims.n_kv_heads, -1, 2, dims.d_head // 2)
    if torch.equal(shared, shared[:, :1, :1].expand_as(shared)):  # passes RoPE: one scale a pair and KV head
        return QueryFold(gauge=torch.diag_embed(1 / diagonal))
    if not dims.norms:
        return None
    scale = torch.cat([diagonal.flatten(), torch.ones(dims.d_model - n_query, dtype=torch.float64)])
    return QueryFold(gauge=torch.eye(dims.d_head).double().repeat(dims.n_heads, 1, 1), scale=scale)


def basis_fold(W_Q: torch.Tensor, dims: Dimensions, group: Group, tolerance: float) -> QueryFold | None:
    """Return the fold with Θ = [W_Q A, complement], or None where Θ is not in the group or W_Q is singular.

    W_Q (D, H*K) has the norm's gain folded in. A makes the heads' columns as orthonormal as the gauge allows, which
    conditions Θ best. `tolerance` is how far from orthogonal, |Θ - polar(Θ)| / |Θ|, rounding can leave a Θ.
    """
    W = W_Q.double()
    if W.shape[1] > dims.d_model:
        return None
    if group is Group.ORTHOGONAL_KEEPING_MEAN:  # states of mean 0 do not see a constant in a column
        W = W - W.mean(0) + 1 / dims.d_model
    blocks = split_heads(W, dims.d_head)
    try:
        A = pair_scales(blocks, dims.n_heads // dims.n_kv_heads) if dims.rope else orthonormal_gauge(blocks)
        if group is Group.ORTHOGONAL_KEEPING_MEAN:
            A = torch.eye(dims.d_head).double().repeat(dims.n_heads, 1, 1)
    except torch.linalg.LinAlgError:
        return None
    columns = join_heads(blocks @ A)
    if group is not Group.GENERAL:
        off = columns.mT @ columns - torch.eye(columns.shape[1], dtype=torch.float64)
        if float(off.square().mean(0).sum().sqrt()) > 3 * tolerance:  # every W_Q there is, or nearly; spares an SVD
            return None
        U, S, Vh = torch.linalg.svd(_completed(columns))
        theta = U @ Vh
        near = float((S - 1).square().mean().sqrt()) <= tolerance
        return QueryFold(gauge=A, basis=Basis(theta, theta.mT)) if near else None
    theta = _completed(columns)
    condition = condition_number(theta)
    if not condition < SINGULAR:
        return None
    return QueryFold(gauge=A, basis=Basis(theta, torch.linalg.inv(theta)), condition=condition)


def _completed(W: torch.Tensor) -> torch.Tensor:
    """Return W (D, n) with orthonormal columns beside it, orthogonal to its own, of its own mean size: (D, D).

    They are the Cholesky factor of the projection onto what W leaves, with pivots: the same on every machine.
    """
    d_model, n = W.shape
    if d_model == n:
        return W
    Q, S, _ = torch.linalg.svd(W, full_matrices=False)
    left, added = torch.eye(d_model, dtype=W.dtype) - Q @ Q.mT, []
    for _ in range(d_model - n):
        size = left.diagonal()
        best = int((size > size.max() - 1e-6).nonzero()[0])  # the first of those that are as large as any
        added.append(left[:, best] / left[best, best].sqrt())
        left = left - added[-1][:, None] * added[-1]
    return torch.cat([W, torch.stack(added, 1) * S.log().mean().exp()], 1)


def usable_error(dtype: str) -> float:
    """Return the largest difference of a logit, of the largest logit, that rounding to a dtype may leave behind."""
    return min(0.1, max(1e-6, 1e4 * rounding(dtype)))


def rounding(dtype: str) -> float:
    """Return the spacing of numbers near 1 of a safetensors dtype."""
    return torch.finfo(DTYPES[dtype]).eps


class Folds:
    """Reads a checkpoint's W_Q and folds it, keeping the last few."""

    def __init__(self, source: Checkpoint, choice: Choice):
        self.source, self.choice = source, choice
        self._made = lru_cache(maxsize=2)(self._make)  # a layer's and the next one's

    def query(self, layer: int) -> QueryFold | None:
        """Return the fold of a stored layer's W_Q; None if it keeps it."""
        return self._made(layer) if self.choice.folded(layer) else None

    def basis(self, place: tuple[str, int]) -> Basis | None:
        """Return the change of basis at a place; None: the basis stands."""
        streams = self.choice.streams
        index = streams.of(place)
        if index in self.choice.claims:
            fold = self.query(self.choice.claims[index])
            return None if fold is None else fold.basis
        if streams.tie_spans_two and index == streams.of(HEAD):
            first = self.basis(("attention", 0))
            return None if first is None else Basis(first.inverse.mT, first.theta.mT)
        return None

    def _make(self, layer: int) -> QueryFold | None:
        if layer in self.choice.standing:
            return standing_fold(read_query(self.source, layer), self.source.dims)
        stream = self.choice.streams.streams[self.choice.streams.of(("attention", layer))]
        return claim(self.source, layer, stream, self.choice.eps)


def read_query(source: Checkpoint, layer: int, with_gain: bool = False) -> torch.Tensor:
    """Return W_Q (D, H*K) of a layer in float64, the norm's gain folded in if asked."""
    roles, prefix = source.family.roles, source.prefix(layer)
    name = f"{roles.query.module}.weight"
    W, _ = read_view({name: source.read(prefix + name, torch.float64)}, roles.query)
    if with_gain and source.dims.norms:
        W = source.read(f"{prefix}{roles.attention_norm}.weight", torch.float64)[:, None] * W
    return W


def claim(source: Checkpoint, layer: int, stream: Stream, eps: float) -> QueryFold | None:
    """Return the fold by which a layer's W_Q claims its stream, or None if it is not in the stream's group.

    `eps` is the rounding of the finer of the source's and the target's types.
    """
    W_Q = read_query(source, layer, with_gain=True)
    tolerance = max(eps / 2, 1e-13)  # the singular values of a float64 W_Q are no more exact
    fold = basis_fold(W_Q, source.dims, stream.group, tolerance)
    if fold is None and stream.breaks_tie and source.dims.untying_pays:
        return basis_fold(W_Q, source.dims, Group.GENERAL, tolerance)
    return fold
