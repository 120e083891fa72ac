"""What a layer's fit hands over is the layer that was fitted: folding changes no query, key or value."""

from itertools import combinations

import pytest
import torch
from attention_bench import AttentionBench, reference_kl
from conversions import few_steps
from tiny_models import tokens

from qectomy.calibrate.hidden_states import Streams
from qectomy.calibrate.layer_fit import attended_moments, fit_layer, fold
from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.calibrate.problem import QueryKeyParams
from qectomy.calibrate.refine import RefineSettings
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.models.linear_views import read_view
from qectomy.models.query_maps import parse_query_map
from qectomy.surgery.stream_basis import random_basis

CONTEXT, WINDOWS = 24, 8
MAPS = ["identity", "select", "key-shared", "low-rank:3"]
SHAPES = ["llama", "mqa", "biases", "wide-heads", "narrow-heads", "mistral", "qwen2"]
SCALES = {  # of the logits, by GPT-2's shape and layer
    ("gpt2", 0): 8**-0.5,
    ("gpt2-one-head", 1): 32**-0.5,
    ("gpt2-inverse", 1): 8**-0.5 / 2,
    ("gpt2-unscaled", 0): 1.0,
}


class Layer:
    """A layer of a tiny checkpoint, and the embedding of random tokens."""

    def __init__(self, folder, name, layer=0):
        source = open_checkpoint(folder)
        self.spec, self.dims = parse_query_map(name), source.dims
        self.runner = LayerRunner(source, (self.spec,) * source.dims.n_layers, CONTEXT, "cpu")
        self.tensors = source.read_layer(layer, torch.float32)
        self.teacher = self.runner.build(layer, self.tensors)
        self.x = source.read(source.family.embedding, torch.float32)[tokens(WINDOWS, CONTEXT)]

    def projected(self, module, x=None):
        """x̂ and what W_K and W_V give on it."""
        hidden, roles = self.runner.read(module, self.x if x is None else x), self.runner.family.roles
        views = (roles.key, roles.value) if module is self.teacher else (roles.reduced_key, roles.reduced_value)
        parts = [read_view(module.state_dict(), view) for view in views]
        key, value = (hidden @ W + (0 if bias is None else bias) for W, bias in parts)
        return hidden, key, value


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
    out = fold(made.runner.family, made.tensors, QueryKeyParams(W_K, query, b_K, gain))
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


def written_attention(made, scale, query, key, value, shift=0.0):
    """What GPT-2's attention adds to the stream, head by head in float64, with the teacher's W_O and b_O.

    Queries are (x̂ + shift) W_Q + b_Q, keys x̂ W_K + b_K; `query`, `key` and `value` are pairs of weight and bias.
    """
    gamma, beta = (made.tensors[f"ln_1.{kind}"].double() for kind in ("weight", "bias"))
    x = made.x.double()
    hidden = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * gamma + beta
    output = read_view(made.tensors, made.runner.family.roles.output)
    (W_Q, b_Q), (W_K, b_K), (W_V, b_V), (W_O, b_O) = ((W.double(), b.double()) for W, b in (query, key, value, output))
    queries, keys, values = (hidden + shift) @ W_Q + b_Q, hidden @ W_K + b_K, hidden @ W_V + b_V
    heads = []
    for q, k, v in zip(*(t.split(made.dims.d_head, -1) for t in (queries, keys, values)), strict=True):
        logits = q @ k.mT * scale
        heads.append(logits.masked_fill(~made.runner.causal(made.teacher), -torch.inf).softmax(-1) @ v)
    return torch.cat(heads, -1) @ W_O + b_O


def added_by_attention(made, module):
    """What a layer's own attention adds to the stream, run in float64."""
    module.double()
    x = made.x.double()
    return made.runner.attend(module, x)[0] - x


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def teacher_parts(made):
    """((W_Q, b_Q), (W_K, b_K), (W_V, b_V)) of a GPT-2 layer."""
    roles = made.runner.family.roles
    return [read_view(made.tensors, view) for view in (roles.query, roles.key, roles.value)]


@pytest.mark.parametrize("shape, layer", SCALES)
def test_the_written_attention_is_the_layers(shape, layer, tiny_checkpoint):
    """The reference of the two tests below, against the stock layer."""
    made = Layer(tiny_checkpoint(shape), "identity", layer)
    expected = added_by_attention(made, made.teacher)
    query, key, value = teacher_parts(made)
    assert relative(written_attention(made, SCALES[shape, layer], query, key, value), expected) < 1e-12
    assert relative(written_attention(made, SCALES[shape, layer], query, query, value), expected) > 0.01


@pytest.mark.parametrize("shape, layer", SCALES)
def test_the_fit_sees_queries_as_gpt2_scales_them(shape, layer, tiny_checkpoint):
    """Also by the layer's number, or not at all: what the fit compares is what the softmax is given."""
    made = Layer(tiny_checkpoint(shape), "identity", layer)
    hidden = made.runner.read(made.teacher, made.x)
    found = made.runner.queries_keys(made.teacher, hidden)
    (W_Q, b_Q), (W_K, b_K), _ = teacher_parts(made)
    query, key = ((hidden @ W + b).unflatten(-1, (made.dims.n_heads, -1)) for W, b in ((W_Q, b_Q), (W_K, b_K)))
    torch.testing.assert_close(found[0].transpose(1, 2), query * SCALES[shape, layer], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].transpose(1, 2), key, rtol=1e-5, atol=1e-5)
    assert made.runner.scaling(made.teacher) == pytest.approx(SCALES[shape, layer])


@pytest.mark.parametrize("shape, layer", SCALES)
def test_the_shift_of_identity_folds_exactly(shape, layer, tiny_checkpoint):
    """It lies in the LayerNorm: queries have it, each head's keys differ by one vector, and attention by rounding."""
    made = Layer(tiny_checkpoint(shape), "identity", layer)
    generator, d_model = torch.Generator().manual_seed(0), made.dims.d_model
    shift = 2 * torch.randn(d_model, generator=generator)
    W_K = torch.randn(d_model, d_model, generator=generator)
    before = {name: tensor.clone() for name, tensor in made.tensors.items()}
    out = fold(made.runner.family, made.tensors, QueryKeyParams(W_K, {}, norm_shift=shift))
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.tensors.items())
    changed = {name for name in out if name not in before or not torch.equal(out[name], before[name])}
    assert changed == {"ln_1.bias", "attn.c_attn.weight", "attn.c_proj.bias"}
    assert before.keys() - out.keys() == {"attn.c_attn.bias"}
    student = made.runner.build(layer, out, reduced=True)

    _, _, value = teacher_parts(made)
    none, scale = torch.zeros(d_model), SCALES[shape, layer]
    expected = written_attention(made, scale, (torch.eye(d_model), none), (W_K, none), value, shift.double())
    hidden, _, _ = made.projected(made.teacher)
    ours, our_key, _ = made.projected(student)
    torch.testing.assert_close(ours, hidden + shift, rtol=1e-5, atol=1e-5)
    apart = (our_key - hidden @ W_K).flatten(0, 1)
    torch.testing.assert_close(apart, (shift @ W_K).expand_as(apart), rtol=1e-4, atol=1e-4)
    assert relative(added_by_attention(made, student), expected) < 1e-6
    with torch.no_grad():
        student.attn.c_proj.bias += (shift @ value[0]).double() @ student.attn.c_proj.weight  # it stays in the values
    assert relative(added_by_attention(made, student), expected) > 0.1


@pytest.mark.parametrize("shape, layer", SCALES)
def test_the_biases_of_keys_and_values_are_dropped_exactly(shape, layer, tiny_checkpoint):
    """With the teacher's own W_Q as a low-rank map of full rank, the layer gives what the teacher's gives."""
    made = Layer(tiny_checkpoint(shape), "low-rank:32", layer)
    (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = teacher_parts(made)
    query = {"gain": torch.zeros(32), "down": torch.eye(32), "up": W_Q.T, "bias": b_Q}
    before = {name: tensor.clone() for name, tensor in made.tensors.items()}
    out = fold(made.runner.family, made.tensors, QueryKeyParams(W_K, query))
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.tensors.items())
    assert "attn.c_attn.bias" not in out
    assert torch.equal(out["attn.c_attn.weight"], torch.cat([W_K, W_V], 1))
    student = made.runner.build(layer, out, reduced=True)
    expected = written_attention(made, SCALES[shape, layer], (W_Q, b_Q), (W_K, b_K), (W_V, b_V))
    assert b_K.abs().max() > 0.5
    assert relative(added_by_attention(made, student), expected) < 1e-6
    x = made.x.double()
    whole = made.runner.forward(made.teacher.double(), x)
    assert relative(made.runner.forward(student, x), whole) < 1e-6
    with torch.no_grad():
        student.attn.c_proj.bias.copy_(made.tensors["attn.c_proj.bias"])  # the values' bias is lost
    assert relative(made.runner.forward(student, x), whole) > 1e-2


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    "shape, turned",
    [*((shape, turned) for shape in SHAPES for turned in (False, True)), ("gpt2", False), ("gpt2-unscaled", False)],
)
def test_a_fitted_layer(shape, turned, name, tiny_checkpoint, tmp_path, monkeypatch):
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
    assert not [key for key in out if "q_proj" in key or key == "attn.c_attn.bias"]
    assert all(tensor.dtype in (torch.float32, torch.int32) for tensor in out.values())
    student = made.runner.build(0, out, reduced=True)
    pair = [made.runner.queries_keys(module, made.runner.read(module, x)) for module in (made.teacher, student)]
    blind = (torch.zeros_like(pair[0][0]), pair[0][1])
    allowed = made.runner.causal(made.teacher)
    found, uniform = (float(reference_kl(pair[0], other, allowed).mean()) for other in (pair[1], blind))
    assert 0 < found < uniform * (0.8 if name in ("key-shared", "low-rank:3") else 1.5)  # the weights are random
    _, _, theirs = made.projected(made.teacher, x)
    _, _, ours = made.projected(student, x)
    if made.runner.family.folds_kv_bias:  # what is added to all values comes in behind W_O
        (W_O, b_O), (_, b_student) = (read_view(each, made.runner.family.roles.output) for each in (tensors, out))
        assert (theirs - ours).abs().max() > 0.1
        ours, theirs = ours @ W_O + b_student, theirs @ W_O + b_O
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("shape", ["llama", "biases", "gpt2"])
def test_each_matrix_is_factored_once(shape, name, tiny_checkpoint, tmp_path, monkeypatch):
    few_steps(monkeypatch, 2)
    made, seen = Layer(tiny_checkpoint(shape), name), {"eigh": [], "lu_factor": []}

    def counted(what):
        factor = getattr(torch.linalg, what)

        def count(matrix, **options):
            if matrix.shape == (32, 32):
                seen[what].append(matrix.double().clone())
            return factor(matrix, **options)

        monkeypatch.setattr(torch.linalg, what, count)

    counted("eigh")
    counted("lu_factor")
    streams = Streams(tmp_path, made.x.shape, fitted=WINDOWS, batch=3)
    streams.teacher[:], streams.student[:] = made.x, 0.9 * made.x
    given = made.runner, 0, made.spec, made.tensors, made.tensors, made.teacher, streams
    fit_layer(*given, RefineSettings(steps=2), torch.Generator().manual_seed(0))
    assert seen["eigh"]
    assert len(seen["lu_factor"]) == 1
    for matrices in seen.values():
        assert not any(torch.allclose(a, b) for a, b in combinations(matrices, 2))


def test_key_shared_counts_on_no_bias_of_the_keys(tiny_checkpoint, tmp_path, monkeypatch):
    """A GPT-2 whose queries are mixes of its keys is found, though the keys that are mixed lose their bias."""
    few_steps(monkeypatch, 30)
    made, generator = Layer(tiny_checkpoint("gpt2"), "key-shared"), torch.Generator().manual_seed(0)
    fused, mixes = made.tensors["attn.c_attn.weight"].clone(), torch.randn(4, 8, 8, generator=generator) * 8**-0.5
    fused[:, :32] = torch.einsum("dhi,hij->dhj", fused[:, 32:64].unflatten(1, (4, 8)), mixes).flatten(1)
    made.tensors["attn.c_attn.weight"] = fused
    made.teacher = made.runner.build(0, made.tensors)
    streams = Streams(tmp_path, made.x.shape, fitted=WINDOWS, batch=3)
    streams.teacher[:] = streams.student[:] = made.x
    given = made.runner, 0, made.spec, made.tensors, made.tensors, made.teacher, streams
    student = made.runner.build(0, fit_layer(*given, RefineSettings(steps=30), generator), reduced=True)

    def kl():
        pair = [made.runner.queries_keys(m, made.runner.read(m, made.x)) for m in (made.teacher, student)]
        return float(reference_kl(*pair, made.runner.causal(made.teacher)).mean())

    found = kl()
    assert found < 0.01
    with torch.no_grad():  # as if the keys' bias were still in what is mixed
        b_K = made.tensors["attn.c_attn.bias"][32:64].view(4, 1, 8)
        student.attn.c_attn.query.bias -= (b_K @ student.attn.c_attn.query.mix).flatten()
    assert kl() > 10 * found


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
