"""The reload check: what a fresh process must find before an output is published."""

import shutil
from functools import partial

import pytest
import torch
from conversions import convert_tiny
from damage import edit_json
from healings import Pair, heal_tiny
from tiny_models import EVERY_MAP, load_reduced, tokens

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.exact import convert_exact
from qectomy.conversion.settings import ConvertSettings
from qectomy.errors import CheckpointError, Stopped
from qectomy.eval import reload
from qectomy.eval.layerwise_model import StreamedModel
from qectomy.modeling import modeling_qectomy_gpt2, modeling_qectomy_llama

MODELING = dict.fromkeys(("llama", "mistral", "qwen2"), modeling_qectomy_llama) | {"gpt2": modeling_qectomy_gpt2}
# As if transformers handed layers their cache under a name that the model code passes by: from the second token on
# each token sees only itself, and one pass over a text is right.
LOST = "import {0} as m; m.take_cache = lambda named, given=None: (None, {{}}); "


def lose_caches(patch: pytest.MonkeyPatch, name: str) -> None:
    """Let a fresh process, and this one where it stands in for it, run layers that do not find their cache."""
    module = MODELING[name]
    at = reload.CHILD.index("from qectomy")
    patch.setattr(reload, "CHILD", reload.CHILD[:at] + LOST.format(module.__name__) + reload.CHILD[at:])
    patch.setattr(module, "take_cache", lambda named, given=None: (None, {}))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen2"])
def test_a_cache_that_is_lost_is_found_by_a_fresh_process(tiny_reduced, name, monkeypatch):
    folder, ids = tiny_reduced(EVERY_MAP, name), tokens(1, 40)
    model = StreamedModel(open_checkpoint(folder, reduced=True))
    logits = model.all_logits(model.states(ids)[0, -20:])
    found = reload.check_reload(folder, ids, logits, folder, writes=False)
    assert found.error < 1e-5
    assert 0 < found.cached_error < 1e-5
    lose_caches(monkeypatch, name)
    if name in ("mistral", "qwen2"):  # its window's mask has the length of the keys that the cache should hold
        with pytest.raises(Stopped, match=r"in a fresh process: RuntimeError: .*shape"):
            reload.check_reload(folder, ids, logits, folder, writes=False)
        return
    with pytest.raises(CheckpointError, match=r"would write gibberish: token by token, .* its logits are off by \d"):
        reload.check_reload(folder, ids, logits, folder, writes=False)


def test_another_tokenizer_is_found_by_a_fresh_process(tiny_reduced, tmp_path):
    original, ids = tiny_reduced(EVERY_MAP), tokens(1, 20)
    folder = shutil.copytree(original, tmp_path / "written")
    model = StreamedModel(open_checkpoint(folder, reduced=True))
    logits = model.all_logits(model.states(ids)[0, -4:])
    reload.check_reload(folder, ids, logits, original, writes=False)
    edit_json(folder / "tokenizer_config.json", lambda fields: fields.update(eos_token=fields["pad_token"]))
    with pytest.raises(CheckpointError, match=r"the written tokenizer is not the original's: eos_token_id differ"):
        reload.check_reload(folder, ids, logits, original, writes=False)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("query", ["key-shared", "select", "identity", "low-rank:2", "exact"])
def test_no_conversion_ships_a_cache_that_is_lost(tiny_checkpoint, raven, tmp_path, name, query, monkeypatch):
    source, out = tiny_checkpoint(name), tmp_path / "out"
    exact = partial(convert_exact, open_checkpoint(source), out, ConvertSettings())
    convert = exact if query == "exact" else partial(convert_tiny, source, out, query, raven)
    lose_caches(monkeypatch, name)
    with pytest.raises(CheckpointError, match="would write gibberish"):
        convert()
    assert not out.exists()


def test_no_healing_ships_a_cache_that_is_lost(tiny_checkpoint, raven, tmp_path, monkeypatch):
    pair = Pair(tiny_checkpoint(), tmp_path / "reduced")
    convert_tiny(pair.original, pair.reduced, "key-shared", raven)
    lose_caches(monkeypatch, "llama")
    with pytest.raises(CheckpointError, match="would write gibberish"):
        heal_tiny(pair, tmp_path / "out", raven)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "tied", "mistral", "qwen2", "gpt2", "rope-longrope"])
def test_decoding_layer_by_layer_is_the_models_own(tiny_reduced, name):
    """A text in pieces, each layer with its cache, gives the states of the whole model in one pass."""
    folder, ids = tiny_reduced(EVERY_MAP, name), tokens(2, 16)
    streamed = StreamedModel(open_checkpoint(folder, reduced=True), torch.float64)
    pieces = [ids[:, :5], ids[:, 5:13], *ids[:, 13:].split(1, dim=1)]
    whole, *parts = streamed.states_of([ids], continued=pieces)
    model = load_reduced(folder, torch.float64)
    with torch.no_grad():
        expected = model.base_model(ids).last_hidden_state
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)  # RMSNorm computes in float32 in the whole model
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    assert (torch.cat([streamed.states(piece) for piece in pieces], 1) - whole).abs().max() > 1e-3
