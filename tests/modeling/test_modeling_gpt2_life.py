"""The shipped GPT-2 class as transformers uses it: loading, saving, training, fresh models."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EVERY_MAP, load_reduced, tiny_model, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from qectomy.modeling.modeling_qectomy_gpt2 import QectomyGPT2Config, QectomyGPT2ForCausalLM


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_half_precision_runs(tiny_reduced):
    folder = tiny_reduced(EVERY_MAP, "gpt2-bf16")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits, exact = model(tokens()).logits, load_reduced(folder, torch.float64)(tokens()).logits
    assert logits.dtype == torch.bfloat16
    assert relative(logits.double(), exact) < 0.2


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "gpt2-inverse", "gpt2-unscaled", "gpt2-bf16"])
def test_save_and_reload(tiny_reduced, tmp_path, name):
    """Loaded by the Auto classes, saved by transformers, loaded again: same logits, no trust flag."""
    folder, ids = tiny_reduced(EVERY_MAP, name), tokens(2, 60)
    first, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(first).__module__ == "qectomy.modeling.modeling_qectomy_gpt2"
    tied = name != "gpt2-untied"
    assert (first.lm_head.weight.data_ptr() == first.transformer.wte.weight.data_ptr()) == tied
    first.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == load_file(folder / "model.safetensors").keys()
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = load_reduced(folder, first.dtype)(ids).logits
        assert torch.equal(first(ids).logits, expected)
        assert torch.equal(second(ids).logits, expected)
        second.transformer.h[3].attn.c_attn.query.up[0] += 1
        assert not torch.equal(second(ids).logits, expected)
    assert second.config.query_maps == list(EVERY_MAP)
    assert second.transformer.h[1].attn.c_attn.query.index.dtype == torch.int32
    assert (tmp_path / "again/modeling_qectomy_gpt2.py").is_file()
    base = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(base(ids).last_hidden_state, first.transformer(ids).last_hidden_state)
    assert AutoConfig.from_pretrained(folder).model_type == "qectomy_gpt2"


def test_softmax_scale_is_saved(tmp_path):
    """A model of one's own with the paper's scale keeps it, and its logits, through a folder."""
    options = {**tiny_model("gpt2").config.to_dict(), "query_maps": ["identity", "select"]}
    config = QectomyGPT2Config(**options, softmax_scale=0.5 * 8**-0.5)
    model = QectomyGPT2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.ndim))
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.config.softmax_scale == 0.5 * 8**-0.5
        assert [block.attn.scaling for block in again.transformer.h] == pytest.approx([0.5 * 8**-0.5] * 2)
        expected = model(tokens()).logits
        assert torch.equal(again(tokens()).logits, expected)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "softmax_scale": None}))
        other = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert relative(other(tokens()).logits, expected) > 1e-3


def test_outputs_are_recorded(tiny_reduced):
    model = load_reduced(tiny_reduced(EVERY_MAP, "gpt2"))
    model.set_attn_implementation("eager")
    out = model(tokens(2, 11), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(EVERY_MAP) + 1
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 11, 11)] * len(EVERY_MAP)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 11))


@pytest.mark.parametrize("name", ["gpt2", "gpt2-inverse"])
def test_a_training_step_with_gradient_checkpointing(tiny_reduced, name):
    """With the dropout that GPT-2 has by default, which must be drawn alike a second time."""
    model = load_reduced(tiny_reduced(EVERY_MAP, name)).train()
    plain = load_reduced(tiny_reduced(EVERY_MAP, name)).train()
    assert model.config.attn_pdrop == 0.1
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    runs = []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: runs.append(0))
    ids = tokens()
    for each in (model, plain):
        torch.manual_seed(0)
        each(ids, labels=ids).loss.backward()
    for (key, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key
        torch.testing.assert_close(parameter.grad, other.grad, msg=key)
    assert len(runs) == 2, "the layer is not run again for its gradients"
    model.eval()
    before = model(ids, labels=ids).loss.item()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert model(ids, labels=ids).loss.item() < before


def test_a_fresh_model_is_usable():
    """From a config alone, `_init_weights` leaves no uninitialised memory: finite, and small logits."""
    config = QectomyGPT2Config(
        **{**tiny_model("gpt2").config.to_dict(), "n_layer": 5, "query_maps": list(EVERY_MAP), "dtype": "float32"}
    )
    with torch.device("meta"):
        model = QectomyGPT2ForCausalLM(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 10**6)
        tensor._is_hf_initialized = False
    for module in model.modules():
        model._init_weights(module)
    for made in (QectomyGPT2ForCausalLM(config).eval(), model.eval()):
        for name, parameter in made.named_parameters():
            assert parameter.isfinite().all(), name
        queries = [block.attn.c_attn.query for block in made.transformer.h[:4]]
        assert torch.equal(queries[1].index, torch.arange(32, dtype=torch.int32))
        assert torch.equal(queries[2].mix, torch.eye(8).expand(4, 8, 8))
        assert torch.equal(queries[3].gain, torch.ones(32))
        assert 0.5 * 32**-0.5 < queries[3].down.std() < 2 * 32**-0.5
        assert not queries[3].up.any()
        assert not any(query.bias.any() for query in queries[1:])
        for block in made.transformer.h:
            assert block.attn.c_attn.weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
        assert made(tokens()).logits.abs().max() < 10


def test_missing_query_tensors_are_refused(tiny_reduced, tmp_path):
    """A folder that lacks its query maps' tensors does not load: random numbers would stand in for them."""
    folder = shutil.copytree(tiny_reduced(EVERY_MAP, "gpt2"), tmp_path / "reduced")
    tensors = load_file(folder / "model.safetensors")
    gone = {name for name in tensors if ".query." in name}
    assert len(gone) == 2 + 2 + 4
    save_file({n: t for n, t in tensors.items() if n not in gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"8 tensor\(s\) .* first transformer.h.1.attn.c_attn.query.bias.*query_maps"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_fresh_model_is_drawn_as_gpt2_is():
    """The projections that write to the stream start smaller, by the square root of twice the layers."""
    options = dict(vocab_size=64, n_embd=64, n_layer=8, n_head=4, n_positions=16)
    torch.manual_seed(0)
    for recipe in (["dense"] * 8, ["identity"] * 8):
        config = QectomyGPT2Config(**options, query_maps=recipe)
        compared = 0
        for name, parameter in QectomyGPT2ForCausalLM(config).named_parameters():
            if name.endswith(("c_proj.weight", "c_fc.weight", "c_attn.weight")):
                writes = name.endswith("c_proj.weight")
                drawn = config.initializer_range / (math.sqrt(2 * config.n_layer) if writes else 1.0)
                assert float(parameter.std()) == pytest.approx(drawn, rel=0.1), name
                compared += 1
        assert compared == 32
