"""The query maps: their names, what each one stores, and the per-layer recipe.

Torch is not imported here, so that `qectomy inspect` answers at once. The maps themselves, as modules, are
in `modeling_qectomy_*.py`, where a test holds the shapes given here against theirs; how they are fitted is told in
`calibrate/maps/`. Elsewhere a map is known by its properties alone.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from qectomy.errors import QueryMapError, shown
from qectomy.models.family import Dimensions

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class QueryMap:
    """What stands where W_Q stood: `stored`, {tensor name: shape} for (dimensions, rank), a bias not counted."""

    stored: Callable[[Dimensions, int], dict[str, Shape]]
    ranked: bool = False  # named with a rank R, as in low-rank:R
    plain: bool = False  # the queries are channels of the stream as they are: what is done to them is done to it
    of_keys: bool = False  # the queries are made of keys: W_K is fitted for both


def _n_query(dims: Dimensions) -> int:
    return dims.n_heads * dims.d_head


def _select(dims: Dimensions, rank: int) -> dict[str, Shape]:
    gain = {"gain": (_n_query(dims),)} if dims.rope else {}  # without RoPE a key takes the gain in
    return {"index": (_n_query(dims),), **gain}


def _key_shared(dims: Dimensions, rank: int) -> dict[str, Shape]:
    return {"mix": (dims.n_heads, dims.d_head, dims.d_head)}


def _low_rank(dims: Dimensions, rank: int) -> dict[str, Shape]:
    return {"gain": (_n_query(dims),), "down": (rank, dims.d_model), "up": (_n_query(dims), rank)}


MAPS = {
    "identity": QueryMap(stored=lambda dims, rank: {}, plain=True),
    "select": QueryMap(stored=_select),
    "key-shared": QueryMap(stored=_key_shared, of_keys=True),
    "low-rank": QueryMap(stored=_low_rank, ranked=True),
}
INDICES = {"index"}  # tensors of channel numbers
NAMES = (*MAPS, "dense")
WRITTEN = tuple(f"{name}:R" if query_map.ranked else name for name, query_map in MAPS.items())
KNOWN = ", ".join((*WRITTEN, "exact", "dense"))
KEPT = QueryMap(stored=lambda dims, rank: {})  # W_Q itself, dense or in its gauge
DEFAULT = "key-shared"
IDENTITY = "identity"  # which exact folding leaves, too


@dataclass(frozen=True)
class QueryMapSpec:
    """One layer's query map: a name and, for low-rank, its rank R; and what exact folding made of W_V and W_O.

    `gauge`, for W_Q or W_V: the block of each head at d_head pivot channels is the identity, and not stored. `merged`,
    for W_O: multiplied into the MLP's readers.
    """

    name: str
    rank: int | None = None
    value: str = "dense"  # or gauge
    output: str = "dense"  # or merged

    def __str__(self) -> str:
        return self.name if self.rank is None else f"{self.name}:{self.rank}"

    @property
    def query_map(self) -> QueryMap:
        return MAPS.get(self.name, KEPT)

    @property
    def gauged(self) -> list[str]:
        """The projections whose heads have an identity block, in the order in which they are stored."""
        return [role for role, how in (("query", self.name), ("value", self.value)) if how == "gauge"]

    def stored(self, dims: Dimensions) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return {tensor name: (kind, shape)} of what stands in W_Q's place; kind is 'weight' or 'index'.

        `dense` stores the original projection and so returns nothing here.
        """
        shapes = self.query_map.stored(dims, self.rank or 0)
        absorbed = self.query_map.plain and dims.absorbs_query_bias
        if dims.attention_bias and self.query_map is not KEPT and not absorbed:
            shapes["bias"] = (_n_query(dims),)
        return {name: ("index" if name in INDICES else "weight", shape) for name, shape in shapes.items()}

    def parameters(self, dims: Dimensions) -> int:
        """Return how many numbers (gains, biases and indices included) the map stores for one layer."""
        n_query = _n_query(dims)
        bias = n_query if dims.attention_bias else 0
        if self.name == "dense":
            return n_query * dims.d_model + bias
        if self.name == "gauge":
            return n_query * (dims.d_model - dims.d_head) + n_query + bias
        return sum(math.prod(shape) for _, shape in self.stored(dims).values())


def parse_query_map(text: str) -> QueryMapSpec:
    """Read one map's name, `low-rank:R` with its rank. Raises QueryMapError that lists the known maps."""
    name, colon, rank = text.strip().partition(":")
    if name == "exact":
        raise QueryMapError(
            "exact is no map of a single layer, and nothing is fitted for it; --query exact stands alone"
        )
    if name not in NAMES:
        close = get_close_matches(name[:40], NAMES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise QueryMapError(f"unknown query map {shown(text.strip())}; known: {KNOWN}.{hint}")
    if not MAPS.get(name, KEPT).ranked:
        if colon:
            raise QueryMapError(f"query map {name!r} takes no rank; write it without {shown(':' + rank)}")
        return QueryMapSpec(name)
    if not re.fullmatch(r"[1-9][0-9]{0,6}", rank):
        raise QueryMapError(f"{shown(text.strip())}: {name} needs a positive whole rank, as in {name}:32")
    return QueryMapSpec(name, int(rank))


def stored_maps(query: str, value: str = "dense", output: str = "dense") -> QueryMapSpec:
    """Read one layer's maps as a reduced model's config names them. Raises QueryMapError for an unknown one."""
    for field, name, known in (("value", value, ("dense", "gauge")), ("output", output, ("dense", "merged"))):
        if name not in known:
            raise QueryMapError(f"unknown {field} map {shown(name)}; known: {', '.join(known)}")
    spec = QueryMapSpec("gauge") if query == "gauge" else parse_query_map(query)
    return replace(spec, value=value, output=output)


def parse_recipe(text: str, dims: Dimensions) -> list[QueryMapSpec]:
    """Read `MAP` or a per-layer list like `0-2=dense,3-=key-shared` into one spec a layer.

    Layers count from 0; `3-` runs to the last, `-3` from the first. Every layer must be named exactly once.
    Raises QueryMapError for an unknown map, a range outside the model, a layer named twice or not at all,
    and a map that would not be smaller than W_Q.
    """
    recipe = [parse_query_map(name) for name in _name_layers(text, dims.n_layers)]
    for spec in set(recipe):
        why = refusal(spec, dims)
        if why:
            raise QueryMapError(why)
    return recipe


def parse_exact(text: str, dims: Dimensions) -> frozenset[int] | None:
    """Return the layers that a recipe of `exact` leaves `dense`, or None if `exact` stands nowhere in it.

    Raises QueryMapError for another map beside `exact`: a fitted layer moves the states that later ones fold.
    """
    if "exact" not in {part.rpartition("=")[2].strip() for part in text.split(",")}:
        return None
    names = _name_layers(text, dims.n_layers)
    if others := set(names) - {"exact", "dense"}:
        raise QueryMapError(
            f"--query {shown(text)}: beside exact a layer can only stay dense, not {shown(sorted(others)[0])}"
        )
    if dims.shared_layers and len(set(names)) > 1:
        raise QueryMapError(
            f"--query {shown(text)}: the layers share their weights, so they are all exact or all dense"
        )
    return frozenset(layer for layer, name in enumerate(names) if name == "dense")


def _name_layers(text: str, n_layers: int) -> list[str]:
    """Return the map that a recipe names for each layer."""
    if "=" not in text:
        return [text.strip()] * n_layers
    chosen: dict[int, str] = {}
    for part in text.split(","):
        layers, equals, name = part.partition("=")
        if not equals:
            raise QueryMapError(
                f"{shown(part.strip())} in --query names no layers; write as in 0-2=dense,3-=key-shared"
            )
        for layer in _parse_layers(layers.strip(), n_layers):
            if layer in chosen:
                raise QueryMapError(f"layer {layer} is named twice in --query {shown(text)}")
            chosen[layer] = name.strip()
        if name.strip() != "exact":
            parse_query_map(name)
    missing = [layer for layer in range(n_layers) if layer not in chosen]
    if missing:
        last = str(n_layers - 1)
        open_ended = (
            part.removesuffix(last) if part.endswith(f"-{last}") else part for part in ranges(missing).split(", ")
        )
        rest = "".join(f",{part}=dense" for part in open_ended)
        raise QueryMapError(
            f"--query {shown(text)} says nothing of layer(s) {ranges(missing)} of {n_layers}; to leave them as "
            f"they are add {rest}"
        )
    return [chosen[layer] for layer in range(n_layers)]


def refusal(spec: QueryMapSpec, dims: Dimensions) -> str | None:
    """Return why this map makes no sense for a model of these dimensions, or None."""
    if spec.name == "dense":
        return None
    dense, full = QueryMapSpec("dense").parameters(dims), min(dims.d_model, _n_query(dims))
    if spec.parameters(dims) >= dense:
        others = any_of(lambda query_map: not query_map.ranked)
        return (
            f"query map {spec} stores {spec.parameters(dims):,} numbers a layer, not fewer than W_Q itself "
            f"({dense:,}); choose a smaller rank, or {others}"
        )
    if spec.rank is not None and spec.rank >= full:
        return f"query map {spec}: the rank must be below {full}"
    return None


def any_of(suits: Callable[[QueryMap], bool]) -> str:
    """Name the maps that suit, the last first and those with a rank at the end: 'key-shared, select or identity'."""
    found = [name for name, query_map in zip(WRITTEN, MAPS.values(), strict=True) if suits(query_map)]
    found.reverse()
    *most, last = sorted(found, key=lambda name: ":" in name)
    return f"{', '.join(most)} or {last}" if most else last


def turns_stream(recipe: Iterable[QueryMapSpec], dims: Dimensions) -> bool:
    """Whether the residual stream goes to another basis: some queries are its channels, and no norm adds a shift."""
    return not dims.norm_shift and any(spec.query_map.plain for spec in recipe)


def _parse_layers(text: str, n_layers: int) -> range:
    match = re.fullmatch(r"(?P<start>[0-9]{0,6})(?P<dash>-?)(?P<stop>[0-9]{0,6})", text)
    if match is None or not (match["start"] or match["stop"]):
        raise QueryMapError(f"cannot read the layers {shown(text)}; write 4, 0-2, 3- or -5")
    start = int(match["start"] or 0)
    if not match["dash"]:
        stop = start
    else:
        stop = int(match["stop"]) if match["stop"] else n_layers - 1
    if start > stop or stop >= n_layers:
        raise QueryMapError(f"layers {shown(text)} are outside this model, whose layers are 0-{n_layers - 1}")
    return range(start, stop + 1)


def written(recipe: tuple[QueryMapSpec, ...]) -> str:
    """Return what `parse_recipe` reads as this recipe, if every map is one that can be asked for."""
    layers: dict[str, list[int]] = {}
    for layer, spec in enumerate(recipe):
        layers.setdefault(str(spec), []).append(layer)
    if len(layers) == 1:
        return next(iter(layers))
    return ",".join(f"{run}={name}" for name, found in layers.items() for run in ranges(found).split(", "))


def ranges(layers: list[int]) -> str:
    """Write [0, 1, 2, 5] as '0-2, 5'."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
