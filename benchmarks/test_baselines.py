"""The baselines on a tiny scrambled model: each must be what it claims to be, or the comparison is unfair.

python -m pytest benchmarks
"""

import copy
from types import SimpleNamespace

import baselines
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from qectomy.eval.protocol import ScoringWindows
from qectomy.models.architectures import FAMILIES
from qectomy.record.texts import TextProtocol

FAMILY = FAMILIES["llama"]
D_MODEL, N_LAYERS, CONTEXT = 32, 4, 16


@pytest.fixture(scope="module")
def model():
    """Return a grouped-query Llama in float64 whose every parameter is scrambled."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=97,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2 + name.endswith("norm.weight"))
    return model


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (9, CONTEXT), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def windows(tokens):
    report = TextProtocol.model_construct(scored_bytes=1, scored_words=1)
    return ScoringWindows(tokens, torch.ones(len(tokens), dtype=torch.int64), report)


@pytest.fixture(scope="module")
def statistics(model, tokens):
    return baselines.layer_statistics(model, FAMILY, tokens)


def score(model, original, windows):
    before = baselines.measure("original", 0, original, original, windows, None).perplexity
    return baselines.measure("edited", 0, model, original, windows, before)


def reads_of(model, tokens, layer):
    """Return x̂ (N, D) of one layer, from the model's own list of hidden states."""
    stream = model(input_ids=tokens, output_hidden_states=True).hidden_states[layer]
    return model.model.layers[layer].input_layernorm(stream).flatten(0, 1)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_the_second_moment_is_that_of_what_w_q_reads(model, tokens, statistics, layer):
    x = reads_of(model, tokens, layer)
    torch.testing.assert_close(statistics[layer].second_moment, x.T @ x / len(x))


def test_influence_is_one_minus_the_cosine_of_input_and_output(model, tokens, statistics):
    hidden = model(input_ids=tokens, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):  # the last of the list has passed the final norm
        a, b = hidden[layer], hidden[layer + 1]
        expected = 1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
        assert statistics[layer].influence == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
def test_full_rank_changes_nothing_and_half_rank_does(model, windows, statistics, weighted):
    given = statistics if weighted else None
    for rank, unchanged in ((D_MODEL, True), (D_MODEL // 2, False)):
        edited = copy.deepcopy(model)
        baselines.truncate_queries_(edited, FAMILY, rank, given)
        for layer in edited.model.layers:
            assert int(torch.linalg.matrix_rank(layer.self_attn.q_proj.weight, rtol=1e-9)) == rank
        row = score(edited, model, windows)
        assert (row.ratio == pytest.approx(1, abs=1e-6)) is unchanged
        assert (row.kl == pytest.approx(0, abs=1e-6)) is unchanged


def test_plain_truncation_is_the_truncated_svd():
    W = torch.randn(24, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(baselines.truncate(W, 5), U[:, :5] @ torch.diag(S[:5]) @ Vh[:5])


def test_weighted_truncation_is_the_svd_of_the_whitened_matrix(model, tokens):
    """The textbook form, with C^½ inverted; and it beats the plain one where it should: on x̂ W_Q."""
    W = model.model.layers[1].self_attn.q_proj.weight.detach()
    x = reads_of(model, tokens, 1)
    C = x.T @ x / len(x)
    values, vectors = torch.linalg.eigh(C)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    U, S, Vh = torch.linalg.svd(W @ root)
    expected = U[:, :6] @ torch.diag(S[:6]) @ Vh[:6] @ torch.linalg.inv(root)
    found = baselines.truncate(W, 6, C)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert (x @ (W - found).T).norm() < 0.99 * (x @ (W - baselines.truncate(W, 6)).T).norm()


def test_a_layer_that_does_nothing_is_dropped_first_and_free_of_cost(model, tokens, windows):
    idle = copy.deepcopy(model)
    idle.model.layers[2].self_attn.o_proj.weight.zero_()
    idle.model.layers[2].mlp.down_proj.weight.zero_()
    statistics = baselines.layer_statistics(idle, FAMILY, tokens)
    assert baselines.least_influential(statistics, 1) == [2]
    edited = copy.deepcopy(idle)
    baselines.drop_layers_(edited, FAMILY, [2])
    assert len(edited.model.layers) == N_LAYERS - 1
    torch.testing.assert_close(
        edited(input_ids=tokens, use_cache=False).logits, idle(input_ids=tokens, use_cache=False).logits
    )
    assert score(edited, idle, windows).ratio == pytest.approx(1, abs=1e-9)
    baselines.drop_layers_(edited, FAMILY, [0])
    assert score(edited, idle, windows).ratio != pytest.approx(1, abs=1e-2)


def test_every_method_but_one_layer_fewer_removes_at_least_the_target(statistics):
    """The sizes of SmolLM2-135M: key-shared stores 9 mixes of 64 x 64 where W_Q was 576 x 576."""
    dims = SimpleNamespace(n_heads=9, d_head=64, d_model=576, n_layers=30)
    layer = [("all of it", SimpleNamespace(numel=3_540_096))]
    source = SimpleNamespace(family=FAMILY, dims=dims, layer_tensors=lambda _: layer)
    target = 30 * (576 * 576 - 9 * 64 * 64)
    names, removed, _ = zip(*baselines.plan_methods(source, statistics * 8, target), strict=True)
    assert names[:2] == ("SVD, rank 32", "weighted SVD, rank 32")
    assert [name[:13] for name in names[2:]] == ["drop 2 layers", "drop 3 layers"]
    assert removed == (8_847_360, 8_847_360, 7_080_192, 10_620_288)
    assert [count >= target for count in removed] == [True, True, False, True]
