"""What is read of a folder is told where it is not all that the folder says, and what makes two models is refused."""

import json
from pathlib import Path

import pytest
import torch
from damage import edit_json, edit_weights, refused
from safetensors.torch import load_file, save_file

from qectomy import errors
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import reduced_config, stock_config
from qectomy.checkpoint.headers import INDEX, SINGLE
from qectomy.errors import CheckpointError, UnsupportedArchitecture
from qectomy.eval.loading import load_model, read_config

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def said(folder: Path, **fields: object) -> Path:
    edit_json(folder / "config.json", lambda config: config.update(fields))
    return folder


def refused_by_all(folder: Path, message: str, error: type[errors.QectomyError] = CheckpointError) -> None:
    refused(folder, message, error)
    for read in (read_config, lambda name: load_model(name, None, "cpu")):
        with pytest.raises(error, match=message):
            read(str(folder))


def second_set(folder: Path, change: float = 0.5) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({name: tensor + change for name, tensor in tensors.items()}, folder / "model-00001-of-00001.safetensors")
    places = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


class TestTwoSetsOfWeights:
    def test_the_one_that_transformers_reads_is_read_and_both_are_named(self, tiny_copy, capsys):
        folder = tiny_copy()
        second_set(folder)
        checkpoint = open_checkpoint(folder)
        assert checkpoint.files == [SINGLE]
        assert torch.equal(checkpoint.read(HEAD), load_file(folder / SINGLE)[HEAD])
        told = capsys.readouterr().err
        assert "holds two sets of weights" in told
        assert "model.safetensors is read, as transformers does, and model-00001-of-00001.safetensors of" in told
        open_checkpoint(folder)
        assert capsys.readouterr().err == ""  # once is enough

    def test_an_index_of_the_one_file_says_nothing_new(self, tiny_copy, capsys):
        folder = tiny_copy()
        places = dict.fromkeys(load_file(folder / SINGLE), SINGLE)
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        open_checkpoint(folder)
        assert capsys.readouterr().err == ""


class TestTies:
    def test_two_that_differ_are_not_tied_and_written_so(self, tiny_copy, capsys):
        folder = tiny_copy("tied")
        edit_weights(folder, lambda tensors: tensors.update({HEAD: 2 * tensors[EMBEDDING]}))
        checkpoint = open_checkpoint(folder)
        assert not checkpoint.dims.tied
        assert torch.equal(checkpoint.read(HEAD), 2 * checkpoint.read(EMBEDDING))
        assert "ties head and embedding, and the weights hold two that differ" in capsys.readouterr().err
        for config in (reduced_config(checkpoint, checkpoint.recipe, "F32"), stock_config(checkpoint, "F32")):
            assert config["tie_word_embeddings"] is False

    def test_one_last_number_that_differs_is_enough(self, tiny_copy):
        folder = tiny_copy("tied")
        edit_weights(folder, lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}))
        assert open_checkpoint(folder).dims.tied
        edit_weights(folder, lambda tensors: tensors[HEAD][-1, -1].add_(1))
        assert not open_checkpoint(folder).dims.tied

    def test_the_head_alone_is_both(self, tiny_copy):
        folder = tiny_copy("tied")
        expected = load_file(folder / SINGLE)[EMBEDDING]
        edit_weights(folder, lambda tensors: tensors.update({HEAD: tensors.pop(EMBEDDING)}))
        checkpoint = open_checkpoint(folder)
        assert checkpoint.dims.tied
        assert torch.equal(checkpoint.read(EMBEDDING), expected)
        assert torch.equal(checkpoint.read_rows(EMBEDDING, 3, 5), expected[3:5])
        assert HEAD not in checkpoint.tensors

    def test_the_head_alone_of_a_model_that_is_not_tied_is_no_embedding(self, tiny_copy):
        folder = tiny_copy()
        edit_weights(folder, lambda tensors: tensors.pop(EMBEDDING))
        refused_by_all(folder, f"1 tensor.s. that config.json calls for are missing, first {EMBEDDING}")


def test_an_adapter_beside_the_weights_is_refused_by_all(tiny_copy):
    folder = tiny_copy()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refused_by_all(folder, r"holds an adapter .adapter_config.json.: .*Merge it .*or take adapter_config.json away")
    (folder / "config.json").unlink()  # an adapter's own folder
    refused_by_all(folder, "Merge it")


class TestTypes:
    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    @pytest.mark.parametrize("value", ["float16", "torch.float16"])
    def test_the_stored_type_is_taken_and_told(self, name, value, tiny_copy, capsys):
        folder = tiny_copy("bf16")
        edit_json(folder / "config.json", lambda config: config.pop("dtype"))
        said(folder, **{name: value})
        model, _, dtype = load_model(str(folder), None, "cpu")
        assert dtype == "bfloat16"
        assert model.dtype == torch.bfloat16
        told = capsys.readouterr().err
        assert told.count("config.json says 'float16', and the weights are stored in bfloat16. bfloat16 is taken") == 1
        assert load_model(str(folder), "float32", "cpu")[2] == "float32"

    @pytest.mark.parametrize("value", ["bfloat16", "torch.bfloat16"])
    def test_the_same_type_is_not_told(self, value, tiny_copy, capsys):
        folder = said(tiny_copy("bf16"), torch_dtype=value)
        assert load_model(str(folder), None, "cpu")[2] == "bfloat16"
        assert capsys.readouterr().err == ""


class TestRope:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"rope_theta": 1e6}, r"rope_theta is 1000000.0, and rope_parameters.rope_theta.* is 10000.0"),
            ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters.rope_type is 'default'"),
            (
                {
                    "partial_rotary_factor": 0.5,
                    "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0},
                },
                "partial_rotary_factor is 0.5",
            ),
            (
                {"rope_parameters": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
                "rope_parameters.type is 'dynamic'",
            ),
            (
                {
                    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
                    "rope_scaling": {"rope_type": "default"},
                },
                r"rope_parameters.rope_theta is 500.0, and rope_scaling.rope_theta.* is 10000.0",
            ),
            ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one object of plain values"),
        ],
    )
    def test_two_values_of_one_field(self, fields, message, tiny_copy):
        folder = said(tiny_copy(), rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})
        refused_by_all(said(folder, **fields), message)

    def test_one_value_under_all_its_names(self, tiny_copy):
        same = {"rope_type": "linear", "factor": 2.0}
        folder = said(tiny_copy(), rope_theta=500, rope_scaling={"type": "linear", "factor": 2})
        said(folder, rope_parameters=same | {"rope_theta": 500.0})
        assert open_checkpoint(folder).config["rope_theta"] == 500
        assert read_config(str(folder)).rope_parameters["rope_theta"] == 500


class TestFields:
    def test_only_what_the_family_knows_is_let_through_and_the_rest_is_told(self, tiny_copy, capsys):
        folder = said(
            tiny_copy(),
            wobble="on",
            tea={"with": "milk"},
            _attn_implementation="nobody/kernel",
            attn_implementation="nobody/kernel",
            output_attentions=False,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "wobble": 1},
        )
        checkpoint = open_checkpoint(folder)
        told = capsys.readouterr().err
        assert "fields that a llama model does not know" in told
        assert "'wobble', 'tea', 'rope_parameters.wobble'" in told
        unknown = {"wobble", "tea", "attn_implementation", "_attn_implementation"}
        for config in (reduced_config(checkpoint, checkpoint.recipe, "F32"), stock_config(checkpoint, "F32")):
            assert not unknown & set(config)
            assert set(config["rope_parameters"]) == {"rope_type", "rope_theta"}
        model, _, _ = load_model(str(folder), None, "cpu")
        assert model.config._attn_implementation == "sdpa"
        assert not any(hasattr(model.config, name) for name in ("wobble", "tea"))

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("is_causal", False),
            ("transformers_weights", "other.safetensors"),
            ("per_layer_config", {"0": {"hidden_act": "relu"}}),
            ("pruned_heads", {"0": [1]}),
            ("layer_types", ["full_attention", "sliding_attention"]),
            ("logit_scale", 0.5),
            ("final_logit_softcapping", 30.0),
        ],
    )
    def test_what_makes_another_model_is_refused(self, field, value, tiny_copy):
        refused_by_all(said(tiny_copy(), **{field: value}), f"config.json: {field} is .*changes what a model computes")

    @pytest.mark.parametrize(
        ("field", "value"),
        [("is_causal", True), ("pruned_heads", {}), ("logit_scale", 1.0), ("layer_types", ["full_attention"] * 2)],
    )
    def test_the_same_fields_with_values_that_change_nothing(self, field, value, tiny_copy, capsys):
        assert field not in open_checkpoint(said(tiny_copy(), **{field: value})).config
        assert capsys.readouterr().err == ""

    def test_code_of_the_folders_own_is_told(self, tiny_copy, capsys):
        open_checkpoint(said(tiny_copy(), auto_map={"AutoModelForCausalLM": "evil.M"}))
        assert "names code of its own (auto_map), which is not run" in capsys.readouterr().err


class TestQuantization:
    def test_left_behind_on_weights_that_are_not(self, tiny_copy):
        folder = said(tiny_copy("bf16"), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
        refused_by_all(
            folder,
            r"quant_method 'bitsandbytes'\), but no weight is quantized: they are stored in bfloat16. .*Take the field",
            UnsupportedArchitecture,
        )

    def test_of_weights_that_are(self, tiny_copy):
        folder = said(tiny_copy(), quantization_config={"bits": 4})
        name = "model.layers.0.mlp.up_proj.weight"
        edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
        refused(folder, "the checkpoint is quantized .*Use the original float32", UnsupportedArchitecture)


class TestOtherFiles:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "pytorch_model.safetensors",
                "the safetensors files there, pytorch_model.safetensors, have other names.*rename it",
            ),
            ("model.fp16.safetensors", "model.fp16.safetensors, have other names.*rename it model.safetensors"),
            ("consolidated.safetensors", "have other tensors' names too: fetch model.safetensors"),
            (
                "model-00001-of-00002.safetensors",
                r"It holds shards, model-00001-of-00002.safetensors, but without the index",
            ),
        ],
    )
    def test_what_is_there_is_named(self, name, message, tiny_copy):
        folder = tiny_copy()
        (folder / SINGLE).rename(folder / name)
        refused_by_all(folder, f"holds no model.safetensors and no model.safetensors.index.json.*{message}")

    def test_a_shard_that_is_missing(self, tiny_copy):
        folder = tiny_copy("sharded")
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        (folder / shards[1]).unlink()
        refused_by_all(folder, f"names {shards[1]}, which is not in .*safetensors files there: {shards[0]}")
