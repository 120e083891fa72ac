"""LoRA by PEFT on reduced models: it finds every projection, trains, merges, and comes back from a folder."""

from pathlib import Path

import pytest
import torch
from foldings import fold, relative, stored
from tiny_models import save_variant, tokens
from transformers import AutoModelForCausalLM

import qectomy

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT asks

MAPS = ("identity", "select", "key-shared", "low-rank:3", "dense", "exact", "shared")
EXPLICIT = {"gpt2": {"c_attn"}, "llama": {"k_proj", "v_proj", "o_proj"}, "mistral": {"k_proj", "v_proj", "o_proj"}}
EXPLICIT["qwen2"] = EXPLICIT["llama"]
EVERY = {"gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}}
EVERY["llama"] = {f"self_attn.{name}" for name in EXPLICIT["llama"]} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}
EVERY["mistral"] = EVERY["qwen2"] = EVERY["llama"]
IDS = tokens(2, 24)


@pytest.fixture(scope="module")
def folder_of(tiny_reduced, tiny_checkpoint, tmp_path_factory):
    """(family, query map) -> the folder of a reduced checkpoint; `shared`: the second layer has the first's weights."""

    def made(family: str, query: str) -> Path:
        out = tmp_path_factory.getbasetemp() / f"adapters-{query}-{family}"
        if query not in ("exact", "shared"):
            return tiny_reduced((query, query), family)
        if query == "exact" and not out.exists():
            fold(tiny_checkpoint(family), out)
        elif not out.exists():
            save_variant(out, family, "float32", shared_layers=True, query_maps=["key-shared"] * 2)
        return out

    return made


def load(folder: Path) -> torch.nn.Module:
    assert qectomy.__version__
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def adapted(family: str, model: torch.nn.Module, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2", **options)
    return peft.get_peft_model(model, config)


def train(model: torch.nn.Module, steps: int = 6) -> None:
    """Fit the adapter to IDS; every part of it has a gradient, and the loss falls."""
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, losses = torch.optim.AdamW(own.values(), lr=1e-2, weight_decay=0), []
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in own.items():
        assert parameter.grad.abs().max() > 0, name
    assert losses[-1] < losses[0] - 0.05, losses


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def places(model: torch.nn.Module) -> dict[int, set[str]]:
    """{layer: the modules in it that have an adapter}."""
    found: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parts = name.partition(".lora_B.")[0].split(".")
            at = next(i for i, part in enumerate(parts) if part.isdigit())
            found.setdefault(int(parts[at]), set()).add(".".join(parts[at + 1 :]))
            assert parameter.abs().max() > 0, name
    return found


@pytest.mark.parametrize("targets", ["explicit", "all-linear"])
@pytest.mark.parametrize("query", MAPS)
@pytest.mark.parametrize("family", EVERY)
def test_lora_trains_merges_and_comes_back(folder_of, tmp_path, family, query, targets):
    folder = folder_of(family, query)
    plain = logits(load(folder))
    wanted = targets if targets == "all-linear" else sorted(EXPLICIT[family])
    model = adapted(family, load(folder), target_modules=wanted)
    assert torch.equal(logits(model), plain)
    train(model)
    expected = {
        name for name in EVERY[family] if targets == "all-linear" or name.rpartition(".")[2] in EXPLICIT[family]
    }
    if query in ("dense", "exact") and family != "gpt2" and targets == "all-linear":
        expected.add("self_attn.q_proj")
    assert places(model) == dict.fromkeys(range(1 if query == "shared" else 2), expected)

    learnt = logits(model)
    assert relative(learnt, plain) > 0.01
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), learnt)
    with again.disable_adapter():
        assert torch.equal(logits(again), plain)

    merged = again.merge_and_unload()
    assert relative(logits(merged), learnt) < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))
    if query != "exact":  # whose blocks from_pretrained has written out
        assert stored(tmp_path / "merged") == stored(folder)


def test_what_is_exchanged_for_a_projection_keeps_the_query_map(tiny_reduced):
    """As bitsandbytes does while it loads: any linear module takes the place of keys and values alone."""
    model = load(tiny_reduced(("key-shared", "select"), "gpt2"))
    plain = logits(model)
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.c_attn"
        old = model.get_submodule(name)
        new = torch.nn.Linear(32, 64, bias=False)
        new.weight.data = old.weight.data.T.clone()
        model.set_submodule(name, new)
        assert model.get_submodule(name).query is old.query
    torch.testing.assert_close(logits(model), plain)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("query", ["select", "key-shared", "low-rank:3"])
def test_query_maps_are_trained_whole(folder_of, tmp_path, family, query):
    """`modules_to_save`, beside an adapter of other modules: GPT-2's query map lies inside `c_attn`."""
    folder, others = folder_of(family, query), {"gpt2": ["c_fc"], "llama": ["k_proj", "up_proj"]}[family]
    model = adapted(family, load(folder), target_modules=others, modules_to_save=["query"])
    train(model)
    learnt = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path / "adapter")
    assert torch.equal(logits(again), learnt)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert relative(logits(load(tmp_path / "merged")), learnt) < 1e-5
    assert stored(tmp_path / "merged") == stored(folder)


def test_a_query_map_inside_a_wrapped_projection_is_refused(tiny_reduced):
    model = load(tiny_reduced(("select", "select"), "gpt2"))
    with pytest.raises(ValueError, match="child of"):
        adapted("gpt2", model, target_modules=["c_attn"], modules_to_save=["query"])
