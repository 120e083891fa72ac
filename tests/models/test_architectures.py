"""The shapes a family promises are those of the classes that run it, stock and reduced."""

import pytest
import torch
from tiny_models import EVERY_MAP, SHAPES, resolve, tiny_model

from qectomy.checkpoint.checkpoint import expected_layer, expected_tensors
from qectomy.checkpoint.config_files import load_config
from qectomy.errors import CheckpointError, UnsupportedArchitecture
from qectomy.models.architectures import FAMILIES, QK_NORM_TYPES, find_family, find_reduced_family
from qectomy.models.query_maps import QueryMapSpec, parse_query_map


def family_and_config(name, **overrides):
    model_type, _, _, options = resolve(name, **overrides)
    raw = {"model_type": model_type, **options}
    return find_family(raw), raw


def state_shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def without_tied_head(shapes, family, dims):
    return {name: shape for name, shape in shapes.items() if not (dims.tied and name == family.head)}


@pytest.mark.parametrize("name", SHAPES)
def test_stock_shapes(name):
    family, raw = family_and_config(name)
    dims = family.dimensions(raw)
    with torch.device("meta"):
        model = family.causal_class()(load_config(family, raw))
    promised = dict(family.outer_shapes(dims))
    for layer in range(dims.n_layers):
        promised |= {
            family.prefix(layer) + key: shape for key, shape in family.layer_shapes(dims, QueryMapSpec("dense")).items()
        }
    assert promised == without_tied_head(state_shapes(model), family, dims)
    assert promised == expected_tensors(family, dims, (QueryMapSpec("dense"),) * dims.n_layers)


@pytest.mark.parametrize("query_map", EVERY_MAP)
@pytest.mark.parametrize("name", SHAPES)
def test_reduced_shapes(name, query_map):
    family, raw = family_and_config(name)
    dims = family.dimensions(raw)
    recipe = (parse_query_map(query_map), QueryMapSpec("dense"))
    with torch.device("meta"):
        config = load_config(family, {**raw, "query_maps": [str(spec) for spec in recipe]}, reduced=True)
        model = family.causal_class(reduced=True)(config)
    assert expected_tensors(family, dims, recipe) == without_tied_head(state_shapes(model), family, dims)
    if query_map != "dense":
        gone = set(family.layer_shapes(dims, QueryMapSpec("dense"))) - set(expected_layer(family, dims, recipe[0]))
        llama = {f"self_attn.q_proj.{kind}" for kind in ("weight", "bias")[: 1 + dims.attention_bias]}
        assert gone == (llama if dims.rope else {"attn.c_attn.bias"})


def test_parameters_of_query_modules():
    """parameters() counts every number the module holds, indices included."""
    for name in ("llama", "mqa", "biases", "wide-heads", "narrow-heads", "mistral", "qwen2", "gpt2"):
        family, raw = family_and_config(name, num_hidden_layers=len(EVERY_MAP))
        dims = family.dimensions(raw)
        config = load_config(family, {**raw, "query_maps": list(EVERY_MAP)}, reduced=True)
        for layer, query_map in enumerate(EVERY_MAP):
            made, roles = family.reduced_layer(config, layer), family.roles
            dense = query_map == "dense"
            module = made.get_submodule(roles.query.module if dense else roles.query_map)
            held = sum(tensor.numel() for tensor in module.state_dict().values())
            if dense:
                held //= roles.query.part[1]
            assert parse_query_map(query_map).parameters(dims) == held, (name, query_map)


@pytest.mark.parametrize("name", ["llama", "wide-heads", "mistral", "qwen2"])
def test_one_layer_runs_as_in_the_whole_model(name):
    """stock_layer, rotary and norm, put together by hand, give the stock model's own hidden states."""
    family, raw = family_and_config(name)
    model = tiny_model(name)
    config = model.config
    layer, norm = family.stock_layer(config, 0), family.norm(config)
    layer.load_state_dict(model.model.layers[0].state_dict())
    norm.load_state_dict(model.model.norm.state_dict())
    positions = torch.arange(4)[None]  # shorter than the sliding window
    hidden = model.model.embed_tokens(torch.tensor([[5, 6, 7, 8]]))
    mask = torch.full((4, 4), -torch.inf).triu(1)[None, None]
    layer.self_attn.config._attn_implementation = "eager"
    out = layer(hidden, attention_mask=mask, position_embeddings=family.rotary(config)(hidden, positions))
    out = out[0] if isinstance(out, tuple) else out
    whole = model.model(torch.tensor([[5, 6, 7, 8]]), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm(whole), model.model.norm(whole))
    windows = [None if name == "qwen2" else raw.get("sliding_window"), raw.get("sliding_window")]
    assert [family.sliding_window(config, layer) for layer in range(2)] == windows


@pytest.mark.parametrize("name", ["gpt2", "gpt2-inverse"])
def test_one_layer_of_gpt2_runs_as_in_the_whole_model(name):
    """Its layers know their own number, which may be part of the scale; positions come with the embedding."""
    family, _ = family_and_config(name)
    model, ids = tiny_model(name), torch.tensor([[5, 6, 7, 8]])
    config, body = model.config, model.transformer
    config._attn_implementation = "eager"
    mask = torch.full((4, 4), -torch.inf).triu(1)[None, None]
    states = body(ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(body.wte(ids) + body.wpe(torch.arange(4)), states[0])
    norm = family.norm(config)
    norm.load_state_dict(body.ln_f.state_dict())
    hidden = states[0]
    for i in range(2):
        layer = family.stock_layer(config, i).eval()
        layer.load_state_dict(body.h[i].state_dict())
        hidden = layer(hidden, attention_mask=mask)
    torch.testing.assert_close(norm(hidden), states[2], rtol=1e-5, atol=1e-5)  # the last is after the final norm
    assert family.rotary(config) is None
    assert family.sliding_window(config, 0) is None


def test_apply_rotary_turns_pairs_of_channels():
    """Channel i and i + K/2 of head h at position t are turned by the angle t θ_i."""
    family, raw = family_and_config("llama")
    config = load_config(family, raw)
    heads = torch.randn(2, 4, 7, 8, generator=torch.Generator().manual_seed(0))  # (B, H, T, K)
    cos, sin = family.rotary(config)(heads, torch.arange(7)[None])
    turned = family.apply_rotary(heads, cos, sin)
    for t in range(7):
        for i in range(4):
            angle = torch.tensor(t * 10000.0 ** (-2 * i / 8))
            x, y = heads[:, :, t, i], heads[:, :, t, i + 4]
            torch.testing.assert_close(turned[:, :, t, i], x * angle.cos() - y * angle.sin(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(turned[:, :, t, i + 4], x * angle.sin() + y * angle.cos(), rtol=1e-5, atol=1e-5)


def test_unknown_type_lists_the_known():
    for model_type in ("gpt_neox", None, 7, ["llama"]):
        with pytest.raises(
            UnsupportedArchitecture, match="is not supported; supported types: gpt2, llama, mistral, qwen2"
        ):
            find_family({"model_type": model_type})
    with pytest.raises(UnsupportedArchitecture, match="model_type None"):
        find_family({})


@pytest.mark.parametrize("model_type", QK_NORM_TYPES)
def test_qk_norm_is_refused(model_type):
    with pytest.raises(
        UnsupportedArchitecture, match=f"{model_type}.*QK-norm.*Supported types: gpt2, llama, mistral, qwen2"
    ):
        find_family({"model_type": model_type})


@pytest.mark.parametrize("model_type", FAMILIES)
def test_already_reduced_is_refused(model_type):
    with pytest.raises(UnsupportedArchitecture, match=r"already reduced.*qectomy materialize"):
        find_family({"model_type": f"qectomy_{model_type}"})
    assert find_reduced_family({"model_type": f"qectomy_{model_type}"}) is FAMILIES[model_type]
    with pytest.raises(UnsupportedArchitecture, match=r"not a checkpoint that qectomy reduced.*qectomy_llama"):
        find_reduced_family({"model_type": model_type})


@pytest.mark.parametrize(
    "field, value",
    [
        *[(field, value) for field in ("hidden_size", "vocab_size") for value in (0, -1, 2**31, 1e3, "32", None, [])],
        ("num_attention_heads", 0),
        ("num_attention_heads", True),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", 10**30),
        ("head_dim", 7),
        ("head_dim", 0),
        ("num_attention_heads", 64),  # d_model // n_heads is 0
        ("intermediate_size", float("nan")),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
    ],
)
def test_absurd_sizes_are_named(field, value):
    family, raw = family_and_config("llama")
    with pytest.raises(CheckpointError, match=r"config.json: ") as error:
        family.dimensions({**raw, field: value})
    named = {"num_attention_heads": ("num_attention_heads", "head_dim")}.get(field, (field,))
    assert any(name in str(error.value) for name in named)


@pytest.mark.parametrize(
    "field, value",
    [
        *[(field, value) for field in ("n_embd", "n_head", "n_layer", "n_inner") for value in (0, -1, 2**31, "32", [])],
        ("vocab_size", 0),
        ("n_positions", 0),
        ("n_head", 3),  # 32 channels
        ("tie_word_embeddings", "yes"),
        ("add_cross_attention", 1),
    ],
)
def test_absurd_sizes_of_gpt2_are_named(field, value):
    family, raw = family_and_config("gpt2")
    with pytest.raises(CheckpointError, match=rf"config.json: .*{field}"):
        family.dimensions({**raw, field: value})


def test_heads_that_do_not_divide_the_width_are_refused():
    family, raw = family_and_config("gpt2")
    with pytest.raises(CheckpointError, match="n_embd 32 is not a multiple of n_head 5"):
        family.dimensions({**raw, "n_head": 5})
    assert family.dimensions({**raw, "n_head": 8}).d_head == 4


def test_cross_attention_is_refused():
    family, raw = family_and_config("gpt2")
    with pytest.raises(UnsupportedArchitecture, match=r"cross-attention \(add_cross_attention\)"):
        family.dimensions({**raw, "add_cross_attention": True})
    assert family.dimensions({**raw, "add_cross_attention": False}) == family.dimensions(raw)


def test_defaults_of_gpt2_are_those_of_transformers():
    """The hub's first GPT-2 names few of its fields: the rest are those of GPT2Config."""
    family = FAMILIES["gpt2"]
    dims, config = family.dimensions({"model_type": "gpt2"}), load_config(family, {"model_type": "gpt2"})
    assert (dims.n_layers, dims.d_model, dims.n_heads) == (config.n_layer, config.n_embd, config.n_head)
    assert (dims.vocab_size, dims.n_positions, dims.tied) == (config.vocab_size, config.n_positions, True)
    assert (dims.d_mlp, dims.d_head, dims.n_kv_heads) == (4 * config.n_embd, 64, config.n_head)
    with torch.device("meta"):
        held = state_shapes(family.causal_class()(config))
    assert expected_tensors(family, dims, (QueryMapSpec("dense"),) * 12) == without_tied_head(held, family, dims)


@pytest.mark.parametrize("scale", [0, -1.0, float("inf"), float("nan"), "half", [1.0]])
def test_a_softmax_scale_that_is_none_is_refused(scale):
    family, raw = family_and_config("gpt2")
    with pytest.raises(CheckpointError, match=r"config.json is not a valid gpt2 config: .*softmax_scale"):
        load_config(family, {**raw, "softmax_scale": scale}, reduced=True)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_names_without_the_base_models_prefix(name):
    """Files saved from a base model leave it out (OpenAI's own GPT-2 does), and wrappers double it."""
    family, raw = family_and_config(name, tie_word_embeddings=False)
    full = list(expected_tensors(family, family.dimensions(raw), (QueryMapSpec("dense"),) * 2))
    assert family.full_names(full, full) == {each: each for each in full}
    for stored in (
        [each.removeprefix(family.base_prefix) for each in full],
        [family.base_prefix + each for each in full],
    ):
        assert family.full_names(stored, full) == dict(zip(full, stored, strict=True))
        mixed = [one if at % 2 else other for at, (one, other) in enumerate(zip(full, stored, strict=True))]
        assert family.full_names(mixed, full) == dict(zip(full, mixed, strict=True))
    twice = [*full, family.embedding.removeprefix(family.base_prefix)]
    with pytest.raises(CheckpointError, match=f"are two of the model's {family.embedding}"):
        family.full_names(twice, full)
