"""Several processes convert as one does: to the last bit, once rounding is held.

What one process adds up, several add up in another order. `exchanges.py` compares each sum within its rounding and then
makes it the one process's, so all that follows has to be equal. Everything is in float32: products in bfloat16 round by
which windows share a batch.
"""

import json
import subprocess
import sys

import pytest
import torch
from conversions import convert_tiny, tensor_hashes
from exchanges import hold, keep
from launches import launched, several

from qectomy.calibrate.preconditioning import Preconditioned, adam
from qectomy.calibrate.refine import FitData, RefineSettings, _Batches
from qectomy.distributed.process_group import ProcessGroup
from qectomy.distributed.window_shard import WindowShard

RUNS = [  # key-shared with key moments, a turned stream with refitted readers, biases, indices, no RoPE
    ("llama", "key-shared", 2),
    ("tied", "identity", 2),
    ("biases", "0=low-rank:3,1=dense", 3),  # uneven: 10 windows to fit on, and 5 more
    ("llama", "select", 2),
    ("gpt2", "0=key-shared,1=select", 2),
]


@pytest.fixture(autouse=True)
def in_float32(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.mark.parametrize("shape, query, count", RUNS)
def test_several_processes_convert_as_one(shape, query, count, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint(shape)
    one, found = one_and_several(source, tmp_path, query, raven, count)
    assert (one["processes"], found["processes"]) == (1, count)
    assert json.loads((tmp_path / "several" / "qectomy.json").read_text()) == found
    assert tensor_hashes(tmp_path / "several") == tensor_hashes(tmp_path / "one")
    assert attention(found) == attention(one)
    assert perplexities(found) == pytest.approx(perplexities(one), rel=1e-5)
    for name in ("calibration", "parameters", "bytes", "protocol"):
        assert found.get(name) == one.get(name), name
    assert found["forward_pass_seconds"] > 0


def one_and_several(source, folder, query, text, count, **settings):
    """Return the report of one process, and that of several whose exchanges are held against its."""
    kept = []
    one = convert_tiny(source, folder / "one", query, text, processes=keep(ProcessGroup("cpu"), kept), **settings)
    assert len(kept) > 20
    found, *others = several(
        source, folder / "several", query, text, count, before=lambda processes: hold(processes, kept), **settings
    )
    assert others == [None] * (count - 1)
    assert isinstance(found, dict), found
    return one, found


def attention(report):
    return [layer["attention_kl"][kind] for layer in report["layers"] for kind in ("fitted", "heldout")]


def perplexities(report):
    return [report["perplexity"]["before"], report["perplexity"]["after"]]


def test_a_process_without_evaluation_windows(tiny_checkpoint, raven, tmp_path):
    one, found = one_and_several(tiny_checkpoint(), tmp_path, "low-rank:3", raven, 2, eval_tokens=32)
    assert perplexities(found) == pytest.approx(perplexities(one), rel=1e-5)


def test_shares_cover_all_windows_once():
    for count, total in [(1, 5), (2, 5), (3, 7), (4, 4), (5, 2)]:
        owners = [WindowShard(fake(count, rank), total, total + 1) for rank in range(count)]
        assert [window for share in owners for window in share.fitted] == list(range(total))
        assert [window for share in owners for window in share.held] == list(range(total + 1))
        sizes = [len(share.fitted) for share in owners]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] == max(sizes)
        for share in owners:
            numbers = [share.number(place) for place in range(len(share.fitted) + len(share.held))]
            assert numbers == [*share.fitted, *(total + window for window in share.held)]


def fake(count, rank):
    """A process of several that is not connected to any."""
    processes = ProcessGroup("cpu")
    processes.world_size, processes.rank = count, rank
    return processes


# The sums


def test_what_several_processes_draw_is_what_one_draws():
    def draw(share, n):
        data = FitData(torch.zeros(n, 8, 2), *[torch.zeros(n, 1, 8, 2)] * 2, torch.ones(8, 8), 1.0, turn, share)
        draws = _Batches(data, RefineSettings(rows_a_step=16), torch.Generator().manual_seed(3))
        start = share.fitted.start if share else 0
        for _ in range(6):
            yield [
                (start + window, rows.tolist(), float(temperature[i]), round(float(weight[i]) / len(windows), 6))
                for windows, rows, temperature, weight in draws.draw()
                for i, window in enumerate(windows)
            ]

    def turn(heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return heads

    ours = [draw(share, len(share.fitted)) for share in (WindowShard(fake(3, rank), 11, 1) for rank in range(3))]
    whole = list(draw(None, 11))
    for step, parts in zip(whole, zip(*ours, strict=True), strict=True):
        assert len(step) == 8
        assert sorted(window for part in parts for window in part) == sorted(step)


def test_adam_adds_gradients_and_moves_as_the_first_does():
    targets = torch.arange(12, dtype=torch.float64).view(4, 3) / 7

    def fit(processes, own):
        # The second process measures its parameter in other units: only its gradient may count.
        unit = 1.0 + (processes.rank if processes else 0)
        parameter = Preconditioned(torch.zeros(3, dtype=torch.float64), lambda u: unit * u, 0.1)
        loss = lambda values: ((values[0] - target).pow(4).sum() for target in targets[own])  # noqa: E731
        adam([parameter], loss, steps=20, warmup=3, betas=(0.9, 0.98), processes=processes)
        return parameter.value().detach()

    found = launched(2, lambda processes: fit(processes, slice(0, 1) if processes.is_main else slice(1, 4)))
    assert torch.allclose(found[0], fit(None, slice(0, 4)), rtol=1e-12, atol=0)


def test_sums_and_the_first_ones_values_in_place():
    def act(processes):
        mine = torch.arange(6, dtype=torch.float64).view(2, 3) + 10 * processes.rank
        turned, kept, flags = mine.T, mine.clone(), torch.tensor([processes.rank + 4], dtype=torch.int32)
        processes.all_reduce_(turned)
        processes.broadcast_(kept, flags)
        return mine.tolist(), kept.tolist(), flags.tolist(), processes.all_gather(processes.rank)

    summed = [[10.0, 12.0, 14.0], [16.0, 18.0, 20.0]]
    assert launched(2, act) == [(summed, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], [4], [0, 1])] * 2


def test_as_torchrun_starts_it(tiny_checkpoint, raven, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qectomy"]
    command += ["convert", tiny_checkpoint(), "--out", out, "--query", "low-rank:3", "--text", raven, "--tokens", "320"]
    command += ["--context", "32", "--eval-tokens", "160", "--json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == json.loads((out / "qectomy.json").read_text())  # once
    assert json.loads(done.stdout)["processes"] == 2
    assert done.stderr.count("converting 2/2") == 1
