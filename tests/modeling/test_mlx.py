"""The file that mlx-lm runs, against the torch model of the same folder. Skipped where mlx-lm is not installed."""

import json
import shutil

import pytest
import torch
from foldings import fold, relative
from tiny_models import BASE, EVERY_MAP, LLAMA_SHAPES, ROPES, load_reduced, save_variant, tokens
from transformers import AutoModelForCausalLM

import qectomy
from qectomy.checkpoint.config_files import model_files
from qectomy.models.architectures import FAMILIES

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
mlx_lm_utils = pytest.importorskip("mlx_lm.utils")
from mlx.utils import tree_flatten  # noqa: E402
from mlx_lm.generate import generate_step  # noqa: E402
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache  # noqa: E402

qectomy.register()
SMALL = 1e-4  # float32, relative to the largest logit; torch and mlx sum in other orders, some 1e-5 after four layers
LENGTH = 70  # beyond every sliding window and RoPE's original length
SHAPES = [name for name in LLAMA_SHAPES if name not in ("bf16", "fp16", "sharded", "rope-longrope")]


def load(folder):
    """The model as mlx-lm loads it, and the config that it would save."""
    return mlx_lm_utils.load_model(folder, trust_remote_code=True)


def logits(model, ids, cache=None):
    return torch.tensor(model(mx.array(ids.numpy()), cache=cache).astype(mx.float32).tolist())


def torch_logits(folder, ids):
    with torch.no_grad():
        return load_reduced(folder)(ids).logits


def edited(folder, out, **fields):
    shutil.copytree(folder, out)
    (out / "config.json").write_text(json.dumps(json.loads((out / "config.json").read_text()) | fields))
    return out


@pytest.mark.parametrize("query_map", EVERY_MAP)
@pytest.mark.parametrize("name", ["llama", "mha", "mqa", "biases", "wide-heads", "narrow-heads", "mistral"])
def test_every_map_gives_the_logits_of_torch(tiny_reduced, name, query_map):
    folder, ids = tiny_reduced((query_map, "dense"), name), tokens(2, LENGTH)
    model, expected = load(folder)[0], torch_logits(folder, ids)
    assert relative(logits(model, ids), expected) < SMALL
    for parameter in ("k_proj", "v_proj", "o_proj"):
        projection = getattr(model.layers[0].self_attn, parameter)
        projection.weight = projection.weight * 1.01
        assert relative(logits(model, ids), expected) > 10 * SMALL
        projection.weight = projection.weight / 1.01
    if query_map not in ("identity", "dense"):  # and what stands in W_Q's place is used
        query = model.layers[0].self_attn.query
        stored = {"select": "index", "key-shared": "mix", "low-rank:3": "up"}[query_map]
        setattr(query, stored, query[stored][::-1])
        assert relative(logits(model, ids), expected) > 10 * SMALL


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_gives_the_logits_of_torch(tiny_reduced, name):
    """Mixed recipes, tied heads, biases, windows, RoPE types; read whole, and step by step with mlx-lm's own cache."""
    folder = tiny_reduced(("select", "key-shared", "low-rank:3", "identity"), name)
    ids = tokens(2, BASE["max_position_embeddings"] + 12 if name == "rope-dynamic" else LENGTH)
    model, _ = load(folder)
    whole = logits(model, ids)
    assert relative(whole, torch_logits(folder, ids)) < SMALL
    if name == "rope-dynamic":  # its keys are turned anew beyond the length that it was made for
        ids, whole = ids[:, :LENGTH], logits(model, ids[:, :LENGTH])
    cache = make_prompt_cache(model)
    steps = [logits(model, ids[:, start:end], cache) for start, end in ((0, 7), (7, 20))]
    steps += [logits(model, ids[:, at : at + 1], cache) for at in range(20, ids.shape[1])]
    assert relative(torch.cat(steps, 1), whole) < SMALL
    lost = [logits(model, ids[:, at : at + 1]) for at in range(20, ids.shape[1])]
    assert relative(torch.cat(lost, 1), whole[:, 20:]) > 100 * SMALL


def test_rows_of_a_padded_batch_do_not_see_the_padding(tiny_reduced):
    """mlx-lm serves several requests at once, padded on the left; each row has its own offset."""
    model, ids = load(tiny_reduced(("key-shared", "select")))[0], tokens(2, 12)
    ids[0, :4] = 2
    cache = [BatchKVCache([4, 0]) for _ in model.layers]
    steps = [logits(model, ids[:, :9], cache)]
    steps += [logits(model, ids[:, at : at + 1], cache) for at in range(9, 12)]
    padded = torch.cat(steps, 1)
    assert relative(padded[:1, 4:], logits(model, ids[:1, 4:])) < SMALL
    assert relative(padded[1:], logits(model, ids[1:])) < SMALL


@pytest.mark.parametrize("query_map", EVERY_MAP)
def test_greedy_tokens_are_those_of_transformers(tiny_reduced, query_map):
    folder, ids = tiny_reduced((query_map, query_map, "dense")), tokens(1, 9)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)[0, 9:]
    found = [int(token) for token, _ in generate_step(mx.array(ids[0].numpy()), load(folder)[0], max_tokens=32)]
    assert found == expected.tolist()


@pytest.mark.parametrize("name", ["llama", "attention-bias"])
def test_gauged_values_are_written_out(tiny_checkpoint, tmp_path, name):
    fold(tiny_checkpoint(name), tmp_path / "exact")
    config, ids = json.loads((tmp_path / "exact/config.json").read_text()), tokens(2, LENGTH)
    assert config["value_maps"] == ["gauge", "gauge"]
    model, saved = load(tmp_path / "exact")
    assert relative(logits(model, ids), torch_logits(tmp_path / "exact", ids)) < SMALL
    assert model.layers[0].self_attn.v_proj.weight.shape == (16, 32)
    assert "value_maps" not in saved
    weights = mx.load(str(tmp_path / "exact/model.safetensors"))
    pivots = "model.layers.0.self_attn.v_proj.pivots"
    with pytest.raises(ValueError, match=r"layer 0: the channel numbers in the files .* index_sha256 tells of"):
        model.sanitize({**weights, pivots: weights[pivots][:, ::-1]})
    assert saved["index_sha256"] == [None, None]
    model.args.index_sha256 = None
    wrong = model.sanitize({**weights, pivots: weights[pivots][:, ::-1]})
    model.load_weights(list(wrong.items()))
    assert relative(logits(model, ids), torch_logits(tmp_path / "exact", ids)) > 10 * SMALL
    for bad in (weights[pivots] * 0, weights[pivots] + 32, weights[pivots].astype(mx.float32)):
        with pytest.raises(ValueError, match=rf"{pivots} must (name 8 different|hold) channel"):
            model.sanitize({**weights, pivots: bad})


@pytest.mark.parametrize("kind", ["key-shared", "exact", "select", "low-rank:3"])
def test_quantised_folders_load_again(tiny_checkpoint, tiny_reduced, tmp_path, kind):
    """`mlx_lm.convert -q`: the projections and the embedding are packed, what replaced W_Q is not; also unquantised."""
    sizes = dict(hidden_size=64, intermediate_size=96)
    folder = tmp_path / "reduced"
    if kind == "exact":
        fold(tiny_checkpoint(**sizes), folder)
    else:
        folder = tiny_reduced((kind, "dense"), **sizes)
    ids, mlx_convert = tokens(2, LENGTH), pytest.importorskip("mlx_lm.convert").convert
    expected = torch_logits(folder, ids)
    for bits in (None, 8):
        out = tmp_path / f"bits-{bits}"
        mlx_convert(
            str(folder), str(out), quantize=bits is not None, q_bits=bits, q_group_size=32, trust_remote_code=True
        )
        model, _ = load(out)
        error = relative(logits(model, ids), expected)
        assert error < SMALL if bits is None else SMALL < error < 0.1
        packed = {name.rpartition(".")[0] for name, _ in tree_flatten(model.parameters()) if name.endswith(".scales")}
        queries = {name: array for name, array in tree_flatten(model.parameters()) if ".query." in name}
        weights = mx.load(str(folder / "model.safetensors"))
        assert set(queries) == {name for name in weights if ".query." in name}
        assert all(mx.array_equal(array, weights[name]) for name, array in queries.items())
        if bits:
            kept = {n.rpartition(".")[0] for n, a in tree_flatten(model.parameters()) if a.ndim > 1} - packed
            assert kept <= {name.rpartition(".")[0] for name in queries}
            assert "model.embed_tokens" in packed
        else:  # transformers reads what mlx-lm wrote
            again = AutoModelForCausalLM.from_pretrained(out)
            with torch.no_grad():
                assert relative(again(ids).logits, expected) < SMALL


REFUSED = {
    "norms": (dict(norms=False), "norms is False: mlx-lm cannot run this model, transformers can"),
    "attention_skip": (dict(attention_skip=False), "attention_skip is False"),
    "mlp_skip": (dict(mlp_skip=False), "mlp_skip is False"),
    "shared_layers": (dict(shared_layers=True), "shared_layers is True"),
    "merged": (dict(output_maps=["merged", "dense"]), "output_maps: mlx-lm cannot run a model with merged W_O"),
    "hidden_act": (dict(hidden_act="relu"), "hidden_act is 'relu'"),
    "unknown map": (dict(query_maps=["dense", "gauge"]), "layer 1: unknown query map 'gauge'; known: identity, select"),
    "too few maps": (dict(query_maps=["dense"]), "query_maps names 1 layers, the model has 2"),
    "a word": (dict(query_maps="ab"), "query_maps must be a list with a name for each layer, not 'ab'"),
    "value_maps": (dict(value_maps=["dense", "x"]), "value_maps: unknown 'x'; known: dense, gauge"),
    "too few values": (dict(value_maps=["dense"]), "value_maps names 1 layers, the model has 2"),
    "model_type": (dict(model_type="llama"), "model_type 'llama'; this file runs qectomy_llama and qectomy_mistral"),
    "longrope": (dict(rope_parameters=ROPES["longrope"]), "rope_type 'longrope': mlx-lm does not compute it as"),
    "unknown rope": (dict(rope_scaling=dict(type="mrope")), "rope_type 'mrope': mlx-lm does not compute it as"),
    "rope field": (
        dict(rope_parameters=ROPES["yarn"] | dict(attention_factor=1.3)),
        "rope_type 'yarn' with attention_factor: mlx-lm does not compute it as transformers does",
    ),
    "odd rope": (
        dict(head_dim=6, rope_parameters=ROPES["proportional"]),
        "partial_rotary_factor times head_dim must be even",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_it_cannot_run_is_refused_by_name(tiny_reduced, tmp_path, case):
    fields, message = case
    folder = edited(tiny_reduced(("key-shared", "dense")), tmp_path / "edited", **fields)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_variant_s_own_folder_is_refused(tmp_path):
    folder = save_variant(tmp_path / "variant", "llama", dtype="float32", norms=False, mlp_skip=False)
    source = model_files(FAMILIES["llama"])[1]
    shutil.copyfile(source, folder / source.name)
    with pytest.raises(ValueError, match="norms is False"):
        load(edited(folder, tmp_path / "named", model_file=source.name))


def test_channel_numbers_that_name_no_channel_are_refused(tiny_reduced):
    """mlx reads beyond an array's end without a word."""
    folder = tiny_reduced(("select", "dense"))
    model, weights = load(folder)[0], mx.load(str(folder / "model.safetensors"))
    index = "model.layers.0.self_attn.query.index"
    for bad in (weights[index] + 32, weights[index] - 32, weights[index].astype(mx.float32)):
        with pytest.raises(ValueError, match=f"{index} must hold channel numbers from 0 to 31"):
            model.sanitize({**weights, index: bad})


def test_channel_numbers_that_the_config_does_not_tell_of_are_refused(tiny_reduced, tmp_path, caplog):
    folder = tiny_reduced(("select", "dense"))
    out = edited(folder, tmp_path / "edited")
    weights = mx.load(str(folder / "model.safetensors"))
    index = "model.layers.0.self_attn.query.index"
    mx.save_safetensors(str(out / "model.safetensors"), {**weights, index: weights[index][::-1]}, {"format": "pt"})
    with pytest.raises(ValueError, match=r"layer 0: the channel numbers in the files .* index_sha256 tells of"):
        load(out)
    with caplog.at_level("WARNING"):
        load(edited(out, tmp_path / "untold", index_sha256=None))
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(
        "config.json has no index_sha256, so it is not known whether the channel numbers of layers 0 "
    )
    with pytest.raises(ValueError, match="index_sha256 tells of 1 layers, the model has 2"):
        load(edited(folder, tmp_path / "short", index_sha256=[None]))


def test_tensors_that_the_config_does_not_mean_are_refused(tiny_reduced, tmp_path):
    folder = tiny_reduced(("select", "dense"))
    with pytest.raises(ValueError, match=r"not in model:\s+model\.layers\.0\.self_attn\.query\.gain"):
        load(edited(folder, tmp_path / "edited", query_maps=["key-shared", "dense"]))
    with pytest.raises(ValueError, match="requires importing and running a custom module"):
        mlx_lm_utils.load_model(folder)
