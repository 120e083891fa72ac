"""The reduced models at work: caches, padding, several sequences at once; every family alike."""

import inspect
import sys

import pytest
import torch
import transformers
from foldings import fold
from tiny_models import EVERY_MAP, GPT2_SHAPES, load_reduced, tokens
from transformers import AutoModelForCausalLM, GenerationConfig, StaticCache

from qectomy.eval.layerwise_model import cache_keyword


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    "name",
    ["llama", "biases", "mistral", "rope-dynamic", "rope-longrope"]
    + [name for name in GPT2_SHAPES if name not in ("gpt2-bf16", "gpt2-sharded")],
)
def test_cache_gives_the_same_text(tiny_reduced, name):
    model = load_reduced(tiny_reduced(EVERY_MAP, name), torch.float64)
    options = dict(max_new_tokens=20, min_new_tokens=20, do_sample=False)
    ids = tokens(2, 9)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **options)
    cached = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **options)
    assert plain.shape == (2, 29)
    assert torch.equal(plain, cached)
    assert torch.equal(plain[:, 9], model(ids).logits[:, -1].argmax(-1)) or plain[0, 9] != model.config.eos_token_id
    if name in ("rope-dynamic", "rope-longrope"):
        return  # their frequencies depend on the length that is seen
    with torch.no_grad():  # and the same logits, a few tokens at a time
        whole = model(plain).logits
        first = model(plain[:, :11], use_cache=True)
        second = model(plain[:, 11:], **{cache_keyword(model): first.past_key_values}).logits
        assert relative(torch.cat([first.logits, second], 1), whole) < 1e-12
        assert relative(model(plain[:, 11:]).logits, whole[:, 11:]) > 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2"])
@pytest.mark.parametrize("query", ["identity", "select", "key-shared", "low-rank:3", "dense", "exact"])
def test_cached_text_of_a_padded_batch_is_the_uncached_one(
    tiny_reduced, tiny_checkpoint, tmp_path, monkeypatch, name, query
):
    """As anybody loads and runs it, for each family and map; CI runs this with several versions of transformers."""
    if query == "exact":
        fold(tiny_checkpoint(name), folder := tmp_path / "exact")
    else:
        folder = tiny_reduced((query, query), name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = tokens(2, 9)
    ids[1, :4] = 2
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    options = dict(attention_mask=mask, max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=2)
    options |= dict(output_logits=True, return_dict_in_generate=True)

    def written(**changed):
        found = model.generate(ids, **{**options, **changed})
        return found.sequences, torch.stack(found.logits)

    (plain, expected), (cached, logits) = written(use_cache=False), written()
    assert plain.shape == (2, 41)
    assert torch.equal(plain, cached)
    assert relative(logits, expected) < 1e-6  # RMSNorm computes in float32
    assert relative(written(attention_mask=torch.ones_like(mask))[1][:, 1], logits[:, 1]) > 1e-4
    monkeypatch.setattr(sys.modules[type(model).__module__], "take_cache", lambda named, given=None: (None, {}))
    if name != "mistral":  # where a window's mask may not fit the keys that are there
        assert relative(written()[1], logits) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_static_cache(tiny_reduced, name):
    model = load_reduced(tiny_reduced(EVERY_MAP, name), torch.float64)
    options = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=2, eos_token_id=None)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    plain = model.generate(ids, attention_mask=mask, generation_config=options, use_cache=False)
    cache = StaticCache(config=model.config, max_cache_len=32)
    static = model.generate(ids, attention_mask=mask, generation_config=options, **{cache_keyword(model): cache})
    assert plain.shape == (2, 21)
    assert torch.equal(plain, static)


@pytest.mark.parametrize("name", ["llama", "gpt2-untied"])
def test_requests_that_are_served_together(tiny_reduced, name):
    """transformers' continuous batching, with its paged cache, writes what each request gets alone."""
    settings = getattr(transformers, "ContinuousBatchingConfig", None)
    if settings is None or "page_size" not in inspect.signature(settings).parameters:
        pytest.skip("this transformers has no paged cache of a size that can be told")
    model = AutoModelForCausalLM.from_pretrained(tiny_reduced(("key-shared", "key-shared"), name))
    model.generation_config.eos_token_id = None
    options = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=2)
    requests = [tokens(1, length, length)[0].tolist() for length in (9, 5, 13)]
    # Without num_blocks the cache takes most of the memory that is free.
    bounded = settings(num_blocks=8, page_size=16, max_batch_tokens=32, use_cuda_graph=False, use_async_batching=False)
    served = model.generate_batch(requests, generation_config=options, continuous_batching_config=bounded, warmup=False)
    found = {tuple(answer.prompt_ids): answer.generated_tokens for answer in served.values()}
    for request in requests:
        ids = torch.tensor([request])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
        assert found[tuple(request)] == alone[0, len(request) :].tolist()
        assert len(found[tuple(request)]) == 12
    assert len({tuple(text) for text in found.values()}) == 3


@pytest.mark.parametrize("name", ["llama", "narrow-heads", "mistral", "qwen2", "gpt2", "gpt2-inverse"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_left_padding(tiny_reduced, name, attention):
    """Padded on the left and masked, each sequence of a batch has the logits it has alone, and goes on alike."""
    # Llama's eager attention takes its softmax in float32, where float64's mask value is -inf
    single = attention == "eager" and not name.startswith("gpt2")
    dtype, tolerance = (torch.float32, 1e-5) if single else (torch.float64, 1e-12)
    model = load_reduced(tiny_reduced(EVERY_MAP, name), dtype)
    model.set_attn_implementation(attention)
    ids = tokens(3, 12)
    lengths = (12, 7, 3)
    padded, mask = torch.full_like(ids, 2), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        padded[row, 12 - length :], mask[row, 12 - length :] = ids[row, :length], 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    text = model.generate(padded, attention_mask=mask, **options)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=positions).logits
        for row, length in enumerate(lengths):
            alone = ids[row : row + 1, :length]
            assert relative(logits[row, 12 - length :], model(alone).logits[0]) < tolerance
            own = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
            assert torch.equal(text[row, 12:], own[0, length:])
        unmasked = model(padded, position_ids=positions).logits
    assert relative(unmasked[2, -1], logits[2, -1]) > 1e-3
