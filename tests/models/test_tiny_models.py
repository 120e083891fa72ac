"""The test models themselves: nothing at its default, and attention that depends on the queries."""

import pytest
import torch
from tiny_models import (
    EVERY_MAP,
    GPT2_SHAPES,
    RAVEN,
    ROPES,
    SHAPES,
    VOCAB_SIZE,
    load_reduced,
    tiny_model,
    tiny_tokenizer,
    tokens,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_is_scrambled(name):
    for key, parameter in tiny_model(name).named_parameters():
        assert parameter.std() > 0.05, key
        assert not torch.isin(parameter, torch.tensor([0.0, 1.0])).any(), key


@pytest.mark.parametrize("name", SHAPES)
def test_queries_matter(name):
    model, ids = tiny_model(name), tokens()
    with torch.no_grad():
        before = model(ids).logits
        if name in GPT2_SHAPES:
            model.transformer.h[0].attn.c_attn.weight[:, 0] *= 1.1
        else:
            model.model.layers[0].self_attn.q_proj.weight[0] *= 1.1
        after = model(ids).logits
    assert before.isfinite().all()
    assert (after - before).abs().max() > 1e-4 * before.abs().max()


def test_every_rope_type_is_there():
    # axial is for images: two coordinates a position
    assert set(ROPES) == {"default", *ROPE_INIT_FUNCTIONS} - {"axial"}


def test_the_tokenizer_encodes_any_text():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE
    for text in (RAVEN, "naïve Θ\t\x00"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_reduced_folders_load(tiny_reduced):
    model = load_reduced(tiny_reduced(EVERY_MAP))
    assert model(tokens()).logits.isfinite().all()
