"""One folder is one model: read whole, read a layer at a time, converted exactly, and by transformers itself.

Or it is refused, by each of ours. Folders differ in how a model is laid out in them: in one file, in shards or both,
tied or not, with one name of a tied pair or two, under the base model's names or a wrapper's, in one type or another
than config.json's.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer, tokens
from transformers import AutoModelForCausalLM

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.headers import INDEX, SINGLE
from qectomy.conversion.exact import convert_exact
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import QectomyError
from qectomy.eval.certificate import verify
from qectomy.eval.layerwise_model import StreamedModel, open_any
from qectomy.eval.loading import load_model
from qectomy.models.architectures import FAMILIES

IDS = tokens(batch=1, length=24, seed=3)
DTYPES = ("float32", "bfloat16", "float16")

layouts = st.fixed_dictionaries(
    {
        "family": st.sampled_from(("gpt2", "llama", "mistral", "qwen2")),
        "tied": st.booleans(),
        "stored": st.sampled_from(("embedding", "head", "both", "both, another head")),
        "prefix": st.sampled_from(("as it is", "none", "twice", "mixed")),
        "files": st.sampled_from(("one", "shards", "one beside other shards")),
        "dtype": st.sampled_from(DTYPES),
        "said": st.sampled_from((*DTYPES, "torch.bfloat16", None)),
        "seed": st.integers(0, 5),
    }
)


def lay_out(folder: Path, source: Path, layout: dict[str, Any]) -> Path:
    """Write the model of `source`, which is not tied, in another layout."""
    family, dice = FAMILIES[layout["family"]], random.Random(layout["seed"])
    dtype = getattr(torch, layout["dtype"])
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(source / SINGLE).items()}
    head, embedding = family.head, family.embedding
    if layout["stored"] != "both, another head":
        tensors[head] = tensors[embedding].clone()
    if layout["stored"] in ("embedding", "head"):
        del tensors[head if layout["stored"] == "embedding" else embedding]

    def renamed(name: str) -> str:
        kind = dice.choice(("as it is", "none", "twice")) if layout["prefix"] == "mixed" else layout["prefix"]
        bare = name.removeprefix(family.base_prefix)
        return {"as it is": name, "none": bare, "twice": family.base_prefix + name}[kind]

    tensors = {renamed(name): tensor for name, tensor in tensors.items()}
    if layout["files"] == "shards":
        write_shards(folder, tensors)
    else:
        if layout["files"] != "one":
            write_shards(folder, {name: tensor + 0.5 for name, tensor in tensors.items()})
        save_file(tensors, folder / SINGLE, {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": layout["tied"]}
    del config["dtype"]
    said = {} if layout["said"] is None else {"torch_dtype": layout["said"]}
    (folder / "config.json").write_text(json.dumps(config | said))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = list(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@torch.no_grad()
def stock(folder: Path, dtype: torch.dtype) -> tuple[torch.Tensor | None, dict[str, Any]]:
    """Return the logits of transformers' own model, None where it has to make tensors up; and what it says of them."""
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = str(config.get("torch_dtype", "float32")).removeprefix("torch.")  # or it fails
    before = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps(config))
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    finally:
        (folder / "config.json").write_text(before)
    whole = not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    return model.to(torch.float64)(IDS).logits if whole else None, info


@torch.no_grad()
def resident(folder: Path) -> torch.Tensor:
    model, _, dtype = load_model(str(folder), None, "cpu")
    assert dtype == str(model.dtype).removeprefix("torch.")
    return model.to(torch.float64)(IDS).logits


@torch.no_grad()
def streamed(folder: Path) -> torch.Tensor:
    model = StreamedModel(open_any(str(folder)), torch.float64)
    return model.all_logits(model.states(IDS)[0])[None]


def refused(read: Callable[[Path], object], folder: Path) -> str:
    """Return what a folder is refused with; "" where it is read."""
    try:
        read(folder)
    except QectomyError as error:
        return str(error)
    return ""


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layout=layouts)
def test_a_folder_is_one_model_however_it_is_read(layout, tiny_checkpoint, tmp_path_factory):
    source = tiny_checkpoint(layout["family"], tie_word_embeddings=False, num_hidden_layers=1)
    folder = lay_out(tmp_path_factory.mktemp("laid-out"), source, layout)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    expected, info = stock(folder, getattr(torch, layout["dtype"]))
    if expected is None:
        assert refused(resident, folder), info
        assert refused(streamed, folder), info
        return
    scale = float(expected.abs().max())
    whole, by_layer = resident(folder), streamed(folder)
    assert float((whole - expected).abs().max()) <= 1e-6 * scale
    assert float((by_layer - expected).abs().max()) <= 1e-6 * scale
    assert open_checkpoint(folder).dtype == {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[layout["dtype"]]
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("tied", "stored", "files"),
    [
        (True, "embedding", "one beside other shards"),
        (True, "head", "one"),
        (True, "both", "shards"),
        (True, "both, another head", "shards"),
        (False, "both, another head", "one beside other shards"),
        (False, "head", "one"),
    ],
)
def test_an_exact_conversion_is_of_the_model_that_transformers_loads(tied, stored, files, tiny_checkpoint, tmp_path):
    layout = {"family": "gpt2", "tied": tied, "stored": stored, "prefix": "mixed", "files": files}
    layout |= {"dtype": "float32", "said": "float16", "seed": 1}
    source = tiny_checkpoint("gpt2-one-head", tie_word_embeddings=False, num_hidden_layers=1)
    (tmp_path / "in").mkdir()
    folder = lay_out(tmp_path / "in", source, layout)
    expected, _ = stock(folder, torch.float32)
    out = tmp_path / "out"
    if expected is None:
        with pytest.raises(QectomyError, match="are missing, first"):
            convert_exact(open_checkpoint(folder), out, ConvertSettings())
        return
    report = convert_exact(open_checkpoint(folder), out, ConvertSettings())
    assert report.logit_error < 1e-5
    scale = float(expected.abs().max())
    for read in (resident, streamed):
        assert float((read(out) - expected).abs().max()) <= 1e-4 * scale, read
    certificate = verify(open_checkpoint(out, reduced=True), open_checkpoint(folder))
    assert certificate["verdict"] == "exact", certificate["reasons"]
