"""Reading --query: every valid recipe comes back as written, every other one is explained; and who names a map."""

import ast
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qectomy.errors import QueryMapError
from qectomy.models.family import Dimensions
from qectomy.models.query_maps import MAPS, NAMES, QueryMapSpec, any_of, parse_query_map, parse_recipe, refusal

PACKAGE = Path(__file__).parents[2] / "qectomy"


def dimensions(n_layers=6, *, d_model=64, n_heads=4, n_kv_heads=2, d_head=16, attention_bias=False, **options):
    return Dimensions(
        n_layers=n_layers,
        d_model=d_model,
        d_mlp=96,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        vocab_size=100,
        n_positions=64,
        tied=False,
        attention_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=False,
        **options,
    )


SPECS = st.one_of(
    st.sampled_from([QueryMapSpec(name) for name in NAMES if name != "low-rank"]),
    st.integers(1, 20).map(lambda rank: QueryMapSpec("low-rank", rank)),
)


@given(SPECS)
def test_a_spec_reads_back(spec):
    assert parse_query_map(str(spec)) == spec
    assert parse_query_map(f" {spec} ") == spec
    assert parse_recipe(str(spec), dimensions(3)) == [spec] * 3


@st.composite
def recipes(draw):
    """A model's length, its specs, and one of the ways to write them."""
    specs = draw(st.lists(SPECS, min_size=1, max_size=9))
    parts, start = [], 0
    while start < len(specs):
        stop = start
        while stop + 1 < len(specs) and specs[stop + 1] == specs[start] and draw(st.booleans()):
            stop += 1
        ways = [f"{start}-{stop}"]
        if start == stop:
            ways.append(str(start))
        if start == 0:
            ways.append(f"-{stop}")
        if stop == len(specs) - 1:
            ways.append(f"{start}-")
        parts.append(f"{draw(st.sampled_from(ways))}={specs[start]}")
        start = stop + 1
    return specs, draw(st.permutations(parts))


@given(recipes(), st.sampled_from([",", ", ", " ,"]))
def test_a_recipe_reads_back(recipe, comma):
    specs, parts = recipe
    assert parse_recipe(comma.join(parts), dimensions(len(specs))) == specs


@given(st.one_of(st.text(max_size=30), st.text("0123456789-=,: denslowrak", max_size=30)), st.integers(1, 12))
def test_any_text_gives_a_recipe_or_an_explanation(text, n_layers):
    try:
        recipe = parse_recipe(text, dimensions(n_layers))
    except QueryMapError:
        return
    assert len(recipe) == n_layers
    assert all(refusal(spec, dimensions(n_layers)) is None for spec in recipe)


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "keyshared",
            r"unknown query map 'keyshared'; known: identity, select, key-shared, low-rank:R, exact, dense.",
        ),
        ("keyshared", r"Did you mean 'key-shared'\?$"),
        ("lowrank:8", r"Did you mean 'low-rank'\?$"),
        ("Identity", r"Did you mean 'identity'\?$"),
        ("xyzzy", r"dense\.$"),
        ("", r"unknown query map ''"),
        ("low-rank", r"'low-rank': low-rank needs a positive whole rank, as in low-rank:32"),
        ("low-rank:", "low-rank needs a positive whole rank"),
        ("low-rank:0", "low-rank needs a positive whole rank"),
        ("low-rank:-3", "low-rank needs a positive whole rank"),
        ("low-rank:08", "low-rank needs a positive whole rank"),
        ("low-rank:1.5", "low-rank needs a positive whole rank"),
        ("low-rank:٣", "low-rank needs a positive whole rank"),
        ("low-rank:99999999", "low-rank needs a positive whole rank"),
        ("dense:3", r"'dense' takes no rank; write it without ':3'"),
        ("identity:", r"'identity' takes no rank"),
        (
            "0-2=dense,key-shared",
            r"'key-shared' in --query names no layers; write as in 0-2=dense,3-=key-shared",
        ),
        ("0-5=dense,", r"'' in --query names no layers"),
        ("0-2=dense,2-=select", r"layer 2 is named twice in --query '0-2=dense,2-=select'"),
        ("0-1=key-shared", r"says nothing of layer\(s\) 2-5 of 6; to leave them as they are add ,2-=dense$"),
        (
            "0-1=dense,4=select",
            r"says nothing of layer\(s\) 2-3, 5 of 6; to leave .* add ,2-3=dense,5=dense$",
        ),
        ("0-6=dense", r"layers '0-6' are outside this model, whose layers are 0-5"),
        ("9=dense", "layers '9' are outside this model"),
        ("4-2=dense", "layers '4-2' are outside"),
        ("-=dense", "cannot read the layers '-'; write 4, 0-2, 3- or -5"),
        ("=dense", "cannot read the layers ''"),
        ("1-2-3=dense", "cannot read the layers '1-2-3'"),
        ("a=dense", "cannot read the layers 'a'"),
        ("-1=dens", r"unknown query map 'dens'.*Did you mean 'dense'\?"),
        ("0-5=dense=select", "unknown query map 'dense=select'"),
        (
            "low-rank:32",
            r"stores 4,160 numbers a layer, not fewer than W_Q itself \(4,096\); choose a smaller rank",
        ),
        ("0-4=dense,5=low-rank:1000", "low-rank:1000 stores"),
    ],
)
def test_errors_say_what_to_write(text, message):
    with pytest.raises(QueryMapError) as error:
        parse_recipe(text, dimensions())
    assert re.search(message, str(error.value)), str(error.value)


def test_a_map_larger_than_the_projection_is_refused():
    one_head = dimensions(n_heads=1, n_kv_heads=1, d_head=64)
    with pytest.raises(QueryMapError, match=r"key-shared stores 4,096 numbers a layer, not fewer than W_Q"):
        parse_recipe("key-shared", one_head)
    assert parse_recipe("0-4=dense,5=select", one_head)[5].name == "select"


def test_parameters_by_hand():
    """The table of the design: SmolLM2-135M, GPT-2 small and Llama-2-7B lose 88.9, 91.7 and 96.9 % of W_Q."""
    for d_model, n_heads, share in ((576, 9, 0.889), (768, 12, 0.917), (4096, 32, 0.969)):
        dims = dimensions(d_model=d_model, n_heads=n_heads, n_kv_heads=n_heads // 3 or 1, d_head=d_model // n_heads)
        dense = QueryMapSpec("dense").parameters(dims)
        assert dense == d_model**2
        assert QueryMapSpec("identity").parameters(dims) == 0
        assert QueryMapSpec("select").parameters(dims) == 2 * d_model
        assert QueryMapSpec("low-rank", 7).parameters(dims) == d_model + 2 * 7 * d_model
        assert 1 - QueryMapSpec("key-shared").parameters(dims) / dense == pytest.approx(share, abs=5e-4)
    biased = dimensions(attention_bias=True)
    for spec, plain in (
        ("identity", 0),
        ("select", 128),
        ("key-shared", 1024),
        ("low-rank:2", 320),
        ("dense", 4096),
    ):
        assert parse_query_map(spec).parameters(biased) == plain + 64
    gpt2 = dimensions(n_kv_heads=4, attention_bias=True, rope=False, norm_shift=True, absorbs_query_bias=True)
    for spec, stored in (  # the norm's shift holds identity's bias, and a free key takes select's gain in
        ("identity", 0),
        ("select", 2 * 64),
        ("key-shared", 4 * 16 * 16 + 64),
        ("low-rank:2", 64 + 4 * 64 + 64),
        ("dense", 64 * 64 + 64),
    ):
        assert parse_query_map(spec).parameters(gpt2) == stored


@pytest.mark.parametrize(
    "suits, named",
    [
        (lambda query_map: True, "key-shared, select, identity or low-rank:R"),
        (lambda query_map: query_map.of_keys, "key-shared"),
        (lambda query_map: not query_map.plain, "key-shared, select or low-rank:R"),
    ],
)
def test_maps_are_named_by_what_they_are(suits, named):
    assert any_of(suits) == named


def test_a_map_has_its_file_and_is_named_nowhere_else():
    """Beside `query_maps.py` and the modules: what the rest knows of a map are its properties."""
    fitted = {path.stem.replace("_", "-") for path in (PACKAGE / "calibrate/maps").glob("*.py")} - {"--init--"}
    assert fitted == set(MAPS)
    named = set()
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "modeling" and path.name != "query_maps.py":
            constants = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
            named |= {(path.name, node.value) for node in constants if node.value in MAPS}
    assert named == {("nanogpt.py", "identity")}  # which is what a nanoGPT checkpoint says
