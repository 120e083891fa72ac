"""What a conversion moves beside W_Q is measured and told, and with --no-refit the rest stays byte for byte."""

import pytest
import torch
from conversions import convert_tiny, tensor_hashes
from damage import edit_weights
from launches import several
from numpy.linalg import norm

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.layerwise import LayerPass
from qectomy.conversion.moved import moved_by
from qectomy.errors import QectomyError, QueryMapError, Stopped
from qectomy.models.query_maps import parse_query_map
from qectomy.runs.run_dir import RunDir
from qectomy.surgery.stream_basis import random_basis

WEIGHTS = {"W_K", "W_V", "W_O", "W_down"}


def relative(before, after):
    """‖after - before‖ / ‖before‖, by numpy."""
    old, new = (tensor.double().numpy().ravel() for tensor in (before, after))
    return norm(new - old) / norm(old)


def layers(source, out):
    """(the source's layer, the written one) of each layer, by name inside it."""
    old, new = open_checkpoint(source), open_checkpoint(out, reduced=True)
    return [(old.read_layer(i), new.read_layer(i)) for i in range(old.dims.n_layers)]


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_llamas_numbers_are_those_of_its_files(dtype, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint("biases", num_hidden_layers=3)
    report = convert_tiny(source, tmp_path / "out", "0=dense,1=key-shared,2=dense", raven, dtype=dtype)
    for record, (old, new) in zip(report["layers"], layers(source, tmp_path / "out"), strict=True):
        found = {
            f"{kind}_{short}": relative(old[name], new[name])
            for short, module in {
                **{letter.upper(): f"self_attn.{letter}_proj" for letter in "qkvo"},
                **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
            }.items()
            for kind, part in (("W", "weight"), ("b", "bias"))
            if (name := f"{module}.{part}") in old.keys() & new.keys()
        }
        found |= {"norm_gain": relative(old["input_layernorm.weight"], new["input_layernorm.weight"])}
        expected = {name: value for name, value in found.items() if value or name in WEIGHTS}
        assert record["moved"] == pytest.approx(expected, rel=1e-9)
        assert record["moved"].keys() == expected.keys()
    first, reduced, last = (record["moved"] for record in report["layers"])
    assert last["W_O"] > (reduced["W_K"] > 1e-3) * 1e-6  # a dense layer is refitted
    if dtype is None:
        assert first == dict.fromkeys(WEIGHTS, 0.0)
        assert last["W_K"] == last["W_V"] == reduced["W_V"] == 0
        assert {"b_O", "b_down"} <= last.keys()


def test_a_gpt2s_fused_projections_are_told_apart(tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint("gpt2")
    report = convert_tiny(source, tmp_path / "out", "0=select,1=dense", raven)
    (old, new), (_, dense) = layers(source, tmp_path / "out")
    width = old["attn.c_attn.weight"].shape[0]
    found, dense_found = (record["moved"] for record in report["layers"])
    for place, name in enumerate(("W_K", "W_V")):
        before = old["attn.c_attn.weight"][:, (place + 1) * width : (place + 2) * width]
        after = new["attn.c_attn.weight"][:, place * width : (place + 1) * width]
        assert found[name] == pytest.approx(relative(before, after), rel=1e-9)
    assert (found["W_V"], found["W_K"] > 0.01) == (0, True)
    for name, tensor in (("W_O", "attn.c_proj.weight"), ("W_down", "mlp.c_proj.weight"), ("b_O", "attn.c_proj.bias")):
        assert found[name] == pytest.approx(relative(old[tensor], new[tensor]), rel=1e-9)
    assert "W_Q" not in found
    assert dense.keys() == old.keys()
    assert dense_found["W_K"] == dense_found["W_V"] == 0 < dense_found["W_O"]


def test_a_bias_of_zeros_has_no_share(tiny_copy):
    source = open_checkpoint(tiny_copy("gpt2"))
    edit_weights(source.folder, lambda tensors: tensors["transformer.h.0.attn.c_proj.bias"].zero_())
    tensors = source.read_layer(0)
    tensors["attn.c_proj.bias"] = tensors["attn.c_proj.bias"] + 1
    assert moved_by(source, 0, parse_query_map("dense"), tensors) == {**dict.fromkeys(WEIGHTS, 0.0), "b_O": None}


def test_a_turned_layer_is_compared_with_the_source_in_the_same_basis(tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint("tied"))
    gain = source.read(f"{source.family.final_norm}.weight", torch.float64)
    basis = random_basis(gain, torch.ones(source.dims.d_model), True, torch.Generator().manual_seed(0))
    for layer in (0, 1):
        turned = basis.layer(source.family, source.read_layer(layer, torch.float32), scaled_embedding=not layer)
        moved = turned | {"mlp.down_proj.weight": turned["mlp.down_proj.weight"] * 1.25}
        found = moved_by(source, layer, parse_query_map("dense"), moved, basis)
        assert found == {**dict.fromkeys(WEIGHTS, 0.0), "W_down": pytest.approx(0.25, rel=1e-6)}


# --no-refit

ALONE = [("llama", "key-shared"), ("biases", "low-rank:3"), ("bf16", "select"), ("tied", "key-shared")]


@pytest.mark.parametrize("shape, query", ALONE)
def test_without_a_refit_only_the_query_map_and_the_key_move(shape, query, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint(shape, num_hidden_layers=4)
    recipe = f"0=dense,1={query},2=dense,3={query}"
    report = convert_tiny(source, tmp_path / "out", recipe, raven, refit=False)
    before, after = tensor_hashes(source), tensor_hashes(tmp_path / "out")
    kept = {name: digest for name, digest in before.items() if after.get(name) == digest}
    gone, new = before.keys() - kept.keys(), after.keys() - kept.keys()
    reduced = tuple(f"model.layers.{layer}.self_attn." for layer in (1, 3))
    assert all(name.startswith(reduced) for name in gone | new)
    assert {name.split(".")[4] for name in gone} == {"q_proj", "k_proj"}
    assert {name.split(".")[4] for name in new} == {"query", "k_proj"}
    assert report["calibration"]["refit"] is False
    for record in report["layers"]:
        moved = {name for name, value in record["moved"].items() if value}
        assert moved - {"b_K"} == ({"W_K"} if record["map"] != "dense" else set())


@pytest.mark.parametrize("query", ["key-shared", "identity"])
def test_a_gpt2_without_a_refit(query, tiny_checkpoint, raven, tmp_path):
    """The bias of its values goes into that of W_O, exactly; identity puts the query's into the norm's shift."""
    source = tiny_checkpoint("gpt2", num_hidden_layers=3)
    report = convert_tiny(source, tmp_path / "out", f"0={query},1=dense,2=dense", raven, refit=False)
    before, after = tensor_hashes(source), tensor_hashes(tmp_path / "out")
    shifted = {"ln_1.bias"} if query == "identity" else set()
    moved = {"attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.bias"} | shifted
    changed = {name for name, digest in before.items() if after.get(name) != digest}
    assert changed == {f"transformer.h.0.{name}" for name in moved}
    found = {name for name, value in report["layers"][0]["moved"].items() if value}
    assert found == {"W_K", "b_O"} | ({"norm_shift"} if query == "identity" else set())


def test_where_every_matrix_follows_a_turned_stream_it_is_refused(tiny_checkpoint, raven, tmp_path):
    with pytest.raises(QueryMapError, match=r"identity in a llama turns the whole residual stream.*leave --no-refit"):
        convert_tiny(tiny_checkpoint(), tmp_path / "out", "0=select,1=identity", raven, refit=False)
    assert list(tmp_path.iterdir()) == []


# Records of several processes, of older versions, and of other settings


def test_several_processes_tell_what_one_does(tiny_checkpoint, raven, tmp_path):
    found, none = several(tiny_checkpoint(), tmp_path / "out", "0=select,1=dense", raven, 2, refit=False)
    assert none is None
    assert found["layers"][1]["moved"] == dict.fromkeys(WEIGHTS, 0.0)
    assert found["layers"][0]["moved"]["W_K"] > 0


@pytest.fixture
def halted(tiny_checkpoint, raven, tmp_path, monkeypatch):
    """Return a function (settings) that stops a conversion to tmp_path/out after its first layer."""

    def halt(**settings):
        layer = LayerPass._layer

        def first_alone(self, index, *rest):
            if index:
                raise Stopped("stopped by the test")
            return layer(self, index, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(LayerPass, "_layer", first_alone)
            with pytest.raises(Stopped):
                convert_tiny(tiny_checkpoint(), tmp_path / "out", "0=select,1=dense", raven, **settings)
        return tmp_path / "out.converting"

    return halt


def test_a_run_that_an_older_version_began_goes_on(halted, tiny_checkpoint, raven, tmp_path):
    folder = halted()
    assert not any("refit" in path.read_text() for path in folder.glob("*.json"))
    journal, calls = RunDir(tmp_path / "out").journal, []
    older = journal.entries[-1]
    del older["record"]["moved"]
    journal.cut(1)
    journal.append(**older)
    report = convert_tiny(
        tiny_checkpoint(),
        tmp_path / "out",
        "0=select,1=dense",
        raven,
        resume=True,
        progress=lambda *call: calls.append(call),
    )
    assert [done for done, _, _ in calls] == [1, 2]  # the first: what was there
    assert ["moved" in record for record in report["layers"]] == [False, True]


def test_a_run_without_a_refit_goes_on_as_such(halted, tiny_checkpoint, raven, tmp_path):
    halted(refit=False)
    source, out = tiny_checkpoint(), tmp_path / "out"
    with pytest.raises(QectomyError, match=r"refit was left out \(--no-refit\), is None"):
        convert_tiny(source, out, "0=select,1=dense", raven, resume=True)
    report = convert_tiny(source, out, "0=select,1=dense", raven, resume=True, refit=False)
    assert report["layers"][1]["moved"] == dict.fromkeys(WEIGHTS, 0.0)
