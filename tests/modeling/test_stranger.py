"""A reduced folder loads where qectomy is not installed: its model code travels with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from strangers import make_stranger, strange_environment
from tiny_models import EVERY_MAP, load_reduced, tokens

import qectomy

SCRIPT = """
import importlib.util, json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

job = json.loads(sys.argv[1])
out, ids = Path(job["out"]), torch.tensor(job["ids"])
facts = {"qectomy": importlib.util.find_spec("qectomy") is not None, "python": sys.prefix}
for name, folder in job["folders"].items():
    trust = dict(trust_remote_code=True)
    config = AutoConfig.from_pretrained(folder, **trust)
    trust["dtype"] = "float32"
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **trust)
    base = AutoModel.from_pretrained(folder, **trust)
    again = out / f"again-{name}"
    model.save_pretrained(again)
    AutoTokenizer.from_pretrained(folder).save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, **trust)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        tensors = {
            "logits": model(ids).logits,
            "hidden": base(ids).last_hidden_state,
            "again": reloaded(ids).logits,
            "text": model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False),
        }
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, out / f"{name}.safetensors")
    facts[name] = {
        "config": [type(config).__module__, type(config).__name__, config.query_maps],
        "class": [type(model).__module__, type(model).__name__],
        "base": type(base).__name__,
        "bad": [str(info[kind]) for kind in info if "_keys" in kind and info[kind]],
        "saved": sorted(path.name for path in again.iterdir()),
        "auto_map": json.loads((again / "config.json").read_text()).get("auto_map"),
    }
(out / "facts.json").write_text(json.dumps(facts))
"""
STEMS = dict.fromkeys(("llama", "biases", "wide-heads", "tied", "bf16"), "Llama")
STEMS |= {"mistral": "Mistral", "qwen2": "Qwen2", "gpt2": "GPT2", "gpt2-untied": "GPT2"}
NAMES = tuple(STEMS)
MANY = tokens(2, 24)
# What it may import.
ALONE = ("torch", "transformers", "collections", "contextlib", "hashlib", "inspect", "re", "typing")
GAIN = {  # of low-rank, layer 3
    "modeling_qectomy_llama": "model.layers.3.self_attn.query.gain",
    "modeling_qectomy_gpt2": "transformer.h.3.attn.c_attn.query.gain",
}


def code(name: str) -> str:
    """The model file that travels with a folder, without .py."""
    return "modeling_qectomy_gpt2" if name.startswith("gpt2") else "modeling_qectomy_llama"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """The python of an environment with everything installed here but qectomy."""
    return make_stranger(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def answers(stranger, tiny_reduced, tmp_path_factory):
    """What the stranger saw of every folder, and the folder with its tensors."""
    out = tmp_path_factory.mktemp("answers")
    folders = {name: str(tiny_reduced(EVERY_MAP, name)) for name in NAMES}
    job = json.dumps({"out": str(out), "ids": MANY.tolist(), "folders": folders})
    result = subprocess.run(
        [stranger, "-c", SCRIPT, job],
        env=strange_environment(out),
        cwd=out,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return json.loads((out / "facts.json").read_text()), out


def test_the_stranger_has_no_qectomy(answers):
    facts, _ = answers
    assert facts["qectomy"] is False
    assert Path(facts["python"]) != Path(sys.prefix)


@pytest.mark.parametrize("name", NAMES)
def test_every_auto_class_loads(answers, name):
    facts, _ = answers
    stem = f"Qectomy{STEMS[name]}"
    module, config, query_maps = facts[name]["config"]
    assert module.startswith("transformers_modules.")
    assert module.endswith(code(name))
    assert (config, query_maps) == (f"{stem}Config", list(EVERY_MAP))
    assert facts[name]["class"] == [module, f"{stem}ForCausalLM"]
    assert facts[name]["base"] == f"{stem}Model"
    assert facts[name]["bad"] == []


@pytest.mark.parametrize("name", NAMES)
def test_same_logits_as_here(answers, tiny_reduced, name):
    _, out = answers
    theirs = load_file(out / f"{name}.safetensors")
    model = load_reduced(tiny_reduced(EVERY_MAP, name))
    with torch.no_grad():
        logits = model(MANY).logits
        torch.testing.assert_close(theirs["logits"], logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs["hidden"], model.base_model(MANY).last_hidden_state, rtol=1e-5, atol=1e-5)
        text = model.generate(MANY, attention_mask=torch.ones_like(MANY), max_new_tokens=8, do_sample=False)
        assert torch.equal(theirs["text"], text)
        dict(model.named_parameters())[GAIN[code(name)]][0] += 1
        assert (model(MANY).logits - logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_what_the_stranger_saves_travels_on(answers, name):
    facts, out = answers
    theirs = load_file(out / f"{name}.safetensors")
    assert torch.equal(theirs["again"], theirs["logits"])
    assert f"{code(name)}.py" in facts[name]["saved"]
    assert "tokenizer.json" in facts[name]["saved"]
    stem = f"{code(name)}.Qectomy{STEMS[name]}"
    assert facts[name]["auto_map"] == {
        "AutoConfig": f"{stem}Config",
        "AutoModel": f"{stem}Model",
        "AutoModelForCausalLM": f"{stem}ForCausalLM",
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_model_file_stands_alone(name):
    """It imports torch and transformers only, and travels unchanged."""
    source = Path(qectomy.__file__).parent / f"modeling/{code(name)}.py"
    imports = [line for line in source.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
    assert imports
    for line in imports:
        assert line.split()[1].partition(".")[0] in ALONE, line
