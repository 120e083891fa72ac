"""Opening and reading whole checkpoints."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EVERY_MAP, SHAPES, tiny_model

from qectomy.checkpoint.checkpoint import expected_tensors, locate, open_checkpoint
from qectomy.errors import CheckpointError, UnsupportedArchitecture
from qectomy.models.query_maps import QueryMapSpec

DTYPE_NAMES = {"bf16": ("BF16", torch.bfloat16), "fp16": ("F16", torch.float16)}


@pytest.mark.parametrize("name", SHAPES)
def test_reads_what_was_saved(tiny_checkpoint, name):
    checkpoint = open_checkpoint(tiny_checkpoint(name))
    stored_as, dtype = DTYPE_NAMES.get(name.removeprefix("gpt2-"), ("F32", torch.float32))
    parameters = dict(tiny_model(name).named_parameters())
    assert set(checkpoint.tensors) == set(parameters)
    assert checkpoint.parameters == sum(parameter.numel() for parameter in parameters.values())
    assert checkpoint.nbytes == checkpoint.parameters * dtype.itemsize
    assert checkpoint.dtype == stored_as
    assert not checkpoint.reduced
    assert checkpoint.recipe == (QueryMapSpec("dense"),) * 2
    for key, parameter in parameters.items():
        tensor = checkpoint.read(key)
        assert tensor.dtype == dtype
        assert torch.equal(tensor, parameter.detach().to(dtype)), key
        assert checkpoint.read(key, torch.float64).dtype == torch.float64


def test_reads_across_shards(tiny_checkpoint):
    one, many = (open_checkpoint(tiny_checkpoint(name)) for name in ("llama", "sharded"))
    assert one.files == ["model.safetensors"]
    assert len(many.files) > 3
    assert list(one.tensors) == list(many.tensors)
    for layer in range(2):
        ours, theirs = many.read_layer(layer), one.read_layer(layer)
        assert set(ours) == set(theirs)
        assert ours.keys() == {name for name, _ in many.layer_tensors(layer)}
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_reads_rows(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint("bf16"))
    whole = checkpoint.read("lm_head.weight")
    assert torch.equal(checkpoint.read_rows("lm_head.weight", 7, 19), whole[7:19])
    rows = checkpoint.read_rows("lm_head.weight", 310, 320, torch.float32)
    assert torch.equal(rows, whole[310:].float())


@pytest.mark.parametrize("name", ["llama", "tied", "biases", "bf16", "mistral", "qwen2"])
def test_reads_a_reduced_checkpoint(tiny_reduced, tiny_checkpoint, name):
    reduced = open_checkpoint(tiny_reduced(EVERY_MAP, name), reduced=True)
    source = open_checkpoint(tiny_checkpoint(name, num_hidden_layers=5))
    assert reduced.reduced
    assert reduced.dtype == source.dtype
    assert [str(spec) for spec in reduced.recipe] == list(EVERY_MAP)
    assert list(reduced.tensors) == list(expected_tensors(reduced.family, reduced.dims, reduced.recipe))
    assert reduced.read("model.layers.1.self_attn.query.index").dtype == torch.int32
    assert reduced.read("model.layers.1.self_attn.query.index", torch.float64).dtype == torch.int32
    removed = sum(spec.parameters(source.dims) for spec in source.recipe)
    stored = sum(spec.parameters(source.dims) for spec in reduced.recipe)
    assert source.parameters - reduced.parameters == removed - stored
    assert removed > stored


def test_reduced_and_original_are_told_apart(tiny_reduced, tiny_checkpoint):
    with pytest.raises(UnsupportedArchitecture, match="already reduced"):
        open_checkpoint(tiny_reduced(EVERY_MAP))
    with pytest.raises(UnsupportedArchitecture, match="not a checkpoint that qectomy reduced"):
        open_checkpoint(tiny_checkpoint(), reduced=True)


def test_hashes(tiny_checkpoint):
    folder = tiny_checkpoint("sharded")
    checkpoint = open_checkpoint(folder)
    hashes = checkpoint.hashes()
    assert set(hashes) == {"config.json", *checkpoint.files}
    for name, digest in hashes.items():
        assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_a_tied_head_may_be_stored_all_the_same(tiny_copy):
    folder = tiny_copy("tied")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert "lm_head.weight" not in open_checkpoint(folder).tensors


def test_old_rotary_buffers_are_ignored(tiny_copy):
    folder = tiny_copy()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, folder / "model.safetensors")
    assert len(open_checkpoint(folder).tensors) == len(tensors) - 1


def test_locate(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint()
    assert locate(folder) == locate(str(folder)) == folder
    with pytest.raises(CheckpointError, match=r"config.json is a file; give the folder that holds config.json"):
        locate(folder / "config.json")
    for name in (tmp_path / "absent", "../absent", "./absent", ".absent", "a/b/c", "spaced name", "~/x", ""):
        with pytest.raises(CheckpointError):
            open_checkpoint(name)
    with pytest.raises(CheckpointError, match=r"no folder .*absent$"):
        locate(tmp_path / "absent")


def test_a_hub_id_out_of_reach_is_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no folder nobody/nothing, and the hub did not give 'nobody/nothing': "):
        locate("nobody/nothing")


def test_opening_loads_no_torch(tiny_checkpoint):
    """`qectomy inspect` answers from headers alone."""
    code = (
        "import sys; from qectomy.checkpoint.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(tiny_checkpoint('sharded'))!r}); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_code_beside_the_weights_is_never_run(tiny_copy, tmp_path):
    folder = tiny_copy()
    ran = tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    checkpoint.read_layer(0)
    assert not ran.exists()
