"""A folder whose config.json calls for other tensors than its files hold does not load, whatever transformers says."""

import json
import shutil

import pytest
import torch
from foldings import fold
from safetensors.torch import load_file, save_file
from tiny_models import EVERY_MAP, load_reduced, save_variant, tokens
from transformers import AutoModel, AutoModelForCausalLM

import qectomy

qectomy.register()
REASON = "the model would compute something else. Take both from one folder, as it was written"


def edited(folder, out, tensors=None, **fields):
    """A copy of a folder with other fields in config.json, and what `tensors` makes of its tensors."""
    shutil.copytree(folder, out)
    said = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(said | fields))
    if tensors is not None:
        held = tensors(load_file(out / "model.safetensors"))
        save_file(held, out / "model.safetensors", {"format": "pt"})
    return out


def refusal(folder, **options) -> str:
    with pytest.raises(ValueError, match=REASON) as raised:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    return str(raised.value)


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("name", ["llama", "biases", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("stored", EVERY_MAP)
def test_a_query_map_that_is_not_the_stored_one(tiny_reduced, tmp_path, stored, name, resized):
    folder = tiny_reduced((stored, "dense"), name)
    for other in {*EVERY_MAP, "low-rank:2"} - {stored}:
        said = refusal(edited(folder, tmp_path / other, query_maps=[other, "dense"]), ignore_mismatched_sizes=resized)
        assert "query_maps" in said, said
        assert "layers.0.self_attn.q" in said or "h.0.attn.c_attn." in said, said


EXTRA, SHAPED = "config.json leaves no place for {} tensor(s) of the files, first ", "{} in the files and {} by"
OTHER = {  # shape, query maps, what config.json says instead; what is said, the tensor, and the field to look at
    "select": ("llama", "select", {"query_maps": ["identity"]}, EXTRA.format(2), "self_attn.query.gain", "query_maps"),
    "dense": ("llama", "dense", {"query_maps": ["identity"]}, EXTRA.format(1), "self_attn.q_proj.weight", "query_maps"),
    "biases": ("biases", "select", {"attention_bias": False}, "", "self_attn.k_proj.bias", "attention_bias"),
    "mlp": ("biases", "select", {"mlp_bias": False}, "", "mlp.down_proj.bias", "mlp_bias and sizes"),
    "norms": ("llama", "select", {"norms": False}, "", "0.input_layernorm.weight", "num_hidden_layers, norms, "),
    "heads": ("llama", "identity", {"num_key_value_heads": 4}, SHAPED.format((16, 32), (32, 32)), "k_proj.weight", ""),
    "rank": (
        *("llama", "low-rank:3", {"query_maps": ["low-rank:2"]}),
        *(SHAPED.format((3, 32), (2, 32)), "self_attn.query.down", "query_maps"),
    ),
    "gpt2 select": ("gpt2", "select", {"query_maps": ["identity"]}, EXTRA.format(2), "query.bias", "query_maps"),
    "gpt2 dense": (
        "gpt2",
        "dense",
        {"query_maps": ["identity"]},
        EXTRA.format(1),
        "attn.c_attn.bias",
        "query_maps and",
    ),
    "gpt2 rank": (
        *("gpt2", "low-rank:3", {"query_maps": ["low-rank:2"]}),
        *(SHAPED.format((3, 32), (2, 32)), "c_attn.query.", "query_maps"),
    ),
    "fewer layers": (
        *("gpt2", "identity", {"n_layer": 0, "query_maps": [], "index_sha256": None}),
        *("", "h.0.attn.c_attn.weight", ""),
    ),
}


@pytest.mark.parametrize("case", OTHER.values(), ids=OTHER)
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("resized", [False, True])
def test_the_tensor_and_the_field_are_named(tiny_reduced, tmp_path, loader, case, resized):
    name, query, fields, what, tensor, field = case
    folder = edited(tiny_reduced((query,), name), tmp_path / "edited", **fields)
    with pytest.raises(ValueError, match=REASON) as raised:
        loader.from_pretrained(folder, ignore_mismatched_sizes=resized)
    said = str(raised.value)
    assert said.startswith(f"{folder}: ")
    assert what in said
    assert tensor in said
    assert f"Look at config.json's {field}" in said


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gauges_that_the_config_does_not_tell_of(tiny_checkpoint, tmp_path, name):
    fold(tiny_checkpoint(name), tmp_path / "exact")
    dense = dict(value_maps=["dense"] * 2, query_maps=["dense"] * 2)
    said = refusal(edited(tmp_path / "exact", tmp_path / "edited", **dense), ignore_mismatched_sizes=True)
    assert "value_maps" in said


@pytest.mark.parametrize("loader", [AutoModelForCausalLM, AutoModel])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_layers_of_their_own_where_the_config_shares_one(tiny_reduced, tmp_path, name, loader):
    """The last one would be read over the first; a folder that stores one layer for all loads."""
    folder = edited(tiny_reduced(("key-shared",) * 2, name), tmp_path / "edited", shared_layers=True)
    with pytest.raises(ValueError, match=r"leaves no place for .*(layers|h)\.1\..* config.json's .*shared_layers"):
        loader.from_pretrained(folder)
    shared = save_variant(tmp_path / "shared", name, "float32", query_maps=["key-shared"] * 2, shared_layers=True)
    _, info = loader.from_pretrained(shared, output_loading_info=True)
    assert not [key for key in info["unexpected_keys"] if key != "lm_head.weight"]


def test_a_head_that_is_missing_is_named(tiny_reduced, tmp_path):
    """Of a folder whose config.json says that the head is not tied."""
    for name in ("tied", "gpt2"):
        folder = edited(tiny_reduced(("identity", "dense"), name), tmp_path / name, tie_word_embeddings=False)
        said = refusal(folder)
        assert "first lm_head.weight. Look at config.json's tie_word_embeddings and vocab_size:" in said
    both = edited(folder, tmp_path / "both", query_maps=["key-shared", "dense"])
    assert "3 tensor(s)" in refusal(both)
    assert "c_attn.query.bias. Look at config.json's query_maps:" in refusal(both)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_belongs_to_no_layer_of_ours_loads(tiny_reduced, tmp_path, name):
    """What quantizers keep beside a weight, other people's heads, and stock buffers of older files."""
    at = {"llama": "model.layers.0.self_attn.k_proj", "gpt2": "transformer.h.0.attn.c_attn"}[name]
    old = {"llama": "model.layers.0.self_attn.rotary_emb.inv_freq", "gpt2": "transformer.h.0.attn.bias"}[name]
    names = [f"{at}.{more}" for more in ("weight.absmax", "weight.quant_map", "weight_scale", "SCB", "input_scale")]
    names += [f"{at}.weight.quant_state.bitsandbytes__nf4", "v_head.summary.weight", old]
    folder = tiny_reduced(("key-shared", "select"), name)
    more = edited(folder, tmp_path / "more", lambda held: held | {key: torch.ones(3) for key in names})
    model, ids = AutoModelForCausalLM.from_pretrained(more), tokens()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_reduced(folder)(ids).logits)
    said = refusal(edited(folder, tmp_path / "ours", lambda held: held | {f"{at}.lora_A.weight": torch.ones(3)}))
    assert f"{at}.lora_A.weight" in said


@pytest.mark.parametrize("name, changed", [("llama", "lm_head"), ("gpt2", "transformer.wte")])
def test_an_embedding_of_another_size_loads_where_it_is_allowed(tiny_reduced, tmp_path, name, changed):
    folder = edited(tiny_reduced(("key-shared", "select"), name), tmp_path / "other", vocab_size=400)
    assert AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True).config.vocab_size == 400
    assert f"{changed}.weight is (320, 32) in the files and (400, 32) by config.json" in refusal(folder)
