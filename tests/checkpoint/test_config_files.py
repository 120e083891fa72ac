"""config.json of the reduced and of the materialised model, and the files that come along."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from tiny_models import EVERY_MAP, ROPES, SHAPES
from transformers import AutoConfig, AutoTokenizer

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import (
    copy_companions,
    load_config,
    reduced_config,
    stock_config,
    write_config,
)
from qectomy.checkpoint.sizes import totals
from qectomy.errors import CheckpointError
from qectomy.models.query_maps import parse_query_map
from qectomy.runs.input_hashes import SourceWatch
from qectomy.text.text import load_tokenizer


@pytest.mark.parametrize("name", [name for name in SHAPES if name.startswith(("rope-", "mistral", "qwen2"))])
def test_reduced_config_keeps_every_field(tiny_checkpoint, tmp_path, name):
    checkpoint = open_checkpoint(tiny_checkpoint(name))
    recipe = (parse_query_map("select"), parse_query_map("low-rank:3"))
    write_config(tmp_path, reduced_config(checkpoint, recipe, "BF16"))
    reduced = AutoConfig.from_pretrained(tmp_path)
    original = AutoConfig.from_pretrained(checkpoint.folder)
    changed = {
        "model_type",
        "architectures",
        "auto_map",
        "query_maps",
        "dtype",
        "_name_or_path",
        "transformers_version",
    }
    ours, theirs = reduced.to_dict(), original.to_dict()
    assert {k: ours[k] for k in theirs if k not in changed} == {k: v for k, v in theirs.items() if k not in changed}
    assert reduced.query_maps == ["select", "low-rank:3"]
    assert ours["dtype"] in ("bfloat16", "torch.bfloat16")


@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_spelt_for_old_and_new_transformers(tiny_checkpoint, rope):
    """Before version 5 only rope_theta and rope_scaling were read; from 5 on rope_parameters."""
    checkpoint = open_checkpoint(tiny_checkpoint(f"rope-{rope}"))
    config = reduced_config(checkpoint, checkpoint.recipe, "F32")
    assert config["rope_theta"] == 500.0
    assert {k: config["rope_parameters"][k] for k in ROPES[rope]} == ROPES[rope]
    if rope == "default":
        assert config.get("rope_scaling") is None
    else:
        assert {k: config["rope_scaling"][k] for k in ROPES[rope] if k != "rope_theta"} == {
            k: v for k, v in ROPES[rope].items() if k != "rope_theta"
        }


@pytest.mark.parametrize("rope", ["linear", "llama3"])
def test_rope_spelt_the_old_way_is_read(tiny_copy, rope):
    folder = tiny_copy(f"rope-{rope}")
    raw = json.loads((folder / "config.json").read_text())
    expected = AutoConfig.from_pretrained(folder).rope_parameters
    scaling = {k: v for k, v in raw.pop("rope_parameters").items() if k not in ("rope_theta", "rope_type")}
    (folder / "config.json").write_text(
        json.dumps({**raw, "rope_theta": 500.0, "rope_scaling": {"type": rope, **scaling}})
    )
    checkpoint = open_checkpoint(folder)
    written = reduced_config(checkpoint, checkpoint.recipe, "F32")
    config = load_config(checkpoint.family, written, reduced=True)
    assert {k: config.rope_parameters[k] for k in expected} == expected


def test_code_and_stale_fields_are_left_behind(tiny_copy):
    folder = tiny_copy()
    raw = json.loads((folder / "config.json").read_text())
    stale = {
        "auto_map": {"AutoConfig": "evil.Config"},
        "torch_dtype": "float16",
        "_name_or_path": "/home/someone",
    }
    (folder / "config.json").write_text(json.dumps({**raw, **stale, "transformers_version": "4.0"}))
    checkpoint = open_checkpoint(folder)
    for config in (reduced_config(checkpoint, checkpoint.recipe, "F32"), stock_config(checkpoint, "F32")):
        assert "evil" not in json.dumps(config)
        assert not {"torch_dtype", "_name_or_path", "transformers_version"} & set(config)
        assert config["dtype"] == "float32"
    assert "auto_map" not in stock_config(checkpoint, "F32")


@pytest.mark.parametrize(
    "field, value",
    [
        ("rms_norm_eps", "tiny"),
        ("hidden_act", 3),
        ("hidden_act", "swish-swosh"),
        ("rope_parameters", "yarn"),
        ("rope_parameters", {"rope_type": "spiral", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 1e4}),
        ("initializer_range", -3.0),
        ("num_attention_heads", 5),
    ],
)
def test_a_config_that_no_model_can_use(tiny_checkpoint, field, value):
    checkpoint = open_checkpoint(tiny_checkpoint())
    with pytest.raises(CheckpointError, match=r"config.json is not a valid llama config: "):
        load_config(checkpoint.family, {**checkpoint.config, field: value})


def test_unknown_names_are_explained(tiny_checkpoint):
    checkpoint = open_checkpoint(tiny_checkpoint())
    with pytest.raises(CheckpointError, match="rope_type 'spiral' is unknown; known: default, linear, "):
        load_config(
            checkpoint.family,
            {**checkpoint.config, "rope_parameters": {"rope_type": "spiral", "rope_theta": 1.0}},
        )
    with pytest.raises(CheckpointError, match="hidden_act 'swish-swosh' is not an activation"):
        load_config(checkpoint.family, {**checkpoint.config, "hidden_act": "swish-swosh"})


def test_companions(tiny_copy, tmp_path):
    folder, out = tiny_copy(), tmp_path / "out"
    out.mkdir()
    for name in (
        "LICENSE",
        "NOTICE.txt",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
        "spiece.model",
    ):
        (folder / name).write_text(name)
    for name in (
        "tokenizer.bin",
        "tokenizer_code.py",
        "vocab.pt",
        "training_args.bin",
        "README.md",
        "notes.json",
    ):
        (folder / name).write_text(name)
    (folder / "tokenizer_folder").mkdir()
    copy_companions(folder, out)
    carried = {path.name for path in out.iterdir()}
    assert carried == {
        *(
            "LICENSE",
            "NOTICE.txt",
            "merges.txt",
            "chat_template.jinja",
            "generation_config.json",
            "spiece.model",
        ),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    for name in carried:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert AutoTokenizer.from_pretrained(out)("door")["input_ids"]


def test_a_dropout_that_is_null(tiny_copy):
    """As transformers lets Llama's be."""
    checkpoint = open_checkpoint(tiny_copy())
    assert load_config(checkpoint.family, {**checkpoint.config, "attention_dropout": None}).attention_dropout is None
    with pytest.raises(CheckpointError, match="attention_dropout must be a number from 0 to 1, got 2"):
        load_config(checkpoint.family, {**checkpoint.config, "attention_dropout": 2})


@pytest.mark.parametrize("kind", ["an older local folder", "blobs on another disk"])
def test_a_link_to_a_blob_of_the_hubs_cache_is_copied(kind, tiny_copy, tmp_path):
    made, out, repository = tiny_copy(), tmp_path / "out", tmp_path / "hub/models--a--b"
    out.mkdir()
    if kind == "an older local folder":
        folder, blobs = made, repository / "blobs"
        blobs.mkdir(parents=True)
    else:
        folder, blobs = repository / "snapshots/0", tmp_path / "disk"
        blobs.mkdir()
        shutil.copytree(made, folder)
        (repository / "blobs").symlink_to(blobs)
    content, blob = (folder / "tokenizer.json").read_bytes(), blobs / ("0a" * 20)
    (folder / "tokenizer.json").rename(blob)
    (folder / "tokenizer.json").symlink_to(blob)
    copy_companions(folder, out)
    assert (out / "tokenizer.json").read_bytes() == content
    assert not (out / "tokenizer.json").is_symlink()
    blob.rename(blobs / "id_rsa")  # no blob's name: someone lets links named so lead where secrets are
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(blobs / "id_rsa")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is a link to .*, outside its folder"):
        copy_companions(folder, out)


def test_a_link_to_elsewhere_can_be_read(tiny_copy, tmp_path):
    folder = tiny_copy()
    (folder / "tokenizer.json").rename(tmp_path / "mine.json")
    (folder / "tokenizer.json").symlink_to(tmp_path / "mine.json")
    assert load_tokenizer(folder)("door")["input_ids"]
    with pytest.raises(CheckpointError, match=r"tokenizer.json is a link to .*mine.json, outside its folder"):
        SourceWatch(open_checkpoint(folder))  # what copies says so before it begins


@pytest.mark.parametrize("name", ["llama", "biases", "bf16", "mistral", "qwen2"])
def test_planned_totals_are_what_is_written(tiny_checkpoint, tiny_reduced, name):
    source = open_checkpoint(tiny_checkpoint(name, num_hidden_layers=len(EVERY_MAP)))
    folder = tiny_reduced(EVERY_MAP, name)
    reduced = open_checkpoint(folder, reduced=True)
    sizes = totals(source, reduced.recipe)
    tensors = load_file(folder / "model.safetensors").values()
    assert sizes["parameters"] == {
        "before": source.parameters,
        "after": sum(tensor.numel() for tensor in tensors),
    }
    assert sizes["bytes"] == {"before": source.nbytes, "after": sum(tensor.nbytes for tensor in tensors)}
