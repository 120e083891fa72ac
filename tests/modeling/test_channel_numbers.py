"""When a model in memory is held against config.json's sha256 of its channel numbers, and when it cannot be."""

import shutil

import pytest
import torch
from damage import edit_json
from foldings import fold
from tiny_models import tokens
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

import qectomy

qectomy.register()
OTHER = r"layer 0: the channel numbers in memory .* not those that config.json's index_sha256 tells of"


@pytest.fixture(params=["llama", "gpt2"])
def folder(request, tiny_reduced):
    return tiny_reduced(("select", "key-shared"), request.param)


def drawn(folder):
    """The model as engines build it that load parameters alone: its channel numbers are no checkpoint's."""
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()


def test_a_state_that_is_loaded_after_a_pass_is_checked(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(tokens())
    state = model.state_dict()
    (index,) = (name for name in state if name.endswith("query.index"))
    model.load_state_dict({**state, index: state[index].flip(0)})
    with pytest.raises(ValueError, match=OTHER):
        model(tokens())
    model.load_state_dict({**state, index: state[index].flip(0)})  # back again
    model(tokens())


def test_a_state_of_part_of_the_model_is_checked(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    attention = model.reduced_attentions()[0]
    state = attention.state_dict()
    (index,) = (name for name in state if name.endswith("index"))
    attention.load_state_dict({**state, index: state[index].flip(0)}, assign=True)
    with pytest.raises(ValueError, match=OTHER):
        model(tokens())


@pytest.mark.parametrize("kind", ["reduced", "exact"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_they_can_be_checked_without_a_pass(tiny_reduced, tiny_checkpoint, tmp_path, name, kind):
    """A compiled model's passes look at none, so an engine that compiles asks first."""
    if kind == "exact":
        fold(tiny_checkpoint(name), folder := tmp_path / "exact")
    else:
        folder = tiny_reduced(("select", "key-shared"), name)
    model = drawn(folder)
    for part in (model, model.base_model):
        with pytest.raises(ValueError, match=OTHER):
            part.check_indices()
    AutoModelForCausalLM.from_pretrained(folder).check_indices()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("absent", [True, False])
def test_a_folder_that_tells_of_none_is_told_once(tiny_reduced, tmp_path, caplog, name, absent):
    """By its name; a model that is built from a config in memory has no numbers that could be others."""
    folder = shutil.copytree(tiny_reduced(("select", "select"), name), tmp_path / "untold")
    edit_json(folder / "config.json", lambda c: c.pop("index_sha256") if absent else c.update(index_sha256=None))
    with caplog.at_level("WARNING"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model(tokens())
    (told,) = [record.getMessage() for record in caplog.records if "index_sha256" in record.getMessage()]
    assert told.startswith(f"{folder}: config.json has no index_sha256, so it is not known whether the channel numbers")
    assert "`qectomy renew FOLDER` adds it" in told
    caplog.clear()
    config = type(model.config)(**{**model.config.to_dict(), "_name_or_path": ""})
    AutoModelForCausalLM.from_config(config)(tokens())
    AutoModelForCausalLM.from_pretrained(tiny_reduced(("select", "select"), name))(tokens())
    assert not caplog.records


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_numbers_without_values_are_not_checked(tiny_reduced, name):
    """Under a FakeTensorMode, with fake and with real tensors, and on the meta device; later they are."""
    folder = tiny_reduced(("select", "key-shared"), name)
    with FakeTensorMode():
        fake = drawn(folder)
        assert fake(tokens()).logits.shape == (2, 17, 320)
        fake.check_indices()
    fake.check_indices()
    model = drawn(folder)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model(tokens())
    with pytest.raises(ValueError, match=OTHER):
        model(tokens())
    with torch.device("meta"):
        drawn(folder).check_indices()
