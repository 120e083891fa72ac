"""Reduced models split over two processes by transformers: each layer's heads follow the keys that it holds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foldings import fold
from safetensors.torch import load_file
from tiny_models import load_reduced, tokens
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from qectomy.modeling.modeling_qectomy_llama import local_heads

SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file
from torch import distributed
from transformers import AutoModelForCausalLM
import qectomy

job = json.loads(sys.argv[1])
distributed.init_process_group("gloo")
ids = torch.tensor(job["ids"])
for name, folder in job["folders"].items():
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    with torch.no_grad():
        logits = model(ids).logits
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    logits = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    if distributed.get_rank() == 0:
        held = model.model.layers[0].self_attn.k_proj.weight
        held = held.to_local() if hasattr(held, "to_local") else held
        tensors = {"logits": logits.contiguous(), "text": text, "held": torch.tensor(held.shape)}
        save_file(tensors, f"{job['out']}/{name}")
distributed.destroy_process_group()
"""
RECIPES = {name: (name, name) for name in ("identity", "select", "key-shared", "low-rank:3", "dense")}
RECIPES |= {"mixed": ("select", "key-shared", "identity")}
NAMES = [*RECIPES, "exact", "mistral", "qwen2", "biases"]
IDS = tokens(2, 17)


@pytest.fixture(scope="module")
def folders(tiny_reduced, tiny_checkpoint, tmp_path_factory) -> dict[str, Path]:
    made = {name: tiny_reduced(recipe) for name, recipe in RECIPES.items()}
    made |= {name: tiny_reduced(("key-shared", "select"), name) for name in ("mistral", "qwen2", "biases")}
    made["exact"] = tmp_path_factory.mktemp("fold") / "exact"
    fold(tiny_checkpoint(), made["exact"])
    return made


@pytest.fixture(scope="module")
def split(folders, tmp_path_factory) -> Path:
    """What two processes gave for each folder, a file each."""
    out = tmp_path_factory.mktemp("split")
    job = {"ids": IDS.tolist(), "out": str(out), "folders": {name: str(folder) for name, folder in folders.items()}}
    (out / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, out / "script.py", json.dumps(job)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=out,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_give_what_one_gives(split, folders, name):
    found, model = load_file(split / name), load_reduced(folders[name])
    with torch.no_grad():
        logits = model(IDS).logits
        text = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    assert (found["logits"] - logits).abs().max() < 1e-5 * logits.abs().max()
    assert torch.equal(found["text"], text)


def test_the_keys_were_split(split, folders):
    """Otherwise nothing was shown."""
    whole = load_reduced(folders["identity"]).model.layers[0].self_attn.k_proj.weight.shape
    assert load_file(split / "identity")["held"].tolist() == [whole[0] // 2, whole[1]]


@pytest.mark.parametrize("here", [0, 3])
def test_heads_that_part_from_their_keys_are_refused(here):
    with pytest.raises(RuntimeError, match=f"{here} of 4 KV heads arrived .* the tensor-parallel size divides"):
        local_heads(8, 4, here, nn.Linear(1, 1))


@pytest.fixture
def third_of_four():
    """This process as the third of four that two dimensions part, the tensor-parallel one not the innermost."""
    distributed.init_process_group("fake", rank=2, world_size=4, store=FakeStore())
    yield distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["module", "module of two dimensions", "tensor", "vllm"])
def test_the_heads_are_those_of_the_tensor_parallel_rank(third_of_four, kind):
    """As transformers keeps it on the modules that it splits, or on their tensors, or vLLM on its own."""
    keys, mesh = nn.Linear(8, 16, bias=False), third_of_four["tp"]
    if kind == "tensor":
        keys.weight = nn.Parameter(DTensor.from_local(keys.weight.data, mesh, [Shard(0)], run_check=False))
    elif kind == "vllm":
        keys.tp_rank, keys.tp_size = 1, 2
    else:
        keys._hf_device_mesh = mesh if kind == "module" else third_of_four
    assert local_heads(8, 4, 2, keys) == slice(4, 8)
    assert local_heads(8, 4, 4, keys) == slice(None)
    with pytest.raises(RuntimeError, match=r"1 of 4 KV heads arrived .* for 4 processes, and 2 are told of"):
        local_heads(8, 4, 1, keys)


def test_a_share_of_nobody_knows_which_heads_is_refused(third_of_four):
    keys = nn.Linear(8, 16)
    with pytest.raises(
        RuntimeError, match=r"2 of 4 KV heads arrived .* for 2 processes, and 4 are told of: which heads"
    ):
        local_heads(8, 4, 2, keys)
    assert local_heads(8, 4, 1, keys) == slice(4, 6)  # where all processes share them


@pytest.mark.parametrize("recipe", [("key-shared", "dense"), ("dense", "select")])
def test_parts_of_heads_are_refused(tiny_reduced, recipe):
    """As a plan gives them that splits two KV heads over four processes."""
    model = load_reduced(tiny_reduced(recipe))
    keys = model.model.layers[0].self_attn.k_proj
    keys.weight = nn.Parameter(keys.weight[:4])
    with pytest.raises(RuntimeError, match=r"keys of 4 channels are no whole number of heads of 8 each"):
        model(IDS)
