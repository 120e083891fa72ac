"""Refitting W_O and the MLP takes the student's stream back towards the teacher's, and touches nothing else."""

import numpy as np
import pytest
import torch
from tiny_models import tokens

from qectomy.calibrate.hidden_states import Streams
from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.calibrate.precision import fast_math
from qectomy.calibrate.refit import RefitSettings, refit_layer
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.models.linear_views import read_view, store_views
from qectomy.models.query_maps import parse_query_map

CONTEXT, FITTED, HELD = 16, 12, 3


class Layer:
    """Layer 0 of a tiny checkpoint on random tokens: teacher, student, and their streams in files."""

    def __init__(self, folder, path, name, drift=0.0):
        source = open_checkpoint(folder)
        recipe = (parse_query_map(name),) * source.dims.n_layers
        self.runner = LayerRunner(source, recipe, CONTEXT, "cpu")
        self.tensors = source.read_layer(0, torch.float32)
        self.teacher = self.runner.build(0, self.tensors)
        generator = torch.Generator().manual_seed(0)
        reduced = {n: t for n, t in self.tensors.items() if name == "dense" or not n.startswith("self_attn.q_proj.")}
        roles = source.family.roles
        if name != "dense" and source.family.folds_kv_bias:
            W_K, W_V = (read_view(self.tensors, view)[0] for view in (roles.key, roles.value))
            del reduced["attn.c_attn.bias"]
            reduced |= store_views([(roles.reduced_key, (W_K, None)), (roles.reduced_value, (W_V, None))])
        for key, (_, shape) in recipe[0].stored(source.dims).items():
            reduced[f"{roles.query_map}.{key}"] = torch.randn(shape, generator=generator) * 0.3
        self.student = self.runner.build(0, reduced, reduced=True)
        x = source.read(source.family.embedding, torch.float32)[tokens(FITTED + HELD, CONTEXT)]
        self.streams = Streams(path, x.shape, fitted=FITTED, batch=4)
        self.streams.teacher[:] = x
        self.streams.student[:] = x + drift * torch.randn(x.shape, generator=generator)
        with torch.no_grad(), fast_math(self.runner.device):  # as the pass runs it
            x_mid = self.runner.attend(self.teacher, x)[0]
            self.streams.teacher_mid[:] = x_mid[:FITTED]
            self.streams.teacher_after[:] = self.runner.think(self.teacher, x_mid)[0]

    def refit(self, **settings):
        with torch.no_grad():
            refit_layer(self.runner, self.student, self.streams, RefitSettings(**settings))

    def error(self, first=0, last=FITTED):
        """Mean square of what the student's stream lacks after the layer."""
        with torch.no_grad():
            pair = [
                self.runner.forward(module, states[first:last])
                for module, states in ((self.teacher, self.streams.teacher), (self.student, self.streams.student))
            ]
        return float((pair[0] - pair[1]).square().mean())


@pytest.fixture
def layer(tiny_checkpoint, tmp_path):
    return lambda shape, name, **options: Layer(tiny_checkpoint(shape), tmp_path, name, **options)


@pytest.mark.parametrize("shape", ["llama", "mqa", "biases", "wide-heads", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_the_error_goes_down_on_the_fitted_windows(layer, shape, drift):
    made = layer(shape, "key-shared", drift=drift)
    before = made.error()
    made.refit()
    assert 0 < made.error() < before


def test_each_part_alone_lowers_the_error(layer, tmp_path):
    off = dict(output=1e9, mlp_readers=1e9, mlp_out=1e9)
    for part in off:
        (tmp_path / part).mkdir()
    errors = {}
    for part in [None, *off]:
        made = layer("llama", "key-shared", drift=0.3)
        before = made.error()
        made.refit(**{key: 0.01 if key == part else value for key, value in off.items()})
        errors[part] = made.error() / before
    assert errors[None] == pytest.approx(1.0, abs=1e-3)
    assert errors["output"] < 0.99
    assert errors["mlp_out"] < 0.99
    assert errors["mlp_readers"] < 0.99


@pytest.fixture
def in_float32(monkeypatch):
    """Products in float32, also where the processor multiplies bfloat16: what is exact then shows as exact."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


@pytest.mark.parametrize("shape, with_bias", [("llama", False), ("biases", True), ("gpt2", True)])
def test_W_O_is_refitted_by_ridge_regression(layer, shape, with_bias, in_float32):
    """Against least squares with λ's rows appended; where there is a bias, on what is left of the means."""
    made = layer(shape, "key-shared", drift=0.3)
    view, streams = made.runner.family.roles.output, made.streams
    with torch.no_grad():
        x_mid, heads = made.runner.attend(made.student, streams.student[:FITTED])
    A, B = heads.flatten(0, 1).double().numpy(), (streams.teacher_mid[:] - x_mid).flatten(0, 1).double().numpy()
    means = (A.mean(0), B.mean(0)) if with_bias else (0.0, 0.0)
    A, B, n = A - means[0], B - means[1], A.shape[1]
    rows = np.sqrt(0.3 * np.square(A).sum(0).mean()) * np.eye(n)
    expected = np.linalg.lstsq(np.vstack([A, rows]), np.vstack([B, np.zeros((n, 32))]), rcond=None)[0]
    before = {name: tensor.clone() for name, tensor in made.student.state_dict().items()}
    made.refit(output=0.3)
    (W, b), (W_before, b_before) = (read_view(state, view) for state in (made.student.state_dict(), before))
    np.testing.assert_allclose(W - W_before, expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected).max() > 0.05
    if with_bias:
        np.testing.assert_allclose(b - b_before, means[1] - means[0] @ expected, rtol=1e-4, atol=1e-5)
    else:
        assert b is None


@pytest.mark.parametrize("shape", ["biases", "gpt2"])
def test_a_constant_lack_is_taken_back_by_the_bias_alone(layer, shape, in_float32):
    """Where every token lacks the same, no matrix changes: the biases give it exactly."""
    made = layer(shape, "dense")
    streams, writers = made.streams, (made.runner.family.roles.output, made.runner.family.roles.mlp_out)
    added = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    x_mid = streams.teacher_mid[:] + added[0]
    streams.teacher_mid[:] = x_mid
    with torch.no_grad():
        streams.teacher_after[:FITTED] = made.runner.think(made.teacher, x_mid)[0] + added[1]
    before = {name: tensor.clone() for name, tensor in made.student.named_parameters()}
    assert made.error() == 0.0  # of the layer with the teacher's own tensors
    made.refit()
    expected = {f"{view.module}.bias": constant for view, constant in zip(writers, added, strict=True)}
    for name, tensor in made.student.named_parameters():
        torch.testing.assert_close(tensor - before[name], expected.get(name, torch.zeros(())).expand_as(tensor))


@pytest.mark.parametrize("shape", ["biases", "gpt2"])
def test_with_a_bias_nothing_constant_is_left(layer, shape, in_float32):
    """Δb is the mean of what ΔW leaves, however strongly ΔW is held back."""
    made = layer(shape, "key-shared", drift=0.3)
    made.streams.student[:] = made.streams.student[:] + 0.5

    def constant_share():
        with torch.no_grad():
            after = made.runner.forward(made.student, made.streams.student[:FITTED])
        lack = (made.streams.teacher_after[:FITTED] - after).flatten(0, 1)
        return float(lack.mean(0).norm() / lack.norm(dim=1).mean())

    assert constant_share() > 0.1
    made.refit(output=100.0, mlp_out=100.0)
    assert constant_share() < 1e-5


@pytest.mark.parametrize("shape", ["biases", "gpt2"])
@pytest.mark.parametrize("readers", [None, 0.01])
def test_only_the_refitted_matrices_change_and_none_of_the_teachers(layer, readers, shape):
    """The student's tensors are the teacher's own where the fit left them: an in-place edit would spoil both."""
    made = layer(shape, "key-shared", drift=0.3)
    roles = made.runner.family.roles
    student = dict(made.student.named_parameters())
    teacher = dict(made.teacher.named_parameters())
    shared = [name for name in student if name in teacher and student[name].data_ptr() == teacher[name].data_ptr()]
    writers = (roles.output.module, roles.mlp_out.module)
    assert {f"{module}.weight" for module in writers} <= set(shared)
    before = {name: tensor.clone() for name, tensor in teacher.items()}
    raw = {name: tensor.clone() for name, tensor in made.tensors.items()}
    ours = {name: tensor.clone() for name, tensor in student.items()}
    made.refit(mlp_readers=readers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.teacher.named_parameters())
    assert all(torch.equal(tensor, raw[name]) for name, tensor in made.tensors.items())
    changed = {name for name, tensor in made.student.named_parameters() if not torch.equal(tensor, ours[name])}
    also = () if readers is None else [view.module for view in roles.mlp_readers]
    assert changed == {f"{module}.weight" for module in (*writers, *also)} | {f"{module}.bias" for module in writers}


@pytest.mark.parametrize("shape", ["llama", "biases", "mistral", "qwen2", "gpt2"])
def test_nothing_to_do_where_the_student_is_the_teacher(layer, shape):
    made = layer(shape, "dense")
    before = {name: tensor.clone() for name, tensor in made.student.named_parameters()}
    made.refit(mlp_readers=0.01)
    for name, tensor in made.student.named_parameters():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)


def test_held_out_windows_are_not_looked_at(layer):
    made = layer("llama", "key-shared", drift=0.3)
    made.streams.student[FITTED:] = torch.full((HELD, CONTEXT, 32), torch.nan)
    made.refit(mlp_readers=0.01)
    assert all(torch.isfinite(tensor).all() for tensor in made.student.parameters())
