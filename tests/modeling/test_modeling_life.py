"""The shipped classes as transformers uses them: loading, saving, training, fresh models."""

import pytest
import torch
from foldings import fold
from tiny_models import EVERY_MAP, load_reduced, save_tiny, tiny_model, tokens
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import qectomy
from qectomy.modeling.modeling_qectomy_llama import (
    QectomyLlamaConfig,
    QectomyLlamaForCausalLM,
    QectomyMistralConfig,
    QectomyQwen2Config,
    QueryMap,
)


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_half_precision_runs(tiny_reduced, name):
    folder = tiny_reduced(EVERY_MAP, name)
    model = AutoModelForCausalLM.from_pretrained(folder)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    with torch.no_grad():
        logits, exact = model(tokens()).logits, load_reduced(folder, torch.float64)(tokens()).logits
    assert logits.dtype == dtype
    assert relative(logits.double(), exact) < 0.2


@pytest.mark.parametrize("name", ["llama", "tied", "biases", "bf16", "mistral", "qwen2", "rope-llama3", "rope-yarn"])
def test_save_and_reload(tiny_reduced, tmp_path, name):
    """Loaded by the Auto classes, saved by transformers, loaded again: same logits, no trust flag."""
    folder, ids = tiny_reduced(EVERY_MAP, name), tokens(2, 60)
    first, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(first).__module__ == "qectomy.modeling.modeling_qectomy_llama"
    first.save_pretrained(tmp_path / "again")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with torch.no_grad():
        expected = load_reduced(folder, first.dtype)(ids).logits
        assert torch.equal(first(ids).logits, expected)
        assert torch.equal(second(ids).logits, expected)
        second.model.layers[3].self_attn.query.up[0] += 1
        assert not torch.equal(second(ids).logits, expected)
    assert second.config.query_maps == list(EVERY_MAP)
    assert second.model.layers[1].self_attn.query.index.dtype == torch.int32
    assert (tmp_path / "again/modeling_qectomy_llama.py").is_file()
    base = AutoModel.from_pretrained(folder)
    torch.testing.assert_close(base(ids).last_hidden_state, first.model(ids).last_hidden_state)
    assert AutoConfig.from_pretrained(folder).model_type.startswith("qectomy_")


def test_outputs_are_recorded(tiny_reduced):
    model = load_reduced(tiny_reduced(EVERY_MAP))
    model.set_attn_implementation("eager")
    out = model(tokens(2, 11), output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == len(EVERY_MAP) + 1
    assert [tuple(weights.shape) for weights in out.attentions] == [(2, 4, 11, 11)] * len(EVERY_MAP)
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 4, 11))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_a_training_step_with_gradient_checkpointing(tiny_reduced, name):
    model = load_reduced(tiny_reduced(EVERY_MAP, name, attention_dropout=0.1)).train()
    plain = load_reduced(tiny_reduced(EVERY_MAP, name, attention_dropout=0.1)).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    runs = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(0))
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
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = model(ids, labels=ids).loss.item()
    optimizer.step()
    assert model(ids, labels=ids).loss.item() != before


@pytest.mark.parametrize("config_class", [QectomyLlamaConfig, QectomyMistralConfig, QectomyQwen2Config])
def test_a_fresh_model_is_usable(config_class):
    """From a config alone, `_init_weights` leaves no uninitialised memory: finite, and small logits."""
    options = {
        key: tiny_model("llama").config.to_dict()[key] for key in ("hidden_size", "vocab_size", "num_attention_heads")
    }
    config = config_class(
        **options,
        intermediate_size=40,
        num_key_value_heads=2,
        num_hidden_layers=5,
        query_maps=list(EVERY_MAP),
    )
    qectomy.register()  # a config made by hand was looked up by nobody
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *(m.index for m in model.modules() if hasattr(m, "index"))]:
        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 10**6)
    fresh = AutoModelForCausalLM.from_config(config)
    for module in model.modules():
        if isinstance(module, QueryMap):
            model._init_weights(module)
    for name, parameter in [
        *fresh.named_parameters(),
        *((n, p) for n, p in model.named_parameters() if "query" in n),
    ]:
        assert parameter.isfinite().all(), name
    assert torch.equal(model.model.layers[1].self_attn.query.index, torch.arange(32, dtype=torch.int32))
    assert fresh(tokens()).logits.abs().max() < 10
    assert fresh.model.layers[3].self_attn.query.down.std() > 0


def test_another_config_than_the_weights_is_refused(tiny_checkpoint):
    """A stock folder with a reduced config lacks its query maps' tensors: random numbers would stand in for them."""
    folder = tiny_checkpoint("llama")
    fields = AutoConfig.from_pretrained(folder).to_dict()
    config = QectomyLlamaConfig(**{**fields, "query_maps": ["select", "low-rank:3"]})
    with pytest.raises(ValueError, match=r"5 tensor\(s\) .* first model.layers.0.self_attn.query.gain.*query_maps"):
        QectomyLlamaForCausalLM.from_pretrained(folder, config=config)


def test_parted_gauges_are_refused(tmp_path):
    """Dense values beside a config that still says `gauge`, as some tools save them, do not load."""
    save_tiny(tmp_path / "tiny")
    fold(tmp_path / "tiny", tmp_path / "exact")
    said = (tmp_path / "exact/config.json").read_text()
    assert '"gauge"' in said
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exact")
    model.save_pretrained(tmp_path / "again")
    AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    (tmp_path / "again/config.json").write_text(said)
    with pytest.raises((ValueError, RuntimeError), match=r"pivots|mismatch|v_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match=r"tensor\(s\) .* first model.layers.0.self_attn.v_proj.pivots.*value_maps"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "again", ignore_mismatched_sizes=True)
