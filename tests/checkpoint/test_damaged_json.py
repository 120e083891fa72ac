"""Damaged config.json and index: refused by name, whatever stands in them."""

import json
import re
import shutil

import pytest
import torch
from damage import edit_json, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import EVERY_MAP, tiny_model

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import load_config, reduced_config, stock_config
from qectomy.checkpoint.headers import INDEX, read_json
from qectomy.errors import CheckpointError, QectomyError, QueryMapError
from qectomy.models.query_maps import parse_recipe

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..", ""])
def test_index_points_elsewhere(tiny_copy, name):
    folder = tiny_copy("sharded")
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({Q_PROJ: name}))
    refused(folder, rf"{re.escape(repr(name))} is not the plain name of a safetensors file beside it")


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": []},
        {"weight_map": None},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": ["b"]}},
        3,
    ],
)
def test_index_without_a_map(tiny_copy, index):
    folder = tiny_copy("sharded")
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, "no weight_map from tensor names to file names")


def test_empty_index(tiny_copy):
    folder = tiny_copy("sharded")
    (folder / INDEX).write_text('{"weight_map": {}}')
    refused(folder, "It holds no tensors.")


def test_duplicate_tensors(tiny_copy):
    folder = tiny_copy("sharded")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    save_file({**load_file(second), name: torch.zeros(2)}, second)
    refused(folder, rf"tensor {name} stands in both {first.name} and {second.name}")


def test_no_config(tiny_copy):
    folder = tiny_copy()
    (folder / "config.json").unlink()
    refused(folder, "holds no config.json; it is not a checkpoint folder")
    (folder / "config.json").mkdir()
    refused(folder, "config.json: cannot be read as JSON")


@pytest.mark.parametrize("text", ["", "{", "\x00", "{'a': 1}", '{"a": 1}}', "nul", "[" * 100_000, '{"a":' * 50_000])
def test_bad_json(tiny_copy, text):
    for file in ("config.json", INDEX):
        folder = tiny_copy("sharded")
        (folder / file).write_text(text)
        refused(folder, rf"{file}: cannot be read as JSON: ")
        shutil.rmtree(folder)


def test_json_that_is_not_text(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(CheckpointError, match=r"config.json: cannot be read as JSON"):
        read_json(tmp_path / "config.json")


def test_huge_json(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(20_000_001)  # sparse
    with pytest.raises(CheckpointError, match="larger than 20,000,000 bytes; not a file of a checkpoint"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("config", ["[]", "3", "null", '"llama"', "NaN"])
def test_config_that_is_no_object(tiny_copy, config):
    folder = tiny_copy()
    (folder / "config.json").write_text(config)
    refused(folder, "config.json: not a JSON object")


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_hidden_layers", 10_001, r"num_hidden_layers 10001 is beyond any model \(10000\)"),
        ("num_hidden_layers", 2**31, "num_hidden_layers must be a positive whole number, got 2147483648"),
        (
            "num_hidden_layers",
            9_999,
            r"tensor\(s\) that config.json calls for are missing, first model.layers.2.",
        ),
        ("num_hidden_layers", 1, "no place in a llama model and would be lost, first model.layers.1."),
        (
            "vocab_size",
            2**31 - 1,
            r"embed_tokens.weight has shape \(320, 32\), config.json calls for \(2147483647, 32\)",
        ),
        ("hidden_size", 10**400, "hidden_size must be a positive whole number"),
        ("hidden_size", "32", "hidden_size must be a positive whole number, got '32'"),
        ("attention_bias", True, "missing, first model.layers.0.self_attn.q_proj.bias"),
        ("num_key_value_heads", 4, r"k_proj.weight has shape \(16, 32\), config.json calls for \(32, 32\)"),
    ],
)
def test_absurd_config(tiny_copy, field, value, message):
    folder = tiny_copy()
    edit_json(folder / "config.json", lambda config: config.update({field: value}))
    refused(folder, message)


@pytest.mark.parametrize(
    "query_maps, message, error",
    [
        (None, "query_maps must name one query map for each of 5 layers", CheckpointError),
        (["select"], "query_maps must name one query map for each of 5 layers", CheckpointError),
        ("dense", "query_maps must name one", CheckpointError),
        ([1, 2, 3, 4, 5], "query_maps must name one", CheckpointError),
        ([*EVERY_MAP[:4], "densest"], "unknown query map 'densest'", QueryMapError),
        (
            [*EVERY_MAP[:3], "low-rank:4", "dense"],
            r"query.down has shape \(3, 32\), .*calls for \(4, 32\)",
            CheckpointError,
        ),
        (["select", *EVERY_MAP[1:]], "missing, first model.layers.0.self_attn.query.index", CheckpointError),
    ],
)
def test_damaged_recipe(tiny_reduced, tmp_path, query_maps, message, error):
    folder = shutil.copytree(tiny_reduced(EVERY_MAP), tmp_path / "reduced")
    edit_json(folder / "config.json", lambda config: config.update(query_maps=query_maps))
    refused(folder, message, error, reduced=True)


FIELDS = sorted({*tiny_model().config.to_dict(), "query_maps", "rope_theta", "rope_scaling", "sliding_window"})
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 70),
        st.sampled_from([2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), -0.5, 32.0]),
        st.sampled_from(["", "silu", "llama", "linear", "yarn", "float32", "dense", "low-rank:3", "\x00"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["rope_type", "rope_theta", "factor", "type", "a"]), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=2), st.booleans())
def test_any_value_in_a_config(tiny_checkpoint, tiny_reduced, tmp_path, changes, reduced):
    """A config with odd values is used or refused, never the cause of another exception."""
    source = tiny_reduced(EVERY_MAP) if reduced else tiny_checkpoint()
    shutil.copy(source / "model.safetensors", tmp_path)
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    try:
        checkpoint = open_checkpoint(tmp_path, reduced=reduced)
        model_config = load_config(checkpoint.family, checkpoint.config, reduced)
        with torch.device("meta"):
            checkpoint.family.causal_class(reduced)(model_config)
        if reduced:
            stock_config(checkpoint, checkpoint.dtype)
        else:
            recipe = parse_recipe("select", checkpoint.dims)
            json.dumps(reduced_config(checkpoint, tuple(recipe), checkpoint.dtype))
    except QectomyError:
        pass
