"""`qectomy bench`: what is run in which order, and what is made of the numbers. Nothing here depends on a clock."""

import json
import math
import shutil

import pytest
import torch
from tiny_models import load_reduced, tiny_model
from transformers import DynamicCache

from qectomy.errors import QectomyError
from qectomy.eval import fresh_start as fresh
from qectomy.eval import inference_cost
from qectomy.eval.fresh_start import FreshStart, fresh_start
from qectomy.eval.inference_bytes import (
    OperationCount,
    bytes_read_per_step,
    cached_tokens,
    kv_bytes_by_config,
    kv_bytes_in_cache,
    weight_bytes,
)
from qectomy.eval.inference_cost import BenchSettings, alternate, compare, spread
from qectomy.eval.inference_loops import InferenceLoop, Timing, random_tokens, short_memory
from qectomy.eval.loading import load_model
from qectomy.record.bench import Bench, PrefillRatio, Spread
from qectomy.report.bench_table import show_bench

QUICK = dict(batches=(1, 3), rounds=2, prompt_tokens=9, new_tokens=4)
MAPS = ("identity", "select", "key-shared")


@pytest.fixture
def no_children(monkeypatch):
    """Load in this process: a fresh one takes seconds to import torch. Returns who was loaded, in order."""
    seen = []

    def start(checkpoint, **wanted):
        seen.append(checkpoint)
        n = len(seen)
        return FreshStart(load_seconds=2.0**n, peak_memory_bytes=1000 if "reduced" in checkpoint else 1500)

    monkeypatch.setattr(inference_cost, "fresh_start", start)
    return seen


@pytest.fixture
def pair(tiny_checkpoint, tiny_reduced):
    return str(tiny_checkpoint("llama")), str(tiny_reduced(("identity", "select")))


# The order of things


def test_runs_alternate_after_a_round_that_is_not_counted():
    seen = []
    counter = iter(range(100))
    runs = [lambda: seen.append("A") or next(counter), lambda: seen.append("B") or next(counter)]
    assert alternate(runs, 3) == [(2, 3), (4, 5), (6, 7)]
    assert "".join(seen) == "ABABABAB"


def test_the_bench_runs_both_in_turn(pair, no_children, monkeypatch):
    order, told = [], []

    def run(self, prompt, new):
        order.append((self.name, len(prompt), prompt.shape[1], new.shape[1], int(prompt.sum() + new.sum())))
        return Timing(prefill=1.0, decode=1.0)

    monkeypatch.setattr(InferenceLoop, "run", run)
    compare(*pair, BenchSettings(**QUICK), lambda done, total, note: told.append((done, total)))
    assert no_children == [*pair, *pair]
    assert [entry[:4] for entry in order] == [(name, b, 9, 4) for b in (1, 3) for _ in range(3) for name in pair]
    assert len({entry[4] for entry in order[:6]}) == len({entry[4] for entry in order[6:]}) == 1  # the same tokens
    assert told == [(i, 16) for i in range(1, 17)]


def test_ratios_are_taken_within_a_round(pair, no_children, monkeypatch):
    """The machine slows down by half each round: no ratio of the medians of the times gives 2 and 3."""
    calls = dict.fromkeys(pair, 0)

    def run(self, prompt, new):
        calls[self.name] += 1
        slow = 10.0 ** calls[self.name]
        reduced = self.name == pair[1]
        return Timing(prefill=slow * (1 if reduced else 2), decode=slow * (1 if reduced else 3))

    monkeypatch.setattr(InferenceLoop, "run", run)
    result = compare(*pair, BenchSettings(**{**QUICK, "rounds": 4}))
    for i, batch in enumerate((1, 3)):
        prefill, decode = result.ratios.prefill[i], result.ratios.decode[i]
        assert prefill == PrefillRatio(batch=batch, ratio=Spread(median=2.0, low=2.0, high=2.0))
        assert decode.ratio == Spread(median=3.0, low=3.0, high=3.0)
        a, b = (model.decode[i].bytes_read_per_token for model in result.models)
        assert decode.byte_limit == pytest.approx(a / b)
        assert decode.share_of_limit == pytest.approx(3 * b / a)
    assert result.ratios.load == Spread(median=0.5, low=0.5, high=0.5)  # each load took twice the one before
    assert result.ratios.peak_memory == 1.5
    # five calls a batch, the first of them not counted: the second batch is timed by calls 7 to 10
    speeds = sorted(3 * 9 / (2 * 10.0**call) for call in range(7, 11))
    found = result.models[0].prefill[1].tokens_per_second
    assert found.median == pytest.approx((speeds[1] + speeds[2]) / 2)
    assert (found.low, found.high) == pytest.approx((speeds[0], speeds[-1]))


def test_the_clock_is_read_around_prefill_and_around_decoding():
    ticks = iter([1.0, 3.0, 10.0])
    loop = InferenceLoop("tiny", tiny_model("llama"), clock=lambda: next(ticks))
    assert loop.run(*random_tokens(320, 2, 5, 3, 0)) == Timing(prefill=2.0, decode=7.0)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2"])
def test_the_loop_decodes_with_the_cache(name, monkeypatch):
    """Its last step gives the logits of the whole sequence in one forward; each step sees one token."""
    model = tiny_model(name)
    prompt, new = random_tokens(320, 2, 5, 3, 7)
    seen, forward = [], model.forward

    def watch(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen.append((kwargs["input_ids"].shape[1], out.logits))
        return out

    monkeypatch.setattr(model, "forward", watch)
    InferenceLoop(name, model).run(prompt, new)
    assert [length for length, _ in seen] == [5, 1, 1, 1]
    assert [logits.shape[1] for _, logits in seen] == [1] * 4
    with torch.no_grad():
        whole = forward(input_ids=torch.cat([prompt, new], 1)).logits
    torch.testing.assert_close(seen[-1][1][:, 0], whole[:, -1], rtol=1e-4, atol=1e-4)
    assert (whole[:, -1] - whole[:, -2]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_steps_give_the_same_logits_from_one_graph(name, monkeypatch):
    graphs, outs = [], []
    real = torch.compile

    def backend(graph, example):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, mode, dynamic: real(model, backend=backend, dynamic=dynamic))
    torch.compiler.reset()
    model = tiny_model(name)
    loop = InferenceLoop(name, model, compiled=True)
    step = loop._step
    loop._step = lambda **kwargs: outs.append(step(**kwargs)) or outs[-1]
    prompt, new = random_tokens(320, 2, 5, 4, 7)
    for _ in range(2):  # the second run starts with the cache of the first, emptied
        outs.clear()
        loop.run(prompt, new)
        with torch.no_grad():
            whole = model(torch.cat([prompt, new], 1)).logits
        torch.testing.assert_close(outs[-1].logits[:, 0].clone(), whole[:, -1], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    torch.compiler.reset()


# The numbers


@pytest.mark.parametrize("n, cut", [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (20, 5)])
def test_the_interval_of_a_median_is_that_of_the_sign_test(n, cut):
    """Values left out at either end at 95 %, from the tables of the sign test."""
    values = [float(value) for value in range(n)]
    assert spread(values[::-1]) == Spread(median=(n - 1) / 2, low=float(cut), high=float(n - 1 - cut))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llama", 2 * 2 * 2 * 8 * 4),  # K and V, 2 layers, 2 KV heads of 8, float32
        ("mha", 2 * 2 * 4 * 8 * 4),
        ("mqa", 2 * 2 * 1 * 8 * 4),
        ("wide-heads", 2 * 2 * 2 * 12 * 4),
        ("mistral", 2 * 2 * 2 * 8 * 4),  # whose window of 5 keeps fewer tokens, as many bytes each
        ("gpt2", 2 * 2 * 4 * 8 * 4),
    ],
)
def test_kv_bytes(name, expected):
    model = tiny_model(name)
    cache, _ = InferenceLoop(name, model).look(*random_tokens(320, 3, 9, 2, 0))
    assert isinstance(cache, DynamicCache)
    assert kv_bytes_in_cache(cache) == expected
    assert kv_bytes_by_config(model.config, torch.float32) == expected
    assert kv_bytes_by_config(model.config, torch.bfloat16) == expected / 2


def test_an_unexpected_cache_is_told(pair, no_children, monkeypatch):
    monkeypatch.setattr(inference_cost, "kv_bytes_by_config", lambda config, dtype: 77)
    result = compare(*pair, BenchSettings(**QUICK))
    assert result.warnings == [f"{name}: its cache holds 256 bytes a token, 77 by its config" for name in pair]


LAYER = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 40 + 2 * 32  # W_Q W_O, W_K W_V, the MLP, the norms; 4 heads on 2


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(
    "name, numbers, rows",
    [
        ("llama", 2 * LAYER + 32 + 320 * 32, 32),  # untied: the head, and a row of the embedding a sequence
        ("tied", 2 * LAYER + 32 + 320 * 32, 32),  # the embedding is read as the head
        # GPT-2, tied: W_Q W_K W_V W_O and their biases, MLP of 40, two norms; a row of each embedding
        ("gpt2", 2 * (4 * (32 * 32 + 32) + 2 * 32 * 40 + 40 + 32 + 4 * 32) + 64 + 320 * 32, 64),
    ],
)
def test_bytes_read_a_step(name, numbers, rows, batch):
    model = tiny_model(name)
    assert bytes_read_per_step(model, batch, 0.0, 256.0) == 4 * (numbers + batch * rows)
    assert bytes_read_per_step(model, batch, 10.5, 256.0) == 4 * (numbers + batch * rows) + batch * 10.5 * 256


@pytest.mark.parametrize(
    "query, removed",
    [
        ("identity", 32 * 32),
        ("select", 32 * 32 - 32 - 32),  # an index and a gain a channel
        ("key-shared", 32 * 32 - 4 * 8 * 8),
        ("low-rank:3", 32 * 32 - 32 - 2 * 3 * 32),
    ],
)
def test_bytes_that_a_reduced_model_reads(tiny_reduced, query, removed):
    stock, ours = (
        bytes_read_per_step(model, 2, 3.0, 256.0)
        for model in (tiny_model("llama"), load_reduced(tiny_reduced((query, "dense"))))
    )
    assert stock - ours == 4 * removed


def test_weights_in_memory_count_once():
    assert weight_bytes(tiny_model("tied")) == weight_bytes(tiny_model("llama")) - 4 * 320 * 32
    assert weight_bytes(tiny_model("llama")) == 4 * (2 * LAYER + 32 + 2 * 320 * 32)
    assert weight_bytes(tiny_model("llama").to(torch.bfloat16)) == 2 * (2 * LAYER + 32 + 2 * 320 * 32)


def test_cached_tokens_are_the_mean_over_the_steps():
    assert cached_tokens(tiny_model("llama").config, 10, 4) == (11 + 12 + 13 + 14) / 4
    assert cached_tokens(tiny_model("mistral").config, 3, 4) == (4 + 5 + 5 + 5) / 4  # a window of 5
    assert cached_tokens(tiny_model("qwen2").config, 3, 4) == (19 + (4 + 5 + 6 + 7)) / 8  # in one of two layers


def test_operations_are_counted_and_views_are_not():
    x, W = torch.randn(4, 4), torch.randn(4, 4)
    with torch.no_grad(), OperationCount() as count:
        y = x.view(2, 8).transpose(0, 1)[1:]  # no operation
        z = (x @ W).relu_()  # two
        z[1:].add_(1)  # one
        torch.cat([y, y])  # one
        y.contiguous()  # one
    assert count.total == 5, count.names


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llama", "mha", "biases", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("query", MAPS)
def test_no_map_takes_more_operations_than_w_q(tiny_reduced, name, query, batch):
    """On a GPU, where steps wait for launches, more of them would eat what the removed weights save."""
    ids = random_tokens(320, batch, 7, 1, 0)
    _, stock = InferenceLoop(name, tiny_model(name)).look(*ids)
    _, ours = InferenceLoop(name, load_reduced(tiny_reduced((query, query), name))).look(*ids)
    _, dense = InferenceLoop(name, load_reduced(tiny_reduced(("dense", "dense"), name))).look(*ids)
    assert ours < stock
    assert dense == stock


# Results


def test_the_result_and_its_table(pair, no_children, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = compare(*pair, BenchSettings(**QUICK))
    a, b = result.models
    dense, select, identity = 32 * 32, 32, 0
    assert a.parameters == 2 * LAYER + 32 + 2 * 320 * 32
    assert b.parameters == a.parameters - 2 * dense + select + identity
    assert b.bytes == a.bytes - 4 * (2 * dense - 2 * select)  # the index too
    assert result.ratios.parameters == a.parameters / b.parameters
    assert result.settings.prompt_tokens == 9
    assert (result.device, result.dtype, result.warnings, result.notes) == ("cpu", "float32", [], [])
    for model in (a, b):
        assert model.kv_cache_bytes_per_token == 256
        assert [row.batch for row in model.prefill] == [row.batch for row in model.decode] == [1, 3]
        for row in (*model.prefill, *model.decode):
            speed = row.tokens_per_second
            assert 0 < speed.low <= speed.median <= speed.high < math.inf
        read = bytes_read_per_step(tiny_model("llama"), 3, 11.5, 256.0) / 3
        assert (model.decode[1].bytes_read_per_token == read) == (model is a)
    show_bench(result)
    assert Bench.model_validate(json.loads(result.as_json())) == result
    printed = capsys.readouterr().out
    assert "…" not in printed
    for line in ("prefill 1 ", "prefill 3 ", "decode 1 ", "decode 3 ", "operations ", "KV a token"):
        assert line in printed
    assert f"{result.ratios.decode[1].byte_limit:.3f}" in printed


def test_weights_do_not_lie_as_their_file_left_them(pair, no_children, monkeypatch):
    found = []
    monkeypatch.setattr(
        InferenceLoop,
        "run",
        lambda self, *ids: (
            found.extend(p.data_ptr() for p in self.model.parameters()) or Timing(prefill=1.0, decode=1.0)
        ),
    )
    compare(*pair, BenchSettings(**QUICK))
    assert found
    assert all(place % 64 == 0 for place in found)
    mapped = [p.data_ptr() for name in pair for p in load_model(name, None, "cpu")[0].parameters()]
    assert any(place % 64 for place in mapped)


def test_without_fresh_processes(pair, no_children, capsys):
    told = []
    settings = BenchSettings(**QUICK, starts=0)
    result = compare(*pair, settings, lambda done, total, note: told.append((done, total)))
    assert no_children == []
    assert told == [(i, 12) for i in range(1, 13)]
    assert [model.load_seconds for model in result.models] == [None, None]
    assert (result.ratios.load, result.ratios.peak_memory) == (None, None)
    show_bench(result)
    printed = capsys.readouterr().out
    assert "decode 1" in printed
    assert "load" not in printed.partition("original:")[0]


def test_the_dtype_is_the_originals_for_both(tiny_checkpoint, pair, no_children):
    result = compare(str(tiny_checkpoint("bf16")), pair[1], BenchSettings(**QUICK))
    assert result.dtype == "bfloat16"
    assert {model.kv_cache_bytes_per_token for model in result.models} == {128}


def test_two_that_do_not_belong_together_are_told(tiny_checkpoint, pair, no_children):
    other = str(tiny_checkpoint("llama", vocab_size=300, num_hidden_layers=1))
    result = compare(pair[0], other, BenchSettings(**QUICK))
    assert result.warnings == [
        f"the two do not belong together: vocab_size is 320 in {pair[0]}, 300 in the other",
        f"the two do not belong together: num_hidden_layers is 2 in {pair[0]}, 1 in the other",
    ]


def test_more_positions_than_there_are(tiny_checkpoint, tiny_reduced, no_children):
    names = str(tiny_checkpoint("gpt2")), str(tiny_reduced(("select", "select"), "gpt2"))
    with pytest.raises(
        QectomyError, match=r"120 prompt .* and 9 new ones are more than the 128 .* --prompt-tokens 119"
    ):
        compare(*names, BenchSettings(**{**QUICK, "prompt_tokens": 120, "new_tokens": 9}))
    assert no_children == []  # said before anything was timed
    result = compare(*names, BenchSettings(**{**QUICK, "prompt_tokens": None}))
    assert result.settings.prompt_tokens == 124


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
def test_short_memory_names_the_batch(error):
    with pytest.raises(QectomyError, match=r"x: out of memory on cpu at batch 16 of 544 tokens each; give a smaller"):
        with short_memory("x", "cpu", 16, 544):
            raise error


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="shapes"), short_memory("x", "cpu", 1, 1):
        raise RuntimeError("shapes do not fit")


# A fresh process


def test_a_fresh_process_loads_and_runs(pair):
    found = fresh_start(pair[1], dtype="float32", device="cpu", batch=2, prompt=9, threads=1, seed=0)
    assert 0 < found.load_seconds < 60
    assert found.peak_memory_bytes > 50e6  # torch alone is larger


def test_a_fresh_process_that_fails_says_why(tmp_path, pair):
    broken = shutil.copytree(pair[1], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(QectomyError, match=r"a fresh process cannot run it: .*not a whole safetensors file"):
        fresh_start(str(broken), dtype="float32", device="cpu", batch=1, prompt=9, threads=1, seed=0)


def test_a_fresh_process_that_is_killed(monkeypatch, pair):
    monkeypatch.setattr(fresh, "CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(QectomyError, match=r"was killed \(signal 9\) at batch 4 of 9 tokens: most likely out"):
        fresh_start(pair[1], dtype="float32", device="cpu", batch=4, prompt=9, threads=1, seed=0)
