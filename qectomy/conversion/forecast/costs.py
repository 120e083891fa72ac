"""How much work each repeated piece of a conversion is, in products of two numbers, so that a small one stands for it.

Pieces are timed at sizes that this machine does quickly (`probe.py`); their time grows as these formulas do. Where a
piece also moves memory, that counts as so many products.
Dimensions: D d_model, M d_mlp, Q n_heads * d_head, S n_kv_heads * d_head, H n_heads, G n_kv_heads, K d_head.
"""

import math

from qectomy.conversion.forecast.work import ATTENDED_STRIDE, ROWS_STRIDE
from qectomy.models.family import Dimensions
from qectomy.models.query_maps import QueryMapSpec

MOVED = 50.0  # products in the time of making one entry of a matrix that is not kept in a cache
SOFTMAX = 60.0  # products in the time of one entry of logits, masked, raised and summed


def layer(dims: Dimensions, readers: int, tokens: int, context: int, with_query: bool = True) -> float:
    """A decoder layer on so many tokens."""
    query, key = dims.n_heads * dims.d_head, dims.n_kv_heads * dims.d_head
    weights = dims.d_model * ((1 + with_query) * query + 2 * key + (readers + 1) * dims.d_mlp)
    return float(tokens * (weights + context * query))


def attention(dims: Dimensions, tokens: int, context: int) -> float:
    """The attention half of a reduced layer, W_O included."""
    query, key = dims.n_heads * dims.d_head, dims.n_kv_heads * dims.d_head
    return float(tokens * (dims.d_model * (query + 2 * key) + context * query))


def collecting(dims: Dimensions, tokens: int) -> float:
    """Both second moments of a batch, and the teacher's queries and keys."""
    out = (dims.n_heads + dims.n_kv_heads) * dims.d_head
    return 2 * tokens * dims.d_model**2 + 2 * MOVED * dims.d_model**2 + tokens * dims.d_model * out


def attended(dims: Dimensions, context: int) -> float:
    """The keys' covariance under the teacher's attention in one window, for every KV head."""
    rows = context // ATTENDED_STRIDE
    heads = dims.n_heads * rows * context * (dims.d_head + SOFTMAX) + rows * context * dims.n_kv_heads * dims.d_model
    return heads + dims.n_kv_heads * (context + MOVED) * dims.d_model**2


def joint_step(dims: Dimensions) -> float:
    """A step of the key-shared start."""
    query, key = dims.n_heads * dims.d_head, dims.n_kv_heads * dims.d_head
    moved = (query + 10 * key) * dims.d_model * MOVED / 10
    return 2 * dims.d_model**2 * key + 3 * dims.d_model * query * dims.d_head + moved


def joint_turn(dims: Dimensions) -> float:
    """What the key-shared start looks at, turned into the eigenbasis of C, before its first step."""
    query, key = dims.n_heads * dims.d_head, dims.n_kv_heads * dims.d_head
    return float(dims.d_model**2 * (2 * dims.n_kv_heads * dims.d_model + query + 2 * key))


def refine_step(dims: Dimensions, spec: QueryMapSpec, windows: int, context: int) -> float:
    """A step of Adam on the attention KL of so many windows."""
    key, tokens = dims.n_kv_heads * dims.d_head, windows * context
    rows = tokens / ROWS_STRIDE
    logits = dims.n_heads * rows * context * (4 * dims.d_head + 2 * SOFTMAX)
    free = sum(math.prod(shape) for kind, shape in spec.stored(dims).values() if kind == "weight")
    return 2 * tokens * dims.d_model * key + 2 * dims.d_model**2 * key + logits + 2 * rows * free


def gram(n: int, d_model: int, tokens: int) -> float:
    """A batch's share of a regression on n inputs."""
    return n * (n + d_model) * (tokens + MOVED)


def solve(n: int, columns: int) -> float:
    """The ridge regression: an LU factorisation and its solutions, in float64."""
    return n**3 / 3 + n**2 * columns + MOVED * n**2


def attention_kl(dims: Dimensions, context: int) -> float:
    """x̂, queries and keys of both models in one window, and the KL of their attention."""
    query, key = dims.n_heads * dims.d_head, dims.n_kv_heads * dims.d_head
    return context * dims.d_model * (query + 2 * key) + dims.n_heads * context**2 * (dims.d_head + 2 * SOFTMAX)


def start(dims: Dimensions, spec: QueryMapSpec) -> float:
    """A map's closed form, but for the steps of `joint_step`."""
    query = dims.n_heads * dims.d_head
    if spec.name == "low-rank":
        return 12.0 * dims.d_model * query * min(dims.d_model, query)
    if spec.name == "select":
        return float(dims.d_model * query * (2 * dims.d_model + 50 * dims.d_head))
    return dims.d_model * query * (4 * dims.d_model + MOVED)


def cube(n: int) -> float:
    """An eigendecomposition or singular values of an n x n matrix."""
    return float(n) ** 3
