"""A materialised checkpoint is a stock model with the reduced model's logits."""

import errno
import json
import os
import shutil

import pytest
import torch
from foldings import fold, in_float64
from safetensors.torch import load_file, save_file
from tiny_models import EVERY_MAP, SHAPES, load_reduced, save_reduced, save_tiny, save_variant, tiny_model, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen2ForCausalLM,
)

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.errors import CheckpointError, NonFiniteError, OutputError, UnsupportedArchitecture
from qectomy.models.heads import split_heads
from qectomy.models.linear_views import read_view
from qectomy.surgery.materialize import materialize

HALF = ("bf16", "fp16", "gpt2-bf16")


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def load_stock(folder, dtype=torch.float64):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(model) in (GPT2LMHeadModel, LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)
    return model.eval()


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in HALF])
def test_same_logits(tiny_reduced, tmp_path, name):
    folder, ids = tiny_reduced(EVERY_MAP, name), tokens(2, 70)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    result = materialize(open_checkpoint(folder, reduced=True), tmp_path / "stock")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    reduced, stock = load_reduced(folder, torch.float64), load_stock(tmp_path / "stock")
    with torch.no_grad():
        expected = reduced(ids).logits
        # W_Q is rounded to float32 once
        assert relative(stock(ids).logits, expected) < 1e-5
        assert relative(load_stock(tmp_path / "stock", torch.float32)(ids).logits.double(), expected) < 1e-4
        if name.startswith("gpt2"):
            stock.transformer.h[2].attn.c_attn.weight[:, 3] *= 2
        else:
            stock.model.layers[2].self_attn.q_proj.weight[3] *= 1.05
        assert relative(stock(ids).logits, expected) > 1e-4
    held = open_checkpoint(tmp_path / "stock")
    assert result["parameters"] == {
        "before": open_checkpoint(folder, reduced=True).parameters,
        "after": held.parameters,
    }
    assert result["bytes"]["after"] == held.nbytes
    assert "saves nothing" in result["note"]


@pytest.mark.parametrize("name", ["llama", "wide-heads", "narrow-heads"])
def test_weights_that_are_not_queries_are_copied_bit_for_bit(tiny_reduced, tmp_path, name):
    """But those of an identity layer that read or make its rescaled x̂."""
    folder = tiny_reduced(EVERY_MAP, name)
    materialize(open_checkpoint(folder, reduced=True), tmp_path / "stock")
    reduced, stock = load_file(folder / "model.safetensors"), load_file(tmp_path / "stock/model.safetensors")
    rescaled = {f"model.layers.0.{part}.weight" for part in ("input_layernorm", "self_attn.k_proj", "self_attn.v_proj")}
    common = set(reduced) & set(stock) - rescaled
    assert len(common) > 30
    assert all(torch.equal(reduced[key], stock[key]) for key in common)
    assert not any(torch.equal(reduced[key], stock[key]) for key in rescaled)
    rest = {key.rpartition(".self_attn.")[2].partition(".")[0] for key in set(stock) - common - rescaled}
    assert rest == {"q_proj"}


def test_identity_and_select_have_one_number_in_each_row(tiny_reduced, tmp_path):
    """identity's W_Q is what its channels' gains were divided by; select's has its own gains, without rounding."""
    for name, n_query in (("llama", 32), ("wide-heads", 48), ("narrow-heads", 24)):
        folder, out = tiny_reduced(EVERY_MAP, name), tmp_path / name
        materialize(open_checkpoint(folder, reduced=True), out)
        reduced, stock = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
        gain = "model.layers.0.input_layernorm.weight"
        expected = torch.zeros(n_query, 32)
        expected[torch.arange(n_query), torch.arange(n_query) % 32] = 1
        expected *= reduced[gain] / stock[gain]
        torch.testing.assert_close(stock["model.layers.0.self_attn.q_proj.weight"], expected, rtol=1e-6, atol=0)
        query = "model.layers.1.self_attn.query."
        expected = torch.zeros(n_query, 32)
        expected[torch.arange(n_query), reduced[query + "index"].long()] = reduced[query + "gain"]
        if query + "bias" in reduced:  # the map is probed with its bias, taken off again in float64
            torch.testing.assert_close(stock["model.layers.1.self_attn.q_proj.weight"], expected, rtol=1e-7, atol=1e-15)
            assert torch.equal(stock["model.layers.1.self_attn.q_proj.bias"], reduced[query + "bias"])
        else:
            assert torch.equal(stock["model.layers.1.self_attn.q_proj.weight"], expected)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-one-head"])
def test_gpt2s_queries_stand_before_its_keys_and_values(tiny_reduced, tmp_path, name):
    """select's columns of c_attn are ones and zeros; keys and values are copied, their biases 0."""
    folder = tiny_reduced(EVERY_MAP, name)
    materialize(open_checkpoint(folder, reduced=True), tmp_path / "stock")
    reduced, stock = load_file(folder / "model.safetensors"), load_file(tmp_path / "stock/model.safetensors")
    for layer in range(4):
        prefix = f"transformer.h.{layer}.attn.c_attn."
        weight, bias = stock[prefix + "weight"], stock[prefix + "bias"]
        assert torch.equal(weight[:, 32:], reduced[prefix + "weight"]) == (layer > 0)
        assert torch.equal(bias[32:], torch.zeros(64))
        assert torch.equal(bias[:32], reduced.get(prefix + "query.bias", torch.zeros(32)))
    norm, prefix = "transformer.h.0.ln_1.", "transformer.h.0.attn.c_attn.weight"
    ratio = stock[norm + "weight"] / reduced[norm + "weight"]
    torch.testing.assert_close(stock[norm + "bias"], reduced[norm + "bias"] * ratio, rtol=1e-6, atol=0)
    torch.testing.assert_close(stock[prefix][:, :32], (1 / ratio).diag(), rtol=1e-6, atol=0)
    torch.testing.assert_close(stock[prefix][:, 32:], reduced[prefix] / ratio[:, None], rtol=1e-6, atol=0)
    chosen = torch.zeros(32, 32)
    chosen[reduced["transformer.h.1.attn.c_attn.query.index"].long(), torch.arange(32)] = 1
    torch.testing.assert_close(stock["transformer.h.1.attn.c_attn.weight"][:, :32], chosen, rtol=0, atol=1e-15)
    rest = {key for key in stock if ".attn.c_attn." not in key or ".h.4." in key}  # layer 4 is dense
    rest -= {norm + "weight", norm + "bias"}
    assert len(rest) > 50
    assert all(torch.equal(stock[key], reduced[key]) for key in rest)


@pytest.mark.parametrize("fields", [{}, {"softmax_scale": 0.15}], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "gpt2-inverse", "gpt2-unscaled"])
def test_softmax_scales_come_back_in_the_queries(tiny_reduced, tmp_path, name, fields):
    """W_Q and b_Q take them, those of a dense layer too, and nothing else; the config has GPT-2's defaults."""
    plain, folder = tiny_reduced(EVERY_MAP, name), tmp_path / "reduced"
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    default = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    for source, out, changed in ((folder, "scaled", fields), (plain, "plain", default)):
        source = shutil.copytree(source, tmp_path / f"{out}-source")
        (source / "config.json").write_text(json.dumps(config | changed))
        materialize(open_checkpoint(source, reduced=True), tmp_path / out)
        written = json.loads((tmp_path / out / "config.json").read_text())
        assert "softmax_scale" not in written
        assert default.items() <= written.items()
        assert written["n_ctx"] == written["n_positions"] == 128
    factor = fields.get("softmax_scale", 1.0 if name == "gpt2-unscaled" else 8**-0.5) * 8**0.5  # heads of 8 channels
    scaled, unscaled = (load_file(tmp_path / out / "model.safetensors") for out in ("scaled", "plain"))
    for key, tensor in unscaled.items():
        expected = tensor.clone()
        if ".attn.c_attn." in key:
            expected[..., :32] *= factor / (int(key.split(".")[2]) + 1 if name == "gpt2-inverse" else 1)
        torch.testing.assert_close(scaled[key], expected, rtol=1e-6, atol=1e-12, msg=key)
    ids = tokens(2, 40)
    with torch.no_grad():
        expected = load_reduced(tmp_path / "scaled-source", torch.float64)(ids).logits
        assert relative(load_stock(tmp_path / "scaled")(ids).logits, expected) < 1e-5
        if name != "gpt2" or fields:
            assert relative(load_stock(tmp_path / "plain")(ids).logits, expected) > 1e-3


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_kept(tiny_reduced, tmp_path, name):
    folder = tiny_reduced(EVERY_MAP, name)
    materialize(open_checkpoint(folder, reduced=True), tmp_path / "stock")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name.removeprefix("gpt2-")]
    assert {tensor.dtype for tensor in load_file(tmp_path / "stock/model.safetensors").values()} == {dtype}
    config = json.loads((tmp_path / "stock/config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "stock").dtype == dtype
    with torch.no_grad():
        exact = load_reduced(folder, torch.float64)(tokens()).logits
        assert relative(load_stock(tmp_path / "stock")(tokens()).logits, exact) < 0.2


def test_sharded(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("sharded", num_hidden_layers=5)
    folder = save_reduced(tmp_path / "reduced", source, EVERY_MAP, max_shard_bytes=9000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    checkpoint = open_checkpoint(folder, reduced=True)
    materialize(checkpoint, tmp_path / "one")
    materialize(checkpoint, tmp_path / "many", max_shard_bytes=9000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    one, many = load_stock(tmp_path / "one"), load_stock(tmp_path / "many")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))
    assert relative(many(tokens()).logits, load_reduced(folder, torch.float64)(tokens()).logits) < 1e-5


def test_what_comes_along(tiny_reduced, tmp_path):
    folder = shutil.copytree(tiny_reduced(EVERY_MAP), tmp_path / "reduced")
    (folder / "LICENSE.md").write_text("terms")
    (folder / "tokenizer_evil.py").write_text("boom")
    (folder / "secrets.env").write_text("no")
    steps = []
    materialize(open_checkpoint(folder, reduced=True), tmp_path / "stock", progress=lambda *step: steps.append(step))
    assert steps == [(done, 6, "writing") for done in range(1, 7)]  # what lies outside the layers is a step too
    names = {path.name for path in (tmp_path / "stock").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE.md"} <= names
    assert not names & {"modeling_qectomy_llama.py", "tokenizer_evil.py", "secrets.env"}
    config = json.loads((tmp_path / "stock/config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert not {"auto_map", "query_maps"} & set(config)
    assert AutoTokenizer.from_pretrained(tmp_path / "stock")("nevermore")["input_ids"]


def test_existing_output_is_refused(tiny_reduced, tmp_path):
    with pytest.raises(OutputError, match=f"{tmp_path} exists; nothing is overwritten"):
        materialize(open_checkpoint(tiny_reduced(EVERY_MAP), reduced=True), tmp_path)


def test_a_disk_that_fills_up(tiny_reduced, tmp_path, monkeypatch):
    whole, left = os.pwrite, [60_000]

    def pwrite(descriptor, data, offset):
        if left[0] < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= len(data)
        return whole(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(
        OutputError, match=r"deep/stock could not be written: the disk is full. Nothing was left behind"
    ):
        materialize(open_checkpoint(tiny_reduced(EVERY_MAP), reduced=True), tmp_path / "deep/stock")
    assert left[0] < 60_000
    assert list(tmp_path.iterdir()) == []


def test_a_disk_with_too_little_room(tiny_reduced, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"has 1,000 bytes free; .* are needed. Nothing was written"):
        materialize(open_checkpoint(tiny_reduced(EVERY_MAP), reduced=True), tmp_path / "stock")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name, value, error", [("gain", float("nan"), NonFiniteError), ("index", 32, CheckpointError)])
def test_damage_is_named_and_leaves_nothing(tiny_reduced, tmp_path, name, value, error):
    folder = shutil.copytree(tiny_reduced(EVERY_MAP), tmp_path / "reduced")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"model.layers.1.self_attn.query.{name}"][5] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(error, match=rf"model.layers.1.self_attn.query.{name}"):
        materialize(open_checkpoint(folder, reduced=True), tmp_path / "stock")
    assert [path.name for path in tmp_path.iterdir()] == ["reduced"]


GAUGED = [
    "gpt2",
    "gpt2-untied",
    "gpt2-inverse",
    "llama",
    "attention-bias",
    "biases",
    "mqa",
    "narrow-heads",
    "mistral",
    "qwen2",
]


@pytest.mark.parametrize("name", GAUGED)
@torch.no_grad()
def test_gauged_projections_are_written_out(tmp_path, name):
    """A stock model with the folded one's logits, which are the original's, and no identity blocks."""
    source = save_tiny(tmp_path / "source", name, dtype="float64")
    fold(source, tmp_path / "folded")
    folded = open_checkpoint(tmp_path / "folded", reduced=True)
    assert {spec.value for spec in folded.recipe} == {"gauge"}
    materialize(folded, tmp_path / "stock")
    ids = tokens(2, 40)
    expected = in_float64(tiny_model(name))(ids).logits
    stock = in_float64(load_stock(tmp_path / "stock"))
    assert relative(stock(ids).logits, expected) < 1e-12
    assert relative(in_float64(load_reduced(tmp_path / "folded", torch.float64))(ids).logits, expected) < 1e-12
    layer, roles = open_checkpoint(tmp_path / "stock").read_layer(1), folded.family.roles
    (W_V, b_V), (W_O, _) = (read_view(layer, view) for view in (roles.value, roles.output))
    if name == "qwen2":  # whose W_O has no bias to take it
        W_V = torch.cat([W_V, b_V[None]])
    else:
        assert b_V is None or not b_V.any()
    for head, block in enumerate(split_heads(W_V, folded.dims.d_head)):  # both have half of each singular value
        shared = folded.dims.n_heads // folded.dims.n_kv_heads
        rows = W_O.unflatten(0, (-1, shared, folded.dims.d_head))[head].transpose(0, 1).flatten(1)
        torch.testing.assert_close(block.T @ block, rows @ rows.T, rtol=1e-9, atol=1e-9)
        assert (block == 0).sum() == 0
    assert open_checkpoint(tmp_path / "stock").parameters == open_checkpoint(source).parameters


@pytest.mark.parametrize("name", ["gpt2", "llama", "biases"])
@torch.no_grad()
def test_an_exact_identity_is_written_out(tmp_path, name):
    """Layers whose W_Q went exactly, beside gauged values: W_Q is diagonal."""
    model = tiny_model(name).double()
    if name == "gpt2":
        model.transformer.h[1].attn.c_attn.weight[:, :32] = torch.linspace(0.5, 2, 32).diag()
    else:
        model.model.layers[1].self_attn.q_proj.weight.copy_(torch.linspace(0.5, 2, 32).diag())
    model.save_pretrained(tmp_path / "source")
    plan = fold(tmp_path / "source", tmp_path / "folded")
    assert [spec.name for spec in plan.recipe] == ["gauge" if name == "gpt2" else "dense", "identity"]
    materialize(open_checkpoint(tmp_path / "folded", reduced=True), tmp_path / "stock")
    found, ids = load_file(tmp_path / "stock/model.safetensors"), tokens(2, 40)
    if name == "gpt2":
        W_Q = found["transformer.h.1.attn.c_attn.weight"][:, :32]
    else:
        W_Q = found["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(W_Q, W_Q.diag().diag())
    assert W_Q.diag().all()
    expected = in_float64(model)(ids).logits
    assert relative(in_float64(load_stock(tmp_path / "stock"))(ids).logits, expected) < 1e-12


@pytest.mark.parametrize(
    "fields", [dict(norms=False), dict(mlp_skip=False), dict(attention_skip=False), dict(shared_layers=True)], ids=str
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_variant_has_no_stock_model(tmp_path, family, fields):
    """Nothing is written, whether something was folded or not."""
    save_variant(tmp_path / "variant", family, tie_word_embeddings=False, **fields)
    fold(tmp_path / "variant", tmp_path / "folded")
    for name in ("variant", "folded"):
        with pytest.raises(
            UnsupportedArchitecture, match=f"is no stock {family} model with W_Q written back: it lacks"
        ):
            materialize(open_checkpoint(tmp_path / name, reduced=True), tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
