"""What a conversion holds, counted again by hand for one shape; and in a process, for one large enough to be seen."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from qectomy.conversion.forecast import commands
from qectomy.conversion.forecast.memory import (
    KERNELS,
    LIBRARIES,
    batch_bytes,
    held_by_stage,
    host_peak,
    layer_stages,
    peak,
)
from qectomy.conversion.forecast.work import Work
from qectomy.models.family import Dimensions
from qectomy.models.query_maps import QueryMapSpec

SHARED, TURNED = QueryMapSpec("key-shared"), QueryMapSpec("identity")
DIMS = Dimensions(
    n_layers=3,
    d_model=1000,
    d_mlp=3000,
    n_heads=10,
    n_kv_heads=5,
    d_head=100,
    vocab_size=7000,
    tied=False,
    attention_bias=False,
    output_bias=False,
    mlp_bias=False,
    n_positions=2048,
)
LAYER = 2 * 1_000_000 + 2 * 500_000 + 3 * 3_000_000 + 2 * 1000  # W_Q, W_O; W_K, W_V; gate, up, down; norms


def a_work(spec=SHARED, **changes):
    """Return a work of round numbers: bfloat16 throughout, 64 windows and 16 held out of 512 tokens."""
    reduced = LAYER - 1_000_000 + 10 * 100 * 100 * (spec.name == "key-shared")
    numbers = dict(
        dims=DIMS,
        recipe=(spec,) * 3,
        fitted=64,
        held=16,
        context=512,
        layer=LAYER,
        largest=3_000_000,
        reduced={spec: reduced},
        outside=28_000_000,
        read_itemsize=2,
        written_itemsize=2,
        fast_itemsize=2,
        mlp_readers=2,
    )
    return Work(**{**numbers, **changes})


def test_each_stage_by_hand():
    stages = layer_stages(a_work(), SHARED)
    batch = 512 * (4 * 6 * 1000 + 4 * (2 * 1500 + 3 * 3000))
    fast = 512 * (4 * 6 * 1000 + 2 * (2 * 1500 + 3 * 3000))
    cast = 2 * 2 * 3_000_000  # W_down in bfloat16, twice
    teacher, student, rounded = 4 * 12_002_000, 4 * 11_102_000, 4 * 11_102_000
    projections = 8 * 1_000_000 + 8 * 500_000
    moments = 2 * 8 * 1_000_000
    assert batch_bytes(a_work()) == batch
    assert stages["reading"] == teacher + 2 * 3_000_000
    assert stages["teacher"] == teacher + batch + cast
    assert stages["collecting"] == teacher + projections + moments + max(4_000_000 + 8_000_000 + batch, moments)
    assert stages["attended moments"] == teacher + projections + moments + 5 * 4_000_000 + 3 * 4_000_000
    carried = 8 * 1_000_000 + 8 * 500_000
    joint = 4_000_000 + 4 * 1_500_000 + 4 * 4_000_000 + 10 * 4 * 500_000
    assert stages["start"] == teacher + projections + moments + 5 * 4_000_000 + carried + joint
    adam = 10 * 4 * (500_000 + 10 * 100 * 100)
    step = 2 * (2048 * (2 * 1000 + 2 * 1000 + 6 * 500) + 6 * 1_000_000 + 2 * 500_000)
    assert stages["refining"] == teacher + projections + moments + 4_000_000 + adam + step
    window = 4 * (512 * (4 * 1000 + 4 * 1500) + 6 * 1_000_000)
    assert stages["measuring"] == teacher + 2 * 4 * 1000 * 500 + rounded + window
    last = 512 * (2 * 3000 + 3 * 4 * 1000)
    assert stages["refitting"] == student + 4 * 3_000_000 + last + 4 * 9_000_000 + 8 * 9_000_000
    assert stages["refitting"] > student + 4 * 9_000_000 + 4 * 3_000_000 + 6 * 256 * 3000 + fast + cast
    assert stages["writing"] == student + rounded + batch + cast


def test_a_turned_stream_holds_its_basis_and_two_first_layers():
    work = a_work(TURNED)
    stages, held = layer_stages(work, TURNED), held_by_stage(work)
    assert stages["reading"] == 3 * 4 * LAYER + 2 * 8 * 1_000_000 + 2 * 8 * 3_000_000
    tokens = 2 * 8 * 80 * 512
    assert held["reading"] == stages["reading"] + 8 * 1_000_000 + tokens
    assert held["embedding"] == 5 * 8 * 1_000_000 + 8 * 1_000_000 + tokens
    straight = held_by_stage(replace(work, dims=replace(DIMS, norm_shift=True)))
    assert straight["reading"] == 4 * LAYER + 2 * 3_000_000 + tokens


def test_an_accelerator_holds_what_the_fit_looks_at():
    here, there = layer_stages(a_work(context=64), SHARED), layer_stages(a_work(context=64, on_device=True), SHARED)
    assert there["attended moments"] - here["attended moments"] == 2 * 64 * 64 * (1000 + 1000 + 500)
    assert there["collecting"] > here["collecting"]  # larger batches besides
    assert host_peak(a_work(on_device=True)) == 520_000_000 + 4 * LAYER + 8 * 11_102_000 + 8 * 8192 * 1000


def test_weights_written_as_they_are_computed_are_not_held_twice():
    rounded, whole = layer_stages(a_work(), SHARED), layer_stages(a_work(written_itemsize=4), SHARED)
    for stage in ("measuring", "writing"):
        assert rounded[stage] - whole[stage] == 4 * 11_102_000


def test_the_peak_is_the_largest_stage_with_the_libraries():
    most, stage, stages = peak(a_work())
    assert stage == "refitting"
    assert most == stages[stage] == max(stages.values()) == held_by_stage(a_work())[stage] + LIBRARIES + KERNELS
    dense = QueryMapSpec("dense")
    mixed = a_work(recipe=(dense, SHARED, dense), reduced={SHARED: 11_102_000, dense: LAYER})
    assert held_by_stage(mixed)["start"] == held_by_stage(a_work())["start"]
    assert "start" not in held_by_stage(a_work(recipe=(dense,) * 3, reduced={dense: LAYER}))
    assert "refitting" not in held_by_stage(a_work(recipe=(dense,) * 3, reduced={dense: LAYER}))


@pytest.mark.parametrize("name", ["identity", "select", "key-shared", "low-rank:16", "dense"])
def test_more_never_takes_less(name):
    spec = QueryMapSpec("low-rank", 16) if ":" in name else QueryMapSpec(name)
    work = a_work(spec)
    wider = replace(DIMS, d_model=2000, d_mlp=6000, n_heads=20, n_kv_heads=10)
    larger = replace(work, dims=wider, layer=4 * LAYER, largest=12_000_000, reduced={spec: 4 * work.reduced[spec]})
    for more in (larger, replace(work, context=2048), replace(work, fitted=128), replace(work, fast_itemsize=4)):
        before, after = held_by_stage(work), held_by_stage(more)
        assert before.keys() == after.keys()
        if more.fast_itemsize == 2:
            assert all(after[stage] >= before[stage] for stage in before)
    before, after = held_by_stage(work), held_by_stage(larger)
    grown = [stage for stage in before if after[stage] > 2 * before[stage]]
    assert {"reading", "measuring", "writing"} <= set(grown)


@pytest.mark.parametrize("command", [commands.exact, commands.materialize, commands.verify, commands.streamed_eval])
def test_other_commands_hold_a_layer_as_it_is_stored_and_no_layer_more(command):
    """Their needs do not grow with the number of layers, but for the few positions that verify keeps of each."""
    stages = command(a_work())
    assert max(stages.values()) > 2 * LAYER or command is commands.materialize
    deeper = command(replace(a_work(), dims=replace(DIMS, n_layers=30)))
    kept = 2 * 8 * 64 * 3000 * 27 if command is commands.verify else 0
    assert {stage: deeper[stage] - stages[stage] for stage in stages if deeper[stage] != stages[stage]} == (
        {"in float64": kept} if kept else {}
    )


def test_other_commands_by_hand():
    work = a_work()
    assert commands.materialize(work)["layers"] == 2 * 11_102_000 + 8 * 1_500_000 + 8 * 4 * 1_000_000
    assert commands.materialize(work)["outside the layers"] == 2 * 7000 * 1000
    layers = 2 * LAYER + 4 * (8192 * 1000 + 2048 * (3 * 1000 + 3 * 3000))
    assert commands.streamed_eval(work)["layers"] == 4 * 8192 * 1000 + layers
    wide = replace(work, held=1, context=256)  # one window: W_down outweighs what its MLP computes of it
    layers = 2 * LAYER + 4 * (256 * 1000 + 256 * (3 * 1000 + 3000) + 3_000_000)
    assert commands.streamed_eval(wide)["layers"] == 4 * 256 * 1000 + layers
    assert commands.exact(work)["folding"] == 2 * LAYER + 8 * 3_000_000 + 8 * 2 * 1_500_000


REFIT = """
import re, sys
from pathlib import Path
import torch
from qectomy.calibrate.refit import Regression
from qectomy.distributed.window_shard import whole
from qectomy.checkpoint.memory import release_freed
n, d = 3000, 1000
inputs, lack = torch.randn(1, 512, n), torch.randn(1, 512, d)
# The kernels are loaded before the count.
small = Regression(inputs[..., :64], lack[..., :64], with_bias=False, share=whole(1))
small.add(inputs[..., :64], lack[..., :64])
small.change(1.0)
release_freed()
Path("/proc/self/clear_refs").write_text("5")
seen = lambda name: 1024 * int(re.search(name + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
start = seen("VmRSS")
sums = Regression(inputs, lack, with_bias=False, share=whole(1))
sums.add(inputs, lack)
sums.change(1.0)
print(seen("VmHWM") - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a part of a run is asked of /proc")
def test_the_refit_holds_what_is_counted():
    done = subprocess.run([sys.executable, "-c", REFIT], capture_output=True, text=True, check=True)
    if not re.fullmatch(r"\d+\n", done.stdout):
        pytest.fail(done.stdout)
    work = a_work()
    counted = layer_stages(work, SHARED)["refitting"] - 4 * 11_102_000 - 512 * (2 * 3000 + 3 * 4 * 1000)
    assert counted == 12 * 9_000_000 + 4 * 3_000_000
    assert 0.9 < int(done.stdout) / counted < 1.25
