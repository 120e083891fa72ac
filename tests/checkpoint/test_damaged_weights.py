"""Damaged weights: every kind is named in a message that says what to mend."""

import json
import pickle
import re
import shutil
import struct

import pytest
import torch
from damage import edit_json, edit_weights, refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_models import EVERY_MAP
from transformers import AutoModelForCausalLM

import qectomy  # noqa: F401  registers the reduced classes
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.headers import INDEX, SINGLE
from qectomy.errors import CheckpointError, NonFiniteError, QectomyError, UnsupportedArchitecture

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize("keep", [0, 4, 7, 8, 100, -1, -5000])
def test_truncated(tiny_copy, keep):
    folder = tiny_copy()
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[:keep])
    refused(folder, r"model.safetensors: not a whole safetensors file \(.*\); it may be truncated")


def test_truncated_shard(tiny_copy):
    folder = tiny_copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(folder, rf"{shard.name}: not a whole safetensors file")


def test_pointer_never_downloaded(tiny_copy):
    folder = tiny_copy()
    (folder / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, "a pointer that was never downloaded")


def test_truncated_after_opening(tiny_copy):
    folder = tiny_copy()
    checkpoint = open_checkpoint(folder)
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-400])
    with pytest.raises(CheckpointError, match=r"model.safetensors: cannot read tensor model.norm.weight"):
        checkpoint.read("model.norm.weight")
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="cannot read tensor"):
        checkpoint.read_rows("lm_head.weight", 0, 2)


def test_missing_shard(tiny_copy):
    folder = tiny_copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(folder, rf"{INDEX} names {shard.name}, which is not in ")


def test_missing_tensors(tiny_copy):
    folder = tiny_copy()
    edit_weights(folder, lambda tensors: [tensors.pop(name) for name in (Q_PROJ, "model.norm.weight")])
    refused(folder, rf"2 tensor\(s\) that config.json calls for are missing, first {Q_PROJ}. It holds 19 tensors")
    save_file({}, folder / SINGLE)
    refused(folder, r"21 tensor\(s\).*first model.embed_tokens.weight. It holds no tensors.")


def test_an_untied_head_must_be_there(tiny_copy):
    folder = tiny_copy("tied")
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    refused(folder, "missing, first lm_head.weight")


@pytest.mark.parametrize("shape", [(32, 31), (16, 32), (32,), (32, 32, 1), ()])
def test_wrong_shape(tiny_copy, shape):
    folder = tiny_copy()
    edit_weights(folder, lambda tensors: tensors.update({Q_PROJ: torch.zeros(shape)}))
    refused(folder, rf"tensor {Q_PROJ} has shape {re.escape(str(shape))}, config.json calls for \(32, 32\)")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite(tiny_copy, name, bad, dtype):
    folder = tiny_copy()

    def change(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = bad

    edit_weights(folder, change)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(NonFiniteError, match=rf"model.safetensors: tensor {name} holds NaN or Inf"):
        checkpoint.read(name, torch.float32)
    with pytest.raises(NonFiniteError, match=name):
        checkpoint.read_rows(name, 30, 32)
    assert checkpoint.read_rows(name, 0, 30).isfinite().all()
    assert checkpoint.read("lm_head.weight").isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn])
def test_quantized_weights(tiny_copy, dtype):
    folder = tiny_copy()
    edit_weights(folder, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(dtype)}))
    refused(folder, rf"tensor {Q_PROJ} is stored as \w+; a quantized checkpoint cannot be converted")


def test_float_index_of_select(tiny_reduced, tmp_path):
    folder = shutil.copytree(tiny_reduced(EVERY_MAP), tmp_path / "reduced")
    name = "model.layers.1.self_attn.query.index"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].float()}))
    refused(folder, rf"tensor {name} is stored as F32; .*must be whole numbers", reduced=True)


@pytest.mark.parametrize("channel", [-1, 32, 2**31 - 1])
def test_index_beyond_the_model(tiny_reduced, tmp_path, channel):
    folder = shutil.copytree(tiny_reduced(EVERY_MAP), tmp_path / "reduced")
    name = "model.layers.1.self_attn.query.index"
    edit_weights(folder, lambda tensors: tensors[name].__setitem__(3, channel))
    refused(folder, rf"tensor {name} names channels beyond the model's 32", reduced=True)
    edit_json(folder / "config.json", lambda config: config.pop("index_sha256"))  # as older folders are
    checkpoint = open_checkpoint(folder, reduced=True)
    with pytest.raises(CheckpointError, match=rf"tensor {name} names channels beyond the model's 32"):
        checkpoint.read_layer(1)


def test_index_that_was_averaged(tiny_reduced, tmp_path):
    """Channels of the model, and not those that were written: what is left of two folders' mean."""
    folder = shutil.copytree(tiny_reduced(EVERY_MAP), tmp_path / "reduced")
    name = "model.layers.1.self_attn.query.index"
    edit_weights(folder, lambda tensors: tensors.update({name: (tensors[name] + tensors[name].flip(0)) // 2}))
    refused(folder, "the channel numbers of layer 1 .* are not those of which config.json has the sha256", reduced=True)
    with pytest.raises(ValueError, match=r"layer 1: the channel numbers in memory .* not those that config.json"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.rotary.weight", "model.layers.2.mlp.up_proj.weight"])
def test_extra_tensors(tiny_copy, extra):
    folder = tiny_copy()
    edit_weights(folder, lambda tensors: tensors.update({extra: torch.zeros(2)}))
    refused(folder, rf"1 tensor\(s\) have no place in a llama model and would be lost, first {extra}")


def test_qk_norm_tensors(tiny_copy):
    folder = tiny_copy()
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))
    refused(folder, r"layers.0.self_attn.q_norm.weight: queries are normalised", UnsupportedArchitecture)


def test_only_pickles(tiny_copy):
    folder = tiny_copy()
    (folder / SINGLE).unlink()
    refused(folder, "holds no model.safetensors and no model.safetensors.index.json. Save it with")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps("boom"))
    refused(
        folder,
        r"pytorch_model.bin would be loaded by pickle, which can run code. Save it with .*save_pretrained",
    )


HEADERS = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(lambda body: struct.pack("<Q", len(body)) + body),
    st.recursive(
        st.one_of(
            st.none(),
            st.integers(-5, 2**64),
            st.text(max_size=5),
            st.sampled_from(["F32", "I64", "F4", "XX"]),
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from([Q_PROJ, "dtype", "shape", "data_offsets", "__metadata__"]), inner, max_size=4
            ),
        ),
    ).map(lambda header: struct.pack("<Q", len(text := json.dumps(header).encode())) + text),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(HEADERS, st.tuples(HEADERS, st.binary(max_size=50)).map(lambda parts: parts[0] + parts[1])))
def test_garbage_gives_a_checkpoint_error(tiny_copy, tmp_path, data):
    folder = tmp_path / "copy-of-llama"
    if not folder.exists():
        tiny_copy()
    (folder / SINGLE).write_bytes(data)
    refused(folder, "safetensors|missing")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3000), st.integers(0, 255))
def test_one_changed_byte_of_the_header(tiny_checkpoint, tmp_path, at, byte):
    """A flipped byte gives a sound checkpoint or an error of ours, never another exception."""
    source = tiny_checkpoint()
    data = bytearray((source / SINGLE).read_bytes())
    data[at] = byte
    (tmp_path / SINGLE).write_bytes(data)
    shutil.copy(source / "config.json", tmp_path)
    try:
        checkpoint = open_checkpoint(tmp_path)
        for name in checkpoint.tensors:
            checkpoint.read(name)
    except QectomyError:
        pass
