"""What a layer's fit hands over is the layer that was fitted: folding changes no query, key or value."""

import pytest
import torch
from attention_bench import AttentionBench, reference_kl
from conversions import few_steps
from tiny_models import tokens

from qectomy.calibrate.layer_fit import attended_moments, fit_layer, fold
from qectomy.calibrate.layers import LayerRunner
from qectomy.calibrate.refine import RefineSettings
from qectomy.calibrate.starts import Start
from qectomy.calibrate.states import Streams
from qectomy.surgery.checkpoint import open_checkpoint
from qectomy.surgery.query_maps import parse_query_map
from qectomy.surgery.stream_basis import random_basis

CONTEXT, WINDOWS = 24, 8
SHAPES = ["llama", "mqa", "biases", "wide-heads", "narrow-heads", "mistral"]


class Layer:
    """Layer 0 of a tiny checkpoint, and the embedding of random tokens."""

    def __init__(self, folder, name):
        source = open_checkpoint(folder)
        self.spec, self.dims = parse_query_map(name), source.dims
        self.runner = LayerRunner(source, (self.spec,) * source.dims.n_layers, CONTEXT, "cpu")
        self.tensors = source.read_layer(0, torch.float32)
        self.teacher = self.runner.build(0, self.tensors)
        self.x = source.read("model.embed_tokens.weight", torch.float32)[tokens(WINDOWS, CONTEXT)]

    def projected(self, module, x=None):
        """x̂ and what W_K and W_V give on it."""
        hidden = self.runner.read(module, self.x if x is None else x)
        return hidden, module.self_attn.k_proj(hidden), module.self_attn.v_proj(hidden)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gain_of_identity_folds_exactly(shape, tiny_checkpoint):
    made = Layer(tiny_checkpoint(shape), "identity")
    generator, dims = torch.Generator().manual_seed(0), made.dims
    gain = (0.3 + torch.rand(dims.d_model, generator=generator)) * torch.tensor([1.0, -1.0]).repeat(dims.d_model // 2)
    W_K = torch.randn(dims.d_model, dims.n_kv_heads * dims.d_head, generator=generator)
    n_query, bias = dims.n_heads * dims.d_head, dims.attention_bias
    b_K = torch.randn(W_K.shape[1], generator=generator) if bias else None
    query = {"bias": torch.randn(n_query, generator=generator)} if bias else {}
    before = {name: tensor.clone() for name, tensor in made.tensors.items()}
    out = fold(made.runner.family, made.tensors, Start(W_K, query, b_K, gain))
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.tensors.items())
    student = made.runner.build(0, out, reduced=True)

    hidden, _, value = made.projected(made.teacher)
    ours, our_key, our_value = made.projected(student)
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours, hidden * gain, **close)
    torch.testing.assert_close(our_value, value, **close)
    torch.testing.assert_close(our_key, hidden @ W_K + (b_K if bias else 0), **close)
    channels = torch.arange(n_query) % dims.d_model
    expected = (hidden * gain)[..., channels] + (query["bias"] if bias else 0)
    torch.testing.assert_close(student.self_attn.project_query(ours, our_key), expected, **close)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", ["identity", "select", "key-shared", "low-rank:3"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_fitted_layer(shape, name, turned, tiny_checkpoint, tmp_path, monkeypatch):
    """Its values are the teacher's, whatever the map; a rich one attends more like the teacher than blindly."""
    few_steps(monkeypatch, 30)
    made = Layer(tiny_checkpoint(shape), name)
    x, tensors = made.x, made.tensors
    if turned:
        basis = random_basis(torch.ones(32), torch.ones(32), False, torch.Generator().manual_seed(0))
        x, tensors = basis.states(x), basis.layer(made.runner.family, tensors)
        made.teacher = made.runner.build(0, tensors)
    streams, generator = Streams(tmp_path, x.shape, fitted=WINDOWS, batch=3), torch.Generator().manual_seed(0)
    streams.teacher[:] = streams.student[:] = x
    out = fit_layer(
        made.runner, 0, made.spec, tensors, tensors, made.teacher, streams, RefineSettings(steps=30), generator
    )
    assert not [key for key in out if "q_proj" in key]
    assert all(tensor.dtype in (torch.float32, torch.int32) for tensor in out.values())
    student = made.runner.build(0, out, reduced=True)
    pair = [made.runner.queries_keys(module, made.runner.read(module, x)) for module in (made.teacher, student)]
    blind = (torch.zeros_like(pair[0][0]), pair[0][1])
    allowed = made.runner.causal()
    found, uniform = (float(reference_kl(pair[0], other, allowed).mean()) for other in (pair[1], blind))
    assert 0 < found < uniform * (0.8 if name in ("key-shared", "low-rank:3") else 1.5)  # the weights are random
    _, _, theirs = made.projected(made.teacher, x)
    _, _, ours = made.projected(student, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_attended_moments_are_the_covariance_under_the_attention():
    bench = AttentionBench(n_windows=2)
    found = attended_moments(bench.data, bench.n_kv_heads, windows=2, stride=1)
    query, key = bench.teacher
    x = bench.hidden.double()
    expected = torch.zeros_like(found)
    for n in range(2):
        for h in range(bench.n_heads):
            g = h * bench.n_kv_heads // bench.n_heads
            p = (query[n, h] @ key[n, g].T).masked_fill(~bench.allowed, -torch.inf).softmax(-1)
            for row in p:
                mean = row @ x[n]
                expected[g] += (x[n] - mean).T @ (row[:, None] * (x[n] - mean))
    expected /= 2 * bench.context * bench.n_heads // bench.n_kv_heads
    floor = 1e-3 * torch.linalg.eigvalsh(expected).mean()  # directions that no key differs in are not left empty
    assert (found - expected).abs().max() < 1.5 * floor + 1e-4
    assert expected.abs().max() > 100 * floor
    assert torch.linalg.eigvalsh(found).min() > 0
