"""nanoGPT checkpoints, the paper's too: the imported model gives the logits of that code's own forward pass."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nanogpt_checkpoints import PAPER, Made, made
from tiny_models import load_reduced, tiny_tokenizer, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import qectomy
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.errors import CheckpointError, NonFiniteError, OutputError, QectomyError, UnsupportedArchitecture
from qectomy.surgery.nanogpt import import_nanogpt

# D n_embd, H heads, K = D / H, V vocab_size

MODES = ("original", "identity", "residual")


def forward(made: Made, ids: torch.Tensor) -> torch.Tensor:
    """The logits (B, T, V) by the formulas of nanoGPT and of the paper, float64, written out head by head."""
    args, state = made.args, {name: tensor.double() for name, tensor in made.state.items()}
    H = args.get("num_heads", args.get("n_head"))
    D = args["n_embd"]
    K, T, mode = D // H, ids.shape[1], args.get("query_mode", "original")
    scale = args.get("scale", 1 / math.sqrt(K))

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:T]
    for i in range(args["n_layer"]):
        block = f"transformer.h.{i}"
        seen = norm(x, f"{block}.ln_1")
        projected = linear(seen, f"{block}.attn.c_attn")
        if mode == "identity":
            query, key, value = seen, projected[..., :D], projected[..., D:]
        else:
            query, key, value = projected[..., :D], projected[..., D : 2 * D], projected[..., 2 * D :]
            query = seen + query if mode == "residual" else query
        heads = []
        for h in range(H):
            own = slice(h * K, (h + 1) * K)
            logits = scale * query[..., own] @ key[..., own].mT
            logits = logits.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
            heads.append(logits.softmax(-1) @ value[..., own])
        x = x + linear(torch.cat(heads, -1), f"{block}.attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["lm_head.weight"].T


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def imported(folder):
    """The folder's model in float64, loaded strictly."""
    assert qectomy.__version__
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


VARIANTS = [
    dict(),
    dict(bias=False),
    dict(tie_weights=False),
    dict(scale=8**-0.5),
    dict(num_heads=1, scale=0.1),
    dict(drop=("scale", "tie_weights", "mlp_hidden_size", "dropout")),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_logits_are_those_of_the_forward_pass(variant, mode, tmp_path):
    source = made(query_mode=mode, **variant)
    result = import_nanogpt(source.save(tmp_path / "ckpt.pt"), tmp_path / "out")
    model, ids = imported(tmp_path / "out"), tokens(2, 24)
    with torch.no_grad():
        expected = forward(source, ids)
        assert relative(model(ids).logits, expected) < 1e-6  # W_Q and b_O are rounded to float32 once
        changed = replace(source, args={**source.args, "scale": 1.1 * source.args.get("scale", 8**-0.5)})
        assert relative(forward(changed, ids), expected) > 1e-4
    assert model.config.model_type == ("qectomy_gpt2" if mode == "identity" else "gpt2")
    held = open_checkpoint(tmp_path / "out", reduced=mode == "identity")
    assert result["parameters"] == held.parameters == sum(p.numel() for p in model.parameters())
    assert result["bytes"] == held.nbytes


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_plain_nanogpt(prefix, tmp_path):
    """n_head, no query_mode, no scale, what torch.compile and DDP put before names, the mask of slow attention."""
    source = made(drop=("num_heads", "scale", "tie_weights", "mlp_hidden_size"), n_head=4)
    with torch.no_grad():
        expected = forward(source, tokens(2, 24))
    source.state = {f"{prefix}{name}": tensor for name, tensor in source.state.items()}
    source.state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
    result = import_nanogpt(source.save(tmp_path / "ckpt.pt"), tmp_path / "out")
    assert result["query_mode"] == "original"
    with torch.no_grad():
        assert relative(imported(tmp_path / "out")(tokens(2, 24)).logits, expected) < 1e-12


def test_identity_stores_no_query_and_no_bias_of_keys_and_values(tmp_path):
    source = made(query_mode="identity")
    import_nanogpt(source.save(tmp_path / "ckpt.pt"), tmp_path / "out")
    held = open_checkpoint(tmp_path / "out", reduced=True)
    assert held.tensors["transformer.h.1.attn.c_attn.weight"].shape == (32, 64)
    assert not [name for name in held.tensors if "c_attn" in name and not name.endswith("c_attn.weight")]
    assert held.config["softmax_scale"] == PAPER["scale"]
    assert load_reduced(tmp_path / "out").transformer.h[0].attn.scaling == pytest.approx(PAPER["scale"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_type_is_kept(dtype, tmp_path):
    source = made(query_mode="identity")
    source.state = {name: tensor.to(dtype) for name, tensor in source.state.items()}
    import_nanogpt(source.save(tmp_path / "ckpt.pt"), tmp_path / "out")
    held = open_checkpoint(tmp_path / "out", reduced=True)
    name = "transformer.h.0.attn.c_attn.weight"
    assert torch.equal(held.read(name), source.state[name].T)
    assert held.config["dtype"] == str(dtype).removeprefix("torch.")


def test_a_tokenizer_goes_along(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer/config.json").write_text('{"model_type": "llama"}')
    result = import_nanogpt(made().save(tmp_path / "ckpt.pt"), tmp_path / "out", tmp_path / "tokenizer")
    assert result["tokenizer"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Once")["input_ids"] == tiny_tokenizer()("Once")["input_ids"]
    assert imported(tmp_path / "out").config.model_type == "gpt2"


# Bad input: one clear error, nothing written. Checkpoints of other code: test_nanogpt_relatives.py


def refused(tmp_path, source, kind, match, **more):
    path = source if not isinstance(source, Made) else source.save(tmp_path / "ckpt.pt", **more)
    with pytest.raises(kind, match=match):
        import_nanogpt(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "ckpt.pt"] == []


class Evil:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize("place", ["model", "optimizer"])
def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(place, tmp_path, capfd):
    source = made()
    if place == "model":
        source.state["transformer.evil"] = Evil()
    refused(
        tmp_path,
        source,
        CheckpointError,
        r"more than tensors and plain containers \((builtins\.)?print\)",
        optimizer=Evil(),
    )
    assert "this ran" not in capfd.readouterr().out


def test_an_old_pickle_is_not_run_either(tmp_path, capfd):
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps({"model": Evil()}))
    refused(tmp_path, tmp_path / "ckpt.pt", CheckpointError, r"ckpt\.pt")
    assert "this ran" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "changes, kind, match",
    [
        (dict(query_mode="residual_gelu"), UnsupportedArchitecture, "residual_gelu.*not linear"),
        (dict(query_mode="routed"), UnsupportedArchitecture, "unknown query_mode 'routed'; known: original, identity"),
        (dict(query_mode=["identity"]), UnsupportedArchitecture, "unknown query_mode"),
        (dict(n_layer=0), CheckpointError, "model_args: n_layer must be a positive whole number, got 0"),
        (dict(n_layer=10**6), CheckpointError, "n_layer 1000000 is beyond any model"),
        (dict(n_layer=3), CheckpointError, r"missing, first transformer\.h\.2\."),
        (dict(n_layer=1), CheckpointError, r"no place.*transformer\.h\.1\."),
        (dict(num_heads=5), CheckpointError, "n_embd 32 is not a multiple of num_heads 5"),
        (dict(n_embd="32"), CheckpointError, "n_embd must be a positive whole number, got '32'"),
        (dict(n_embd=64), CheckpointError, r"wte\.weight has shape \(320, 32\), model_args .* \(320, 64\)"),
        (dict(block_size=25), CheckpointError, r"wpe\.weight has shape \(24, 32\)"),
        (dict(mlp_hidden_size=48), CheckpointError, r"mlp\.c_fc\.weight has shape \(40, 32\)"),
        (dict(query_mode="identity"), CheckpointError, r"c_attn\.weight has shape \(96, 32\).*'identity'.*\(64, 32\)"),
        (dict(bias=False), CheckpointError, r"no place.*bias"),
        (dict(bias="yes"), CheckpointError, "bias must be true or false"),
        (dict(tie_weights=False, vocab_size=321), CheckpointError, r"wte\.weight has shape"),
        (dict(scale=0.0), CheckpointError, "scale must be a number from 1e-12 to below 1e\\+06, got 0.0"),
        (dict(scale=10**400), CheckpointError, "scale must be a number"),
        (dict(dropout=-0.5), CheckpointError, "dropout must be a number from 0 to below 1, got -0.5"),
        (dict(scale=math.nan), CheckpointError, "scale must be a number"),
        (dict(dropout="x"), CheckpointError, "dropout must be a number"),
    ],
    ids=str,
)
def test_model_args_that_disagree_are_refused(changes, kind, match, tmp_path):
    source = made()
    refused(tmp_path, replace(source, args={**source.args, **changes}), kind, match)


@pytest.mark.parametrize("name", list(made().state))
def test_a_missing_tensor_is_named(name, tmp_path):
    source = made(tie_weights=False)
    del source.state[name]
    refused(tmp_path, source, CheckpointError, f"missing, first {name}")


def test_tensors_that_no_model_can_use(tmp_path):
    source = made()
    name = "transformer.h.1.mlp.c_proj.weight"
    good = source.state[name]
    source.state[name] = good.clone().index_put_((torch.tensor(3), torch.tensor(4)), torch.tensor(math.nan))
    refused(tmp_path, source, NonFiniteError, f"{name} holds NaN or Inf")
    source.state[name] = good.int()
    refused(tmp_path, source, CheckpointError, "stored as torch.int32")
    source.state[name] = good
    source.state["lm_head.weight"] = source.state["transformer.wte.weight"] + 1
    refused(tmp_path, source, CheckpointError, "tie_weights, but lm_head.weight is not")
    source.state = {"transformer.wte.weight": [1.0]}
    refused(tmp_path, source, CheckpointError, "is not a plain tensor")


@pytest.mark.parametrize("content", [{"model": {}}, {"model_args": {}}, [1, 2], {"model": [], "model_args": {}}])
def test_other_pickles(content, tmp_path):
    torch.save(content, tmp_path / "ckpt.pt")
    refused(tmp_path, tmp_path / "ckpt.pt", CheckpointError, "not a nanoGPT checkpoint")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello", b"\x80\x02."])
def test_files_that_are_no_pickles(content, tmp_path):
    (tmp_path / "ckpt.pt").write_bytes(content)
    refused(tmp_path, tmp_path / "ckpt.pt", CheckpointError, r"ckpt\.pt")


def test_no_such_file(tmp_path):
    refused(tmp_path, tmp_path / "missing.pt", CheckpointError, r"no file .*missing\.pt")


def test_an_existing_folder_is_kept(tmp_path):
    path = made().save(tmp_path / "ckpt.pt")
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        import_nanogpt(path, tmp_path / "out")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 10**6), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_or_read_whole(tmp_path, place, value, cut):
    path = tmp_path / "ckpt.pt"
    if not (tmp_path / "whole.pt").exists():
        made(n_layer=1).save(tmp_path / "whole.pt")
    data = bytearray((tmp_path / "whole.pt").read_bytes())
    place %= len(data)
    if cut:
        data = data[:place]
    else:
        data[place] = value
    path.write_bytes(data)
    try:
        import_nanogpt(path, tmp_path / f"out-{place}-{value}-{cut}")
    except QectomyError:
        return
    assert not cut


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(96, 32),  # of any size, in a few bytes
        torch.eye(96, 32).to_sparse(),
        torch.empty(96, 32, device="meta"),
        torch.nested.nested_tensor([torch.zeros(32)]),
    ],
    ids=["stride-0", "sparse", "meta", "nested"],
)
def test_tensors_that_are_not_what_they_seem(tensor, tmp_path):
    source = made()
    source.state["transformer.h.0.attn.c_attn.weight"] = tensor
    refused(
        tmp_path, source, CheckpointError, r"c_attn\.weight'\] is not a plain tensor|is not a checkpoint of tensors"
    )


def test_a_nan_in_a_tied_embedding_is_called_one(tmp_path):
    source = made()
    source.state["transformer.wte.weight"][3, 4] = math.nan
    refused(tmp_path, source, NonFiniteError, r"wte\.weight holds NaN or Inf")
