"""A conversion that is killed, at any moment and however often, goes on to the bytes of one that never was."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conversions import convert_tiny, reload_here
from interruptions import PowerCut, in_a_child, same_output
from nanogpt_checkpoints import made
from tiny_models import tiny_tokenizer

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.exact import convert_exact
from qectomy.conversion.layerwise import LayerPass
from qectomy.conversion.settings import ConvertSettings
from qectomy.runs.run_dir import RunDir
from qectomy.runs.step_writer import StepWriter
from qectomy.surgery.materialize import materialize
from qectomy.surgery.nanogpt import import_nanogpt
from qectomy.surgery.norm_fusion import fold_norms

RUNS = {  # (shape, layers, query map, dtype): with RoPE and without, a turned stream, indices, two types
    "llama key-shared": ("llama", 4, "key-shared", None),
    "llama mixed bf16": ("llama", 4, "0=dense,1=identity,2=select,3=low-rank:2", "bfloat16"),
    "gpt2 mixed": ("gpt2", 3, "0=select,1=dense,2=select", None),
}
KILLS = 9  # of each run in each of two ways: 54


@dataclass
class Run:
    """A conversion that can be made again and again: its source, its output, and what it takes when nothing happens."""

    source: Path
    query: str
    text: Path
    dtype: str | None
    out: Path
    seconds: float = 0.0
    calls: int = 0  # that change the disk

    def convert(self, out, **options):
        return convert_tiny(self.source, out, self.query, self.text, dtype=self.dtype, **options)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, raven, tmp_path_factory):
    """Return a function (name) -> the Run of that name, made once and never killed."""
    made = {}

    def make(name):
        if name not in made:
            shape, layers, query, dtype = RUNS[name]
            source = tiny_checkpoint(shape, num_hidden_layers=layers)
            run = Run(source, query, raven, dtype, tmp_path_factory.mktemp("whole") / "out")
            counter, begun = PowerCut(10**9, random.Random(0)), time.perf_counter()
            with pytest.MonkeyPatch.context() as patch:
                counter.install(patch)
                run.convert(run.out)
            run.seconds, run.calls = time.perf_counter() - begun, 10**9 - counter.left
            made[name] = run
        return made[name]

    return make


@pytest.fixture
def nothing_is_lost(monkeypatch):
    """Whoever resumes finds every step that was kept as it was written; the disk did what it said."""
    right = StepWriter.__init__

    def init(self, *arguments, **named):
        right(self, *arguments, **named)
        assert self.lost == 0, "a step that was kept is damaged"

    monkeypatch.setattr(StepWriter, "__init__", init)


def killed_again_and_again(run, place, attempt):
    """Kill the run KILLS times by `attempt`, which resumes it; compare whenever one gets to its end, and at last."""
    kills = outputs = 0
    while kills < KILLS:
        out = place / f"out-{outputs}"
        ended = attempt(out)
        assert ended in ("killed", "done"), ended
        kills += ended == "killed"
        if out.exists():  # killed or not: it is whole as soon as it is there
            same_output(out, run.out)
            outputs += 1
    out = place / f"out-{outputs}"
    run.convert(out, resume=True)
    same_output(out, run.out)
    assert not RunDir(out).path.exists()


@pytest.mark.usefixtures("nothing_is_lost")
@pytest.mark.parametrize("name", RUNS)
def test_killed_at_random_moments(name, whole, tmp_path):
    run, chance = whole(name), random.Random(name)

    def attempt(out):
        return in_a_child(lambda: run.convert(out, resume=True), kill_after=chance.uniform(0, 0.6 * run.seconds))

    killed_again_and_again(run, tmp_path, attempt)


@pytest.mark.usefixtures("nothing_is_lost")
@pytest.mark.parametrize("name", RUNS)
def test_the_power_is_cut_at_a_random_call(name, whole, tmp_path):
    run, chance = whole(name), random.Random(name)

    def attempt(out):
        cut = PowerCut(chance.randrange(run.calls // 2), chance)

        def act():
            with pytest.MonkeyPatch.context() as patch:
                cut.install(patch)
                run.convert(out, resume=True)

        return in_a_child(act)

    killed_again_and_again(run, tmp_path, attempt)


# A run that was left in the middle, and what can happen to its files


@pytest.fixture(scope="module")
def left(whole, tmp_path_factory):
    """A run that was killed when three of its four layers were kept: the Run and its work folder, not to be changed."""
    run = whole("llama key-shared")
    out = tmp_path_factory.mktemp("left") / "out"

    def stop_after(self, *arguments, **named):
        keep(self, *arguments, **named)
        if len(self._run.journal.entries) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    keep = StepWriter.keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepWriter, "keep", stop_after)
        assert in_a_child(lambda: run.convert(out)) == "killed"
    return run, RunDir(out).path


@pytest.fixture
def again(left, tmp_path):
    """Return a function that copies the run that was left, damages the copy, resumes it and compares.

    It returns how many layers were not made anew.
    """
    run, folder = left
    outputs = iter(range(10_000))

    def go(damage=lambda folder: None):
        out = tmp_path / f"out-{next(outputs)}"
        copy = shutil.copytree(folder, RunDir(out).path)
        damage(copy)
        made = []
        with pytest.MonkeyPatch.context() as patch:
            layer = LayerPass._layer
            patch.setattr(
                LayerPass, "_layer", lambda self, index, *rest: made.append(index) or layer(self, index, *rest)
            )
            run.convert(out, resume=True)
        same_output(out, run.out)
        return 4 - len(made)

    return go


def lines(folder):
    return (folder / "journal").read_bytes().splitlines(keepends=True)


def test_a_run_goes_on_from_the_last_layer_that_was_kept(again):
    assert again() == 3


@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.9999])
@pytest.mark.parametrize("tail", [b"", bytes(4096)])
def test_a_torn_last_line_costs_one_layer(part, tail, again):
    def tear(copy):
        *before, last = lines(copy)
        (copy / "journal").write_bytes(b"".join(before) + last[: int(part * len(last))] + tail)

    assert again(tear) == 2


@pytest.mark.parametrize("line, kept", [(3, 2), (2, 1), (1, 0), (0, 0)])
def test_a_byte_that_flips_in_the_journal(line, kept, again):
    """States are there for the last three steps, as no layer had begun to write others."""

    def flip(copy):
        data = bytearray((copy / "journal").read_bytes())
        data[sum(map(len, lines(copy)[:line])) + 200] ^= 1
        (copy / "journal").write_bytes(data)

    assert again(flip) == kept


SHARD = "result/model.safetensors"


def flipped(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, kept",
    [
        ("header", 3),  # it is written anew
        ("embedding", 0),
        ("third layer", 2),
        ("fourth layer", 3),  # which was not kept
        ("head", 0),
        ("cut short", 0),
        ("grown", 3),
        ("zeros at the end", 0),
        ("gone", 0),
    ],
)
def test_a_shard_that_is_damaged(damage, kept, left, again):
    _, folder = left
    header = int.from_bytes((folder / SHARD).read_bytes()[:8], "little")
    offsets = json.loads((folder / SHARD).read_bytes()[8 : 8 + header])
    names = {
        "embedding": "model.embed_tokens.weight",
        "third layer": "model.layers.2.mlp.up_proj.weight",
        "fourth layer": "model.layers.3.mlp.up_proj.weight",
        "head": "lm_head.weight",
    }

    def act(copy):
        path = copy / SHARD
        if damage in names:
            flipped(path, 8 + header + offsets[names[damage]]["data_offsets"][0] + 5)
        elif damage == "header":
            flipped(path, 20)
        elif damage == "gone":
            path.unlink()
        else:
            data = path.read_bytes()
            ends = {"cut short": data[:-100], "grown": data + bytes(100), "zeros at the end": data[:-100] + bytes(100)}
            path.write_bytes(ends[damage])

    assert again(act) == kept


@pytest.mark.parametrize("model", ["teacher", "student"])
def test_states_that_are_damaged(model, again):
    """One layer is made again from the states before it; without those, all. What left the third layer lies in -0."""

    def last(copy):
        flipped(copy / f"scratch/{model}-0", 1000)

    def both(copy):
        last(copy)
        flipped(copy / f"scratch/{model}-2", 1000)

    assert again(last) == 2
    assert again(both) == 0
    assert again(lambda copy: (copy / f"scratch/{model}-0").unlink()) == 2
    assert again(lambda copy: os.truncate(copy / f"scratch/{model}-0", 1000)) == 2
    assert again(lambda copy: shutil.rmtree(copy / "scratch")) == 0


def test_killed_at_the_end_of_a_layer_with_the_one_before_damaged(whole, tmp_path, monkeypatch):
    """The layer that ran has written its own states beside those that the damaged one is made again from."""
    run, out = whole("llama key-shared"), tmp_path / "out"

    def stop_before(self, **named):
        if len(self._run.journal.entries) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        keep(self, **named)

    keep, layer, made = StepWriter.keep, LayerPass._layer, []
    with monkeypatch.context() as patch:
        patch.setattr(StepWriter, "keep", stop_before)
        assert in_a_child(lambda: run.convert(out)) == "killed"
    data = (RunDir(out).path / SHARD).read_bytes()
    header = int.from_bytes(data[:8], "little")
    place = json.loads(data[8 : 8 + header])["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]
    flipped(RunDir(out).path / SHARD, 8 + header + place)
    monkeypatch.setattr(LayerPass, "_layer", lambda self, index, *rest: made.append(index) or layer(self, index, *rest))
    run.convert(out, resume=True)
    assert made == [1, 2, 3]
    same_output(out, run.out)


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda copy: None, ""),
        (
            lambda copy: os.truncate(copy / "journal", len((copy / "journal").read_bytes()) - 9),
            "step 4 of 4 {}going back to step 3",
        ),
        (lambda copy: flipped(copy / "scratch/student-0", 1000), "step 4 of 4 {}going back to step 3"),
        (lambda copy: (copy / SHARD).unlink(), "step 1 of 4 {}starting anew; 4 steps are made again"),
    ],
)
def test_what_was_damaged_is_said(damage, said, left, tmp_path, capsys):
    run, folder = left
    copy = shutil.copytree(folder, tmp_path / "out.converting")
    damage(copy)
    run.convert(tmp_path / "out", resume=True)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == ([f"note: {said.format(f'in {copy} was damaged on the disk: ')}"] if said else [])


# What fits nothing


def exactly(source, out, raven, **options):
    with pytest.MonkeyPatch.context() as patch:
        reload_here(patch)
        settings = ConvertSettings(eval_text=str(raven), eval_tokens=64, context=32)
        return convert_exact(open_checkpoint(source), out, settings, **options)


def to_stock(source, out, raven, **options):
    return materialize(open_checkpoint(source, reduced=True), out, max_shard_bytes=12_000, **options)


def without_gains(source, out, raven, **options):
    return fold_norms(open_checkpoint(source), out, **options)


def from_nanogpt(source, out, raven, **options):
    return import_nanogpt(source / "ckpt.pt", out, source, **options)


@pytest.fixture
def source_of(tiny_checkpoint, tiny_reduced, tmp_path_factory):
    """Return a function (what writes) -> the folder that it reads."""

    def nanogpt():
        folder = tmp_path_factory.mktemp("nanogpt")
        made(query_mode="identity").save(folder / "ckpt.pt")
        tiny_tokenizer().save_pretrained(folder)
        return folder

    sources = {exactly: lambda: tiny_checkpoint("gpt2"), to_stock: lambda: tiny_reduced(("select", "key-shared"))}
    sources |= {without_gains: lambda: tiny_checkpoint("gpt2-untied"), from_nanogpt: nanogpt}
    return lambda write: sources[write]()


@pytest.mark.usefixtures("nothing_is_lost")
@pytest.mark.parametrize("write", [exactly, to_stock, without_gains, from_nanogpt])
def test_what_fits_nothing_goes_on_wherever_it_was_killed(write, source_of, raven, tmp_path):
    source = source_of(write)
    counter = PowerCut(10**9, random.Random(0))
    with pytest.MonkeyPatch.context() as patch:
        counter.install(patch)
        report = write(source, tmp_path / "whole", raven)
    calls = 10**9 - counter.left
    kills = sorted({*range(0, calls, 7), *range(calls - 9, calls)})  # the last ones, once the output is there, each
    for number in kills:
        out = tmp_path / f"out-{number}"

        def act(out=out, number=number):
            with pytest.MonkeyPatch.context() as patch:
                PowerCut(number, random.Random(number)).install(patch)
                write(source, out, raven)

        assert in_a_child(act) == "killed", number
        if not out.exists() or RunDir(out).path.exists():
            done = write(source, out, raven, resume=True)
            # the other one has times in it, and a report in its output
            assert write is exactly or done == report | {"out": str(out)}
        assert not RunDir(out).path.exists()
        same_output(out, tmp_path / "whole")
    assert len(kills) > 8


@pytest.mark.parametrize("write", [exactly, to_stock])
def test_what_fits_nothing_goes_back_to_the_step_before_the_damage(
    write, source_of, raven, tmp_path, monkeypatch, capsys
):
    """A byte flips in what each step wrote, or in its line of the journal: all the steps before it are taken over."""
    source = source_of(write)
    write(source, tmp_path / "whole", raven)
    with monkeypatch.context() as patch:
        patch.setattr(StepWriter, "finish", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        assert in_a_child(lambda: write(source, tmp_path / "left", raven)) == "killed"
    left = tmp_path / "left.converting"
    steps = [json.loads(line[65:])["tensors"] for line in lines(left)]
    assert len(steps) >= 3
    keep, made = StepWriter.keep, []
    monkeypatch.setattr(StepWriter, "keep", lambda self, **more: made.append(1) or keep(self, **more))
    for number, place in itertools.product(range(len(steps)), ("journal", "weights")):
        out = tmp_path / f"out-{number}-{place}"
        copy = shutil.copytree(left, RunDir(out).path)
        if place == "journal":
            flipped(copy / "journal", sum(map(len, lines(copy)[:number])) + 100)
        else:
            name = list(steps[number])[-1]
            path = next(
                path for path in (copy / "result").glob("*.safetensors") if f'"{name}"'.encode() in path.read_bytes()
            )
            data = path.read_bytes()
            header = int.from_bytes(data[:8], "little")
            flipped(path, 8 + header + json.loads(data[8 : 8 + header])[name]["data_offsets"][1] - 1)
        made.clear()
        capsys.readouterr()
        write(source, out, raven, resume=True)
        assert len(made) == len(steps) - number
        back = f"going back to step {number}" if number else "starting anew"
        again = f"; {len(made)} steps are made again" if len(made) > 1 else ""
        said = f"note: step {number + 1} of {len(steps)} in {copy} was damaged on the disk: {back}{again}\n"
        assert capsys.readouterr().err == said
        same_output(out, tmp_path / "whole")


@pytest.mark.usefixtures("nothing_is_lost")
@pytest.mark.parametrize("write", [without_gains, from_nanogpt])
def test_what_is_rewritten_goes_on_or_starts_anew_when_killed_at_random_moments(write, source_of, raven, tmp_path):
    source, chance = source_of(write), random.Random(write.__name__)
    begun = time.perf_counter()
    write(source, tmp_path / "whole", raven)
    seconds, killed = time.perf_counter() - begun, 0
    for number in range(8):
        out = tmp_path / f"out-{number}"
        killed += in_a_child(lambda out=out: write(source, out, raven), chance.uniform(0, seconds)) == "killed"
        if not out.exists():
            write(source, out, raven, **({"resume": True} if number % 2 else {"clean": True}))
            assert not RunDir(out).path.exists()
        same_output(out, tmp_path / "whole")
    assert killed
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
