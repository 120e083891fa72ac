"""The shipped classes without norms or skips, with shared layers, with gauged and merged projections."""

import json
import os
import subprocess
import sys

import pytest
import torch
from foldings import in_float64, relative
from safetensors.torch import load_file
from tiny_models import save_variant, tokens, variant_model
from transformers import AutoModelForCausalLM
from variant_reference import logits_of

import qectomy
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.models.architectures import FAMILIES

qectomy.register()
STRUCTURES = {
    "norm-free": dict(norms=False),
    "attention-skip": dict(norms=False, mlp_skip=False),
    "mlp-skip": dict(norms=False, attention_skip=False),
    "skipless": dict(norms=False, attention_skip=False, mlp_skip=False),
    "shared": dict(norms=False, shared_layers=True),
    "norms": {},
    "norms-attention-skip": dict(mlp_skip=False),
    "norms-mlp-skip": dict(attention_skip=False),
    "norms-skipless": dict(attention_skip=False, mlp_skip=False),
    "norms-shared": dict(shared_layers=True),
    "norms-skipless-shared": dict(attention_skip=False, mlp_skip=False, shared_layers=True),
}


def maps(query="dense", value="dense", output="dense"):
    return dict(query_maps=[query] * 2, value_maps=[value] * 2, output_maps=[output] * 2)


MAPS = {  # beside all dense
    "identity": maps("identity"),
    "identity-gauge": maps("identity", "gauge"),
    "value": maps("dense", "gauge"),
    "both": maps("gauge", "gauge"),
    "mixed": dict(query_maps=["identity", "dense"], value_maps=["gauge", "dense"]),
}
MERGED = maps("identity", "gauge", "merged")


def combinations():
    for family in ("gpt2", "llama", "mistral"):
        for structure, fields in STRUCTURES.items():
            yield family, structure, "dense", fields
        for name, chosen in MAPS.items():
            if name in (("value",) if family == "gpt2" else ("both",)):  # which that family does not have
                continue
            for structure in ("norm-free", "norms", "shared", "skipless"):
                if structure != "shared" or name != "mixed":
                    yield family, structure, name, {**STRUCTURES[structure], **chosen}
        yield family, "skipless", "merged", {**STRUCTURES["skipless"], **MERGED}
        yield family, "skipless-shared", "merged", {**STRUCTURES["skipless"], "shared_layers": True, **MERGED}
    for shape in (
        dict(num_key_value_heads=1),
        dict(head_dim=6),
        dict(head_dim=12),
        dict(attention_bias=True, mlp_bias=True),
    ):
        yield "llama", "norm-free", str(shape), {**STRUCTURES["norm-free"], **maps("identity", "gauge"), **shape}
    yield "llama", "norms", "dense", dict(tie_word_embeddings=True)
    yield "llama", "norms", "value-biases", {**MAPS["value"], "attention_bias": True}


ALL = {"-".join(case[:3]): (case[0], case[3]) for case in combinations()}
SOME = {
    name: ALL[name]
    for name in (
        "gpt2-norms-shared-dense",
        "gpt2-skipless-shared-merged",
        "gpt2-norm-free-both",
        "gpt2-norms-identity-gauge",
        "llama-shared-identity-gauge",
        "llama-skipless-merged",
        "llama-norms-value",
        "llama-norms-value-biases",
        "mistral-norms-shared-dense",
        "mistral-shared-value",
    )
}


def made(case):
    """A scrambled model; its pivots too, where it has any."""
    family, fields = case
    model = variant_model(family, **{**(dict(embd_pdrop=0.0) if family == "gpt2" else {}), **fields})
    generator = torch.Generator().manual_seed(3)
    for name, buffer in model.named_buffers():
        if name.endswith(".pivots"):
            buffer.copy_(torch.stack([torch.randperm(32, generator=generator)[: buffer.shape[1]] for _ in buffer]))
    return model


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
@torch.no_grad()
def test_the_equations(case):
    model, ids = in_float64(made(case)), tokens(2, 9)
    expected = logits_of(model.config, model.state_dict(), ids)
    found = model(ids).logits
    assert relative(found, expected) < 1e-11
    # and it depends on every tensor
    state = model.state_dict()
    for name in state if case in SOME.values() else ():
        if state[name].is_floating_point() and "rotary" not in name:
            was = state[name].clone()
            state[name] += 0.1 * torch.rand(was.shape, generator=torch.Generator().manual_seed(1), dtype=was.dtype)
            assert relative(model(ids).logits, expected) > 1e-6, name
            state[name].copy_(was)


@pytest.mark.parametrize("case", SOME.values(), ids=SOME)
def test_save_and_reload(case, tmp_path):
    model, ids = made(case), tokens(2, 40)
    model.save_pretrained(tmp_path / "first")
    names = set(load_file(tmp_path / "first/model.safetensors"))
    if case[1].get("shared_layers"):
        layers = {name.split(".")[2] for name in names if ".h." in name or ".layers." in name}
        assert layers == {"0"}
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert type(again) is type(model)
    again.save_pretrained(tmp_path / "second")
    gauged = "gauge" in case[1].get("value_maps", [])  # whose identity blocks are written out when they are loaded
    assert (set(load_file(tmp_path / "second/model.safetensors")) == names) == (not gauged)
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    with torch.no_grad():
        expected = model(ids).logits
        assert expected.isfinite().all()
        assert relative(again(ids).logits, expected) <= (1e-5 if gauged else 0)
        assert torch.equal(third(ids).logits, again(ids).logits)
        name, parameter = next((n, p) for n, p in third.named_parameters() if "mlp" in n and p.ndim == 2)
        parameter += 0.1
        assert relative(third(ids).logits, expected) > 1e-3, name
    for field in ("norms", "attention_skip", "mlp_skip", "shared_layers", "output_maps"):
        assert getattr(third.config, field) == getattr(model.config, field)
    kept = ["dense" if gauged and name == "gauge" else name for name in model.config.query_maps]
    assert third.config.query_maps == kept
    assert third.config.value_maps == ["dense"] * 2
    if case[1].get("shared_layers"):
        assert (
            len({name.split(".")[2] for name in load_file(tmp_path / "second/model.safetensors") if "mlp" in name}) == 1
        )


@pytest.mark.parametrize("case", SOME.values(), ids=SOME)
def test_a_cache_changes_nothing(case):
    """Shared layers share their weights, and each has keys of its own."""
    model, ids = in_float64(made(case)), tokens(2, 12)
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    out = [
        model.generate(ids, use_cache=cache, output_logits=True, return_dict_in_generate=True, **options)
        for cache in (True, False)
    ]
    assert torch.equal(out[0].sequences, out[1].sequences)
    assert relative(torch.stack(out[0].logits), torch.stack(out[1].logits)) < 1e-10
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert len(cache) == 2
    assert not torch.equal(cache.layers[0].keys, cache.layers[1].keys)


@pytest.mark.parametrize("case", SOME.values(), ids=SOME)
def test_a_training_step(case):
    """Every parameter has a gradient, the same with checkpoints; a step along it lowers the loss."""
    ids = tokens(2, 12)
    model, plain = in_float64(made(case)), in_float64(made(case))
    for each in (model, plain):
        each.train()
        for module in each.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        each.config.attn_pdrop = 0.0
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    runs = []
    layers = model.transformer.h if case[0] == "gpt2" else model.model.layers
    layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(0))
    losses = []
    for each in (model, plain):
        torch.manual_seed(0)
        loss = each(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
    assert len(runs) == (4 if case[1].get("shared_layers") else 2)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert other.grad is not None, name
        assert other.grad.isfinite().all(), name
        assert other.grad.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)
    norm = sum(p.grad.square().sum() for p in plain.parameters()).sqrt()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= 1e-4 * parameter.grad / norm
        assert plain(ids, labels=ids).loss.item() == pytest.approx(
            losses[1] - 1e-4 * norm.item(), abs=1e-5 * norm.item()
        )


@pytest.mark.parametrize("case", SOME.values(), ids=SOME)
def test_a_fresh_model_is_usable(case):
    """From a config alone: finite, small logits, the first channels as pivots."""
    model = type(made(case))(made(case).config).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
        if name.endswith(".pivots"):
            assert all(own.tolist() == list(range(tensor.shape[1])) for own in tensor)
        if name.endswith(("v_proj.weight", "c_attn.weight", "gauge.weight")):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.15), name
    assert model(tokens()).logits.abs().max() < 10


SCRIPT = """
import json, sys
sys.modules["qectomy"] = None  # as if it were not installed
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
job = json.loads(sys.argv[1])
for name, folder in job["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    ids = torch.tensor(job["ids"])
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    with torch.no_grad():
        save_file({"logits": model(ids).logits, "again": again(ids).logits}, folder + ".safetensors")
"""


def test_a_stranger_gets_the_same_logits(tmp_path):
    """In a process that cannot import qectomy, by the code that lies beside the weights."""
    ids, models = tokens(2, 24), {}
    for name, case in SOME.items():
        models[name] = made(case)
        models[name].save_pretrained(tmp_path / name)
        assert list((tmp_path / name).glob("modeling_qectomy_*.py"))
    environment = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS") if key in os.environ}
    environment |= {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    job = json.dumps({"ids": ids.tolist(), "folders": {name: str(tmp_path / name) for name in SOME}})
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, job], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    with torch.no_grad():
        for name, model in models.items():
            theirs = load_file(tmp_path / f"{name}.safetensors")
            assert relative(theirs["logits"], model(ids).logits) < 1e-5, name
            assert torch.equal(theirs["again"], theirs["logits"])


BAD = {
    "too-few": (dict(value_maps=["gauge"]), r"value_maps names 1 layers, the model has 2"),
    "unknown-value": (dict(value_maps=["dense", "gauged"]), r"value_maps must name dense or gauge for each layer, got"),
    "unknown-output": (dict(output_maps=["merge", "dense"]), r"output_maps must name dense or merged for each layer"),
    "not-shared": (
        dict(shared_layers=True, query_maps=["identity", "dense"]),
        r"query_maps must name the same for all layers, which share their weights",
    ),
    "merged-past-a-skip": (
        dict(norms=False, output_maps=["merged", "merged"]),
        r"W_O can be merged into the MLP only where no norm and no skip stand between them",
    ),
    "merged-past-a-norm": (
        dict(attention_skip=False, output_maps=["merged", "dense"]),
        r"W_O can be merged into the MLP only where no norm and no skip stand between them",
    ),
}


@pytest.mark.parametrize("fields, message", BAD.values(), ids=BAD)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "qwen2"])
def test_configs_that_contradict_themselves(family, fields, message):
    with pytest.raises(ValueError, match=message):
        variant_model(family, **fields)


def test_what_one_family_alone_refuses():
    with pytest.raises(ValueError, match="only where n_heads \\* d_head is d_model"):
        variant_model("llama", **STRUCTURES["skipless"], **MERGED, head_dim=6)
    for query, value in (("dense", "gauge"), ("gauge", "dense")):
        message = f"layer 1: queries of map '{query}' cannot go with values of map '{value}'"
        with pytest.raises(ValueError, match=message):
            variant_model("gpt2", query_maps=["identity", query], value_maps=["dense", value])
    with pytest.raises(ValueError, match="share their weights cannot scale their logits by their place"):
        variant_model("gpt2", shared_layers=True, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="unknown query map 'gauge'"):
        variant_model("llama", query_maps=["gauge", "dense"])
    config = FAMILIES["llama"].config_class(reduced=True)(num_hidden_layers=3)
    assert (config.query_maps, config.value_maps, config.output_maps) == (["dense"] * 3,) * 3


def test_a_variant_folder_opens_as_an_original(tmp_path):
    """save_variant writes what a user's own model of our classes is: whole, and open to folding."""
    folder = save_variant(tmp_path / "variant", "llama", norms=False, shared_layers=True)
    checkpoint = open_checkpoint(folder)
    assert not checkpoint.dims.stock
    assert checkpoint.dims.shared_layers
    assert checkpoint.dtype == "F64"
