"""Passes whose layers a thread reads ahead, as on a CUDA device, give what they give without it, and end its thread."""

import threading

import pytest
import torch
from conversions import convert_tiny
from damage import edit_weights
from interruptions import same_output
from tiny_models import tokens

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.prefetch import LayersAhead
from qectomy.conversion import layerwise
from qectomy.errors import NonFiniteError, Stopped
from qectomy.eval import layerwise_model
from qectomy.eval.layerwise_model import StreamedModel

MIXED = "0=identity,1=select,2=dense,3=key-shared"  # identity turns the stream, and the source's layers


@pytest.fixture
def taken(monkeypatch):
    """Let both passes read by a thread; return the layers that each read, in order."""
    read_by_it = {"streamed": [], "conversion": []}

    def read_layers(checkpoint, layers, dtype, device, *, on_host=False):
        def read(layer):
            read_by_it["conversion" if on_host else "streamed"].append(layer)
            return checkpoint.read_layer(layer, dtype)

        return LayersAhead(layers, read)

    for module in (layerwise, layerwise_model):
        monkeypatch.setattr(module, "read_layers", read_layers)
    yield read_by_it
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_streamed_states_are_the_same(name, tiny_checkpoint, request):
    model = StreamedModel(open_checkpoint(tiny_checkpoint(name)))
    before = model.states(tokens())
    taken = request.getfixturevalue("taken")
    assert torch.equal(model.states(tokens()), before)
    assert taken == {"streamed": [0, 1], "conversion": []}


@pytest.mark.parametrize("name, query", [("llama", MIXED), ("gpt2", "0=select,1=dense,2-3=select")])
def test_a_conversion_writes_the_same_bytes_also_when_it_is_resumed(
    name, query, tiny_checkpoint, raven, tmp_path, request
):
    source = tiny_checkpoint(name, num_hidden_layers=4)
    convert_tiny(source, tmp_path / "before", query, raven)
    taken = request.getfixturevalue("taken")["conversion"]
    convert_tiny(source, tmp_path / "out", query, raven)
    same_output(tmp_path / "out", tmp_path / "before")
    assert taken == [0, 1, 2, 3]
    taken.clear()

    def stop(done, total, note):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Stopped, match="interrupted"):
        convert_tiny(source, tmp_path / "resumed", query, raven, progress=stop)
    assert taken == [0, 1, 2]
    taken.clear()
    convert_tiny(source, tmp_path / "resumed", query, raven, resume=True)
    assert taken == [2, 3]
    same_output(tmp_path / "resumed", tmp_path / "before")


@pytest.mark.usefixtures("taken")
def test_what_is_wrong_with_a_layer_is_said_after_the_layers_before_it(tiny_copy, raven, tmp_path):
    source, name, done = tiny_copy("llama"), "model.layers.1.mlp.up_proj.weight", []
    edit_weights(source, lambda tensors: tensors[name][0].fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=f"tensor {name} holds NaN or Inf"):
        convert_tiny(source, tmp_path / "out", "select", raven, progress=lambda at, *_: done.append(at))
    assert done == [1]
    assert not list(tmp_path.glob("out*"))
    steps = []
    with pytest.raises(NonFiniteError, match=f"tensor {name} holds NaN or Inf"):
        StreamedModel(open_checkpoint(source)).states_of([tokens()], step=lambda: steps.append(1))
    assert steps == [1]
