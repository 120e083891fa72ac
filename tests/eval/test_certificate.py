"""The certificate: exact folders get it, every kind of tampering loses it, and fitted ones say what they are."""

import shutil

import pytest
import torch
from conversions import convert_tiny, reload_here
from damage import edit_json, edit_weights
from tiny_models import save_reduced, save_variant, variant_model
from transformers import AutoModelForCausalLM

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.exact import convert_exact
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import CheckpointError
from qectomy.eval.certificate import verify
from qectomy.eval.protocol import Protocol, scoring_windows
from qectomy.report.tables import show_certificate
from qectomy.surgery.choice import choose_folds
from qectomy.text.text import load_tokenizer, read_source

VARIANTS = {
    "norm-free": dict(norms=False, tie_word_embeddings=False),
    "attention-skip-only": dict(norms=False, mlp_skip=False),
    "skipless": dict(norms=False, attention_skip=False, mlp_skip=False),
    "shared": dict(norms=False, shared_layers=True, tie_word_embeddings=False),
}


def certificate(folder, source, held=None):
    return verify(open_checkpoint(folder, reduced=True), open_checkpoint(source), held)


@pytest.fixture(scope="module")
def made(tiny_checkpoint, tmp_path_factory):
    """Return a function (shape, dtype=None) -> (folder converted exactly, its source), made once."""
    found = {}

    def make(shape, dtype=None):
        if (shape, dtype) not in found:
            folder = tmp_path_factory.mktemp("exact")
            if "/" in shape:
                family, variant = shape.split("/")
                source = save_variant(folder / "source", family, **VARIANTS[variant])
            else:
                source = tiny_checkpoint(shape)
            with pytest.MonkeyPatch.context() as patch:
                reload_here(patch)
                convert_exact(open_checkpoint(source), folder / "out", ConvertSettings(dtype=dtype))
            found[shape, dtype] = folder / "out", source
        return found[shape, dtype]

    return make


SHAPES = ["gpt2", "gpt2-untied", "llama", "biases", "mistral", "qwen2", "bf16"]
SHAPES += [f"{family}/{variant}" for family in ("gpt2", "llama") for variant in VARIANTS]


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exact_folder_is_certified(shape, made):
    folder, source = made(shape)
    found = certificate(folder, source)
    assert (found["verdict"], found["reasons"]) == ("exact", [])
    assert found["tensors_proved"] == found["tensors"] == len(open_checkpoint(folder, reduced=True).tensors)
    assert 0 < found["float64"]["logit_error"] + found["bound"] < 0.5
    assert found["float64"]["logit_error"] <= 10 * found["bound"]
    for record in found["layers"]:
        assert record["bound"] == 2 * torch.finfo(getattr(torch, found["dtype"])).eps * record["condition"]
        assert 0 <= record["roundings"] <= 0.51  # rounding to nearest is half of one
        assert record["error_float64"] <= 10 * found["bound"]
        assert f"error_{found['dtype']}" in record


def test_it_measures_on_text(made, raven):
    folder, source = made("llama", "bfloat16")
    windows = scoring_windows(load_tokenizer(source), read_source(str(raven)), Protocol(context=32, tokens=160), 320)
    found = certificate(folder, source, windows)
    assert found["verdict"] == "exact"
    assert found["text"]["text"] == "raven.txt"
    assert found["bfloat16"]["ratio"] == pytest.approx(1, abs=0.2)
    assert found["bfloat16"]["ratio"] != 1
    assert min(found[dtype]["logit_error"] for dtype in ("float64", "bfloat16")) > 1e-4  # stored rounding shows in both


@pytest.mark.parametrize(
    "shape, name",
    [
        ("gpt2", "transformer.h.1.attn.c_attn.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.gauge.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.gauge.bias"),
        ("gpt2", "transformer.h.0.attn.c_proj.bias"),
        ("gpt2", "transformer.wpe.weight"),
        ("gpt2", "transformer.ln_f.bias"),
        ("llama", "model.layers.1.self_attn.v_proj.weight"),
        ("llama", "model.layers.0.self_attn.o_proj.weight"),
        ("llama", "model.layers.0.mlp.down_proj.weight"),
        ("llama", "model.layers.1.input_layernorm.weight"),
        ("llama", "lm_head.weight"),
        ("llama/attention-skip-only", "model.embed_tokens.weight"),
        ("gpt2/skipless", "transformer.h.1.mlp.c_fc.bias"),
    ],
)
def test_one_number_changed_in_one_tensor_is_found_and_named(shape, name, made, tmp_path):
    folder, source = made(shape)
    shutil.copytree(folder, tmp_path / "tampered")

    def change(tensors):
        flat = tensors[name].view(-1)
        flat[len(flat) // 2] += 1e-4 * tensors[name].abs().max()

    edit_weights(tmp_path / "tampered", change)
    found = certificate(tmp_path / "tampered", source)
    assert found["verdict"] == "failed"
    assert [reason.split(" is ")[0] for reason in found["reasons"] if " roundings " in reason] == [name]
    assert found["tensors_proved"] == found["tensors"] - 1


def test_other_pivots_are_found(made, tmp_path):
    folder, source = made("llama")
    shutil.copytree(folder, tmp_path / "tampered")
    name = "model.layers.0.self_attn.v_proj.pivots"
    edit_weights(tmp_path / "tampered", lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()}))
    with pytest.raises(CheckpointError, match=r"the channel numbers of layer 0 .* are not those of which config.json"):
        certificate(tmp_path / "tampered", source)
    edit_json(tmp_path / "tampered/config.json", lambda config: config.pop("index_sha256"))  # as in older folders
    found = certificate(tmp_path / "tampered", source)
    assert found["verdict"] == "failed"
    assert any("layers.0.self_attn.v_proj" in reason for reason in found["reasons"])
    assert any("logits in float64 are off" in reason for reason in found["reasons"])


def test_a_changed_config_is_found_by_name_and_by_measure(made, tmp_path):
    folder, source = made("llama")
    shutil.copytree(folder, tmp_path / "tampered")
    edit_json(tmp_path / "tampered/config.json", lambda config: config.update(rms_norm_eps=0.1))
    found = certificate(tmp_path / "tampered", source)
    assert found["verdict"] == "failed"
    assert found["reasons"][0] == "config.json: rms_norm_eps is 0.1, not 1e-06"
    assert "logits in float64 are off" in found["reasons"][1]


def test_another_original_of_the_same_shape_fails(made, tiny_checkpoint):
    folder, _ = made("llama")
    found = certificate(folder, tiny_checkpoint("llama", rms_norm_eps=1e-7))  # other random weights
    assert found["verdict"] == "failed"
    assert found["tensors_proved"] < found["tensors"] // 4


@pytest.mark.parametrize(
    "query, why", [("select", "layer 0 is fitted (select)"), ("identity", "layer 0 is fitted (id")]
)
def test_a_fitted_folder_is_not_exact_and_says_so(query, why, tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint()
    convert_tiny(source, tmp_path / "out", query, raven)
    found = certificate(tmp_path / "out", source)
    assert found["verdict"] == "not exact"
    assert found["reasons"][0].startswith(f"layer 0-1: fitted ({query})")
    assert found["bound"] is None
    assert found["tensors_proved"] == 0
    assert found["float64"]["logit_error"] > 1e-3  # and by how much it is off is measured all the same


def test_two_layers_cannot_claim_one_stream(tmp_path):
    source = save_variant(tmp_path / "source", "llama", **VARIANTS["norm-free"])
    save_reduced_identity = save_reduced(tmp_path / "out", source, ("identity", "identity"))
    found = certificate(save_reduced_identity, source)
    assert found["verdict"] == "not exact"
    assert found["reasons"] == ["layer 1: its stream's one change of basis is layer 0's"]


def test_models_that_cannot_come_from_each_other(made, tiny_checkpoint):
    folder, _ = made("llama")
    with pytest.raises(CheckpointError, match=r"of the family llama, .* of gpt2"):
        certificate(folder, tiny_checkpoint("gpt2"))
    with pytest.raises(CheckpointError, match=r"differ in n_kv_heads \(2 and 4\)"):
        certificate(folder, tiny_checkpoint("mha"))


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_float16_and_its_smallest_numbers(shape, made):
    folder, source = made(shape, "float16")
    assert certificate(folder, source)["verdict"] == "exact"


def test_a_field_that_only_one_config_has_counts_as_its_default(made, tmp_path):
    folder, source = made("gpt2", "bfloat16")
    shutil.copytree(folder, tmp_path / "tampered")
    edit_json(tmp_path / "tampered/config.json", lambda config: config.update(softmax_scale=0.3))
    found = certificate(tmp_path / "tampered", source)
    assert (found["verdict"], found["reasons"][0]) == ("failed", "config.json: softmax_scale is 0.3, not None")


def test_it_says_when_other_code_lies_beside_the_weights(made, tmp_path):
    folder, source = made("llama")
    assert certificate(folder, source)["code_as_shipped"]
    shutil.copytree(folder, tmp_path / "other")
    with (tmp_path / "other/modeling_qectomy_llama.py").open("a") as file:
        file.write("raise SystemExit\n")
    found = certificate(tmp_path / "other", source)
    assert (found["verdict"], found["code_as_shipped"]) == ("exact", False)


@pytest.mark.parametrize("untold", [lambda c: c.pop("index_sha256"), lambda c: c.update(index_sha256=None)])
def test_it_says_when_the_config_does_not_tell_of_channel_numbers(made, tmp_path, capsys, untold):
    folder, source = made("llama")
    assert certificate(folder, source)["channel_numbers_told"]
    shutil.copytree(folder, tmp_path / "untold")
    edit_json(tmp_path / "untold/config.json", untold)
    found = certificate(tmp_path / "untold", source)
    assert (found["verdict"], found["channel_numbers_told"]) == ("exact", False)
    for result, said in ((found, True), ({**found, "channel_numbers_told": True}, False)):
        show_certificate(result)
        shown = " ".join(capsys.readouterr().out.split())
        assert ("not covered: config.json has no index_sha256, so a program that loads the folder" in shown) is said
        assert (f"to add it: qectomy renew {tmp_path / 'untold'}" in shown) is said


def test_nearly_orthogonal_is_not_orthogonal(tmp_path):
    """Singular values within 3 % of 1 pass no norm, though bfloat16 has eight bits."""
    model = variant_model("llama", tie_word_embeddings=False, num_hidden_layers=1).bfloat16()
    W = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    layer = model.model.layers[0]
    layer.input_layernorm.weight.data.fill_(1)
    layer.self_attn.q_proj.weight.data = (W * torch.linspace(0.97, 1.03, 32)).bfloat16()
    model.save_pretrained(tmp_path / "near")
    choice = choose_folds(open_checkpoint(tmp_path / "near"))
    assert not choice.claims
    layer.self_attn.q_proj.weight.data = W.bfloat16()
    model.save_pretrained(tmp_path / "orthogonal")
    assert choose_folds(open_checkpoint(tmp_path / "orthogonal")).claims == {0: 0}
    assert not choose_folds(open_checkpoint(tmp_path / "orthogonal"), "F32").claims  # not to float32's precision


def test_a_folder_saved_anew_is_told_from_one_that_was_written(made, tmp_path):
    """from_pretrained writes the gauges out, so what is saved from there has other coordinates and its full size."""
    folder, source = made("llama")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "again")
    found = certificate(tmp_path / "again", source)
    assert found["verdict"] == "failed"
    assert "if it was saved anew after loading" in found["reasons"][-1]
    assert open_checkpoint(tmp_path / "again", reduced=True).parameters == open_checkpoint(source).parameters
    assert "saved anew" not in str(certificate(folder, source)["reasons"])


# Fitted folders: no proof, but the sha256 of what was written


@pytest.fixture
def fitted(tiny_checkpoint, raven, tmp_path):
    source = tiny_checkpoint()
    convert_tiny(source, tmp_path / "fitted", "select", raven)
    return tmp_path / "fitted", source


def test_a_fitted_folder_as_it_was_written_says_only_what_it_is(fitted):
    found = certificate(*fitted)
    assert found["verdict"] == "not exact"
    assert all("fitted (select)" in reason for reason in found["reasons"])


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.query.gain", "lm_head.weight"]
)
def test_a_fitted_tensor_that_was_edited_is_named(name, fitted):
    folder, source = fitted
    edit_weights(folder, lambda tensors: tensors[name].view(-1)[-1:].add_(1e-3))
    found = certificate(folder, source)
    assert found["verdict"] == "failed"
    assert [reason for reason in found["reasons"] if "fitted (" not in reason] == [
        f"{name} was changed since it was fitted: qectomy.json has another sha256"
    ]


def test_a_fitted_folder_of_an_older_version_has_no_hashes(fitted):
    folder, source = fitted
    edit_json(folder / "qectomy.json", lambda report: report.pop("tensors_sha256"))
    assert certificate(folder, source)["verdict"] == "not exact"
