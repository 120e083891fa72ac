"""The probe runs every piece of each map's conversion, small where the model is large; its seconds add up as they are
counted."""

from dataclasses import replace

import pytest
import torch
from conversions import QUICK

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.forecast import costs, random_layer, timer
from qectomy.conversion.forecast import probe as probe_module
from qectomy.conversion.forecast import seconds as seconds_module
from qectomy.conversion.forecast.checkpoint_speed import CheckpointSpeed
from qectomy.conversion.forecast.forecast import forecast
from qectomy.conversion.forecast.probe import WIDE_SHARE, probe
from qectomy.conversion.forecast.random_layer import at_most
from qectomy.conversion.forecast.seconds import layer_seconds, stage_seconds
from qectomy.conversion.forecast.timer import SLOWER, Speeds
from qectomy.conversion.forecast.work import JOINT_STEPS, plan_work
from qectomy.models.query_maps import QueryMapSpec, parse_recipe

ALWAYS = {
    "layer",
    "fast layer",
    "fast attention",
    "collecting",
    "layer of one token",
    "Gram of W_O",
    "Gram of W_down",
    "ridge regression",
    "eigenvectors",
    "eigenvectors in float64",
    "singular values",
    "slice of scores",
    "states written",
    "states read",
    "states kept",
}


@pytest.fixture
def quick(monkeypatch):
    """Let each piece be timed once."""
    monkeypatch.setattr(timer, "REPEATS", 1)


def planned(source, query="key-shared", **told):
    return plan_work(source, tuple(parse_recipe(query, source.dims)), **{**QUICK, **told})


@pytest.mark.parametrize(
    "shape, query, own",
    [
        ("llama", "key-shared", {"KL of a window", "attended window", "joint step", "refine step of key-shared"}),
        ("biases", "select", {"KL of a window", "start of select", "refine step of select"}),
        ("mistral", "identity", {"KL of a window", "start of identity", "refine step of identity"}),
        ("llama", "low-rank:3", {"KL of a window", "start of low-rank:3", "refine step of low-rank:3"}),
        ("gpt2", "identity", {"KL of a window", "attended window", "start of identity", "refine step of identity"}),
        ("gpt2", "key-shared", {"KL of a window", "attended window", "joint step", "refine step of key-shared"}),
        ("llama", "dense", set()),
    ],
)
def test_every_piece_of_a_map_is_timed(shape, query, own, quick, tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint(shape))
    speeds = probe(source, planned(source, query))
    assert speeds.pieces.keys() == ALWAYS | own
    assert not speeds.skipped
    assert all(seconds > 0 for seconds in speeds.pieces.values())
    stages = stage_seconds(source, planned(source, query), speeds)
    assert (stages["fitting"] > 0) is (query != "dense")
    assert all(seconds >= 0 for seconds in stages.values())


class Ticks:
    """A clock that goes on by a thousandth of a second each time it is looked at."""

    now = 0.0

    def __call__(self):
        self.now += 1e-3
        return self.now


def giant(source):
    """Return a checkpoint of Llama-70B's widths, with the tensors of a tiny one, and its work."""
    dims = replace(source.dims, d_model=8192, d_mlp=28672, n_heads=64, n_kv_heads=8, d_head=128, vocab_size=128256)
    large = replace(source, dims=dims)
    layer = dims.d_model * (2 * 8192 + 2 * 1024 + 3 * 28672)
    work = replace(planned(large, context=512, tokens=4096), layer=layer, largest=8192 * 28672)
    return large, work


def test_a_giant_is_probed_by_a_small_one(quick, tiny_checkpoint, monkeypatch):
    source, work = giant(open_checkpoint(tiny_checkpoint()))
    seen, made = [], random_layer.RandomLayer.__init__

    def look(self, source, dims, *arguments):
        seen.append(dims)
        made(self, source, dims, *arguments)

    monkeypatch.setattr(random_layer.RandomLayer, "__init__", look)
    monkeypatch.setattr(probe_module, "FIT_WIDTH", 256)
    monkeypatch.setattr(probe_module, "SOLVED", 128)
    monkeypatch.setattr(probe_module, "DECOMPOSED", 64)
    speeds = probe(source, work, budget=0.2, clock=Ticks())
    layer = seen[0]
    allowed = WIDE_SHARE * 0.2 / 6
    assert costs.layer(layer, 2, 512, 512) * speeds.product <= allowed
    twice = replace(layer, **{name: 2 * getattr(layer, name) for name in ("d_model", "d_mlp", "n_heads", "n_kv_heads")})
    assert costs.layer(twice, 2, 512, 512) * speeds.product > allowed  # no smaller than it must be
    assert 28672 / layer.d_mlp == 8192 / layer.d_model == 64 / layer.n_heads
    assert layer.d_head == 128
    share = costs.layer(work.dims, 2, 512, 512) / costs.layer(layer, 2, 512, 512)
    assert speeds.pieces["layer"] == pytest.approx(1e-3 * share)
    assert max(dims.d_model for dims in seen[2:]) <= 256


def test_what_there_is_no_time_for_is_taken_from_the_rate_of_products(tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint())
    work = planned(source)
    speeds = probe(source, work, budget=0.0, clock=Ticks())
    assert set(speeds.skipped) == speeds.pieces.keys() >= ALWAYS
    assert speeds.pieces["layer"] == pytest.approx(costs.layer(source.dims, 2, 320, 32) * SLOWER * speeds.product)
    assert speeds.pieces["joint step"] == pytest.approx(costs.joint_step(source.dims) * SLOWER * speeds.product)


@pytest.mark.parametrize(
    "d_model, wanted", [(8192, (8192, 28672, 64, 8)), (4096, (4096, 14336, 32, 4)), (9, (128, 448, 1, 1))]
)
def test_halving_stops_where_a_model_cannot_be_halved(d_model, wanted, tiny_checkpoint):
    dims = at_most(giant(open_checkpoint(tiny_checkpoint()))[0].dims, d_model)
    assert (dims.d_model, dims.d_mlp, dims.n_heads, dims.n_kv_heads) == wanted


def test_halving_keeps_whole_groups(tiny_checkpoint):
    dims = open_checkpoint(tiny_checkpoint()).dims
    odd = replace(dims, d_model=64, d_mlp=64, n_heads=6, n_kv_heads=2, d_head=8)
    assert at_most(odd, 8) == replace(odd, d_model=32, d_mlp=32, n_heads=3, n_kv_heads=1)
    assert at_most(replace(odd, n_heads=9, n_kv_heads=3), 8) == replace(odd, n_heads=9, n_kv_heads=3)


@pytest.mark.parametrize("shape", ["llama", "gpt2", "mistral"])
def test_a_resized_config_says_its_sizes(shape, tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint(shape))
    dims = at_most(source.dims, 16)
    assert dims.d_model == 16
    assert source.family.dimensions(source.family.resized(source.config, dims)) == dims


def one(name, work):
    """Return speeds at which one piece takes a second, and nothing else takes any time."""
    pieces = dict.fromkeys((*ALWAYS, "KL of a window", "attended window", "joint step"), 0.0)
    pieces |= {f"{what} of {spec}": 0.0 for what in ("refine step", "start") for spec in work.recipe}
    return Speeds(CheckpointSpeed(read=0.0, hash=0.0), 0.0, pieces | {name: 1.0})


def test_pieces_are_counted_as_a_conversion_makes_them(tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint())
    work = planned(source, tokens=4096, eval_tokens=1024, context=512)  # batches of one window: 8 fitted, 2 held
    spec = QueryMapSpec("key-shared")
    small = 1e-3  # for what is cast, which needs no piece

    def took(name):
        found = layer_seconds(work, one(name, work), spec, drifted=True)
        return {stage: pytest.approx(seconds, abs=small) for stage, seconds in found.items() if seconds > small}

    reduced = 1 - 32 * 32 / (32 * (2 * 32 + 2 * 16 + 3 * 40) + 512 * 32)  # a layer without W_Q, of its work
    assert took("layer") == {"forward": 2 * (1 + reduced)}
    assert took("fast layer") == {"forward": 8 * (1 + reduced), "refitting": 8 * reduced}
    assert took("fast attention") == {"refitting": 8}
    assert took("Gram of W_O") == took("Gram of W_down") == {"refitting": 8}
    assert took("collecting") == took("attended window") == {"fitting": 8}
    assert took("states read") == {"forward": 2 * 10, "fitting": 2 * 8, "refitting": 4 * 8}
    assert took("states written") == {"forward": 3 * 8 + 2 * 2, "fitting": 2 * 8}
    assert took("joint step") == {"fitting": JOINT_STEPS}
    assert took("refine step of key-shared") == {"fitting": 141}  # 400 sqrt(4096 / 32768)
    assert took("KL of a window") == {"measuring": 8 + 2}
    assert took("eigenvectors") == {"fitting": 2 * 32**3}
    assert took("singular values") == {"writing": 32**3}
    solved = {
        stage: sum(n**3 / 3 + n**2 * k + 50 * n**2 for n, k in sizes)
        for stage, sizes in {"fitting": [(32, 32), (32, 16)], "refitting": [(32, 32), (40, 32)]}.items()
    }
    assert took("ridge regression") == solved
    whole = stage_seconds(source, work, one("slice of scores", work))
    assert whole["scores"] == 1  # 320 words, 1024 tokens
    assert stage_seconds(source, work, one("states kept", work))["keeping"] == 3 * 2 * 10


def test_all_layers_add_up(tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint())
    work = planned(source, "0=dense,1=key-shared")
    speeds = one("refine step of key-shared", work)
    stages = stage_seconds(source, work, speeds, imports=7.0)
    assert stages["fitting"] == work.refine_steps
    assert stages["start"] == 7.0
    assert stages["reload"] >= 7.0
    assert stage_seconds(source, work, speeds)["start"] == seconds_module.IMPORTS


def test_a_forecast_adds_what_it_timed(quick, tiny_checkpoint, capsys):
    source = open_checkpoint(tiny_checkpoint("gpt2"))
    found = forecast(source, tuple(parse_recipe("select", source.dims)), **QUICK)
    assert found["seconds"] == pytest.approx(sum(found["stages"].values()), abs=0.2)
    assert found["probe_seconds"] > 0
    assert "timing this machine" in capsys.readouterr().err
    assert not torch.is_autocast_enabled("cpu")
