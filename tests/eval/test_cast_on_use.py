"""Projections lie as they are stored and compute in a wider type, one at a time."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.eval.cast_on_use import cast_on_use, projections
from qectomy.eval.layerwise_model import StreamedModel


class Twice(nn.Module):
    """One projection that runs twice, between them one of the other layout."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 6), Conv1D(6, 6), nn.LayerNorm(6)

    def forward(self, x):
        return self.first(self.second(self.norm(self.first(x))))


def narrow(module, wide):
    """Put the projections into bfloat16 and the rest into `wide`."""
    own = {name for name, _ in projections(module)}
    for name, part in module.named_modules():
        if not list(part.children()):
            part.to(torch.bfloat16 if name in own else wide)
    return module


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_the_numbers_are_those_of_a_model_cast_whole(wide):
    torch.manual_seed(0)
    module = narrow(Twice(), wide)
    whole, x = Twice().to(wide), torch.randn(3, 6, dtype=wide)
    whole.load_state_dict({name: tensor.to(wide) for name, tensor in module.state_dict().items()})
    cast_on_use(module, wide)
    with torch.no_grad():
        assert torch.equal(module(x), whole(x))
        assert torch.equal(module(x), whole(x))
    assert {part.weight.dtype for _, part in projections(module)} == {torch.bfloat16}


def test_one_projection_is_wide_at_a_time():
    module, seen = narrow(Twice(), torch.float64), []
    cast_on_use(module, torch.float64)
    for _, part in projections(module):
        part.register_forward_pre_hook(
            lambda *_: seen.append([part.weight.dtype == torch.float64 for _, part in projections(module)])
        )
    with torch.no_grad():
        module(torch.randn(3, 6, dtype=torch.float64))
    assert [sum(wide) for wide in seen] == [1, 1, 1]


def test_what_fails_while_wide_is_narrow_again():
    module = narrow(Twice(), torch.float64)
    cast_on_use(module, torch.float64)
    weight = module.first.weight
    with pytest.raises(RuntimeError, match="shape"):
        module.first(torch.randn(3, 5, dtype=torch.float64))
    assert module.first.weight is weight


@pytest.mark.parametrize("name", ["llama", "bf16", "gpt2"])
def test_a_streamed_layer_lies_as_it_is_stored(name, tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint(name))
    model, held = StreamedModel(source, torch.float64), []
    layer = model.layer(0)

    def look(layer, arguments):
        weights = [part.weight for _, part in projections(layer)]
        if weights[0].device.type != "meta":  # it is asked what enters it before it has any
            held.append({weight.dtype for weight in weights})

    layer.register_forward_pre_hook(look)
    states = model.states(torch.arange(8)[None] % source.dims.vocab_size)
    stored = {info.dtype for key, info in source.layer_tensors(0) if info.shape[1:]}
    assert stored == ({"BF16"} if name == "bf16" else {"F32"})
    assert held == [{torch.bfloat16 if name == "bf16" else torch.float32}]
    assert states.dtype == torch.float64
