"""The plugin for vLLM, beside a stand-in of the few names that it takes from vLLM. No vLLM is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import save_variant

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import write_reduced_config
from qectomy.models.architectures import FAMILIES
from qectomy.serving.dense_stream import stock_config

ROOT = Path(__file__).parents[2]
REGISTRY = """
class Registry:
    def __init__(self):
        self.models, self.calls = {}, 0
    def register_model(self, model_arch, model_cls):
        self.models[model_arch] = model_cls
        self.calls += 1
class Own:
    def load_model_cls(self):
        from vllm.model_executor.models.transformers import OwnModel
        return OwnModel
ModelRegistry = Registry()
ModelRegistry.models |= {name: Own() for name in ("LlamaForCausalLM", "GPT2LMHeadModel")}
"""
# As vLLM's backend does, it builds what the config says, loads by name, and says which names it loaded.
BACKEND = """
import torch
from transformers import AutoModel
class TransformersForCausalLM(torch.nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.model = AutoModel.from_config(**self._from_config_kwargs)
    @property
    def _from_config_kwargs(self):
        return {"config": self.config, "trust_remote_code": True}
    def load_weights(self, weights):
        mine, loaded = dict(self.named_parameters()) | dict(self.named_buffers()), set()
        for name, tensor in weights:
            name = "model." + name.removeprefix("model.").removeprefix("transformer.")
            if name in mine:
                mine[name].data.copy_(tensor)
                loaded.add(name)
        return loaded
# As vLLM's own classes do, it knows stock models by stock names alone.
class OwnModel(torch.nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        from transformers import AutoModelForCausalLM
        self.config = vllm_config.model_config.hf_config
        self.stock = AutoModelForCausalLM.from_config(self.config)
    def load_weights(self, weights):
        weights = dict(weights)
        print(self.stock.load_state_dict(weights, strict=False))
        return set(weights)
"""
START = """
import sys
from importlib import import_module
from types import SimpleNamespace as Space
import qectomy.serving.vllm_plugin as plugin
assert not [name for name in sys.modules if name.startswith("vllm")], "vLLM is imported before it is asked for"
plugin.register()
plugin.register()
from vllm.model_executor.models.registry import ModelRegistry
registered = {name: where for name, where in ModelRegistry.models.items() if isinstance(where, str)}
def model_of(folder, trust=False, ranks=1):
    from transformers import AutoConfig
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    module, name = registered[config.architectures[0]].split(":")
    settings = Space(model_config=Space(hf_config=config, hf_text_config=config),
                     parallel_config=Space(tensor_parallel_size=ranks))
    model = getattr(import_module(module), name)(vllm_config=settings)
    assert settings.model_config.hf_config is config
    return model, config
def tensors_of(folder):
    from safetensors.torch import load_file
    return load_file(folder + "/model.safetensors")
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("stand-in")
    models = home / "vllm/model_executor/models"
    models.mkdir(parents=True)
    for folder in (models, *models.parents[:2]):
        (folder / "__init__.py").touch()
    (models / "registry.py").write_text(REGISTRY)
    (models / "transformers.py").write_text(BACKEND)
    return home


def run(stand_in: Path, script: str, *arguments: str) -> Any:
    """Run a script beside the stand-in in a fresh process; return what it prints last, as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", START + script, *arguments],
        env={**os.environ, "PYTHONPATH": f"{stand_in}{os.pathsep}{ROOT}", "HF_HOME": str(stand_in / "hf")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_entry_point_names_the_plugin():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split('[project.entry-points."vllm.general_plugins"]\n', 1)[1]
    assert table.startswith('qectomy = "qectomy.serving.vllm_plugin:register"\n')


def test_register_can_be_called_again_and_registers_every_family(stand_in):
    script = """
import json
from transformers import AutoConfig, AutoModelForCausalLM
kinds = [AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(kind))].__name__
         for kind in ("qectomy_llama", "qectomy_mistral", "qectomy_qwen2", "qectomy_gpt2")]
classes = {getattr(import_module(m), c).__name__ for m, c in (where.split(":") for where in registered.values())}
print(json.dumps([sorted(registered), ModelRegistry.calls, kinds, sorted(classes)]))
"""
    names = [f"Qectomy{stem}ForCausalLM" for stem in ("GPT2", "Llama", "Mistral", "Qwen2")]
    got, calls, kinds, classes = run(stand_in, script)
    assert got == names
    assert calls == 2 * len(FAMILIES) == 8
    assert sorted(kinds) == names
    assert classes == ["TransformersForCausalLM"]  # by this name vLLM knows its Transformers backend


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_loaded_written_out_by_the_installed_code(stand_in, tmp_path, family, trust):
    query = "gauge" if family == "gpt2" else "dense"
    folder = save_variant(
        tmp_path / "m", family, "float32", query_maps=[query, "select"], value_maps=["gauge", "dense"]
    )
    script = """
import json
folder, trust = sys.argv[1], sys.argv[2] == "True"
model, config = model_of(folder, trust)
loaded = model.load_weights(tensors_of(folder).items())
left = {name for name, _ in model.named_parameters()} - loaded
print(json.dumps([type(model.model).__module__, model.config.value_maps, config.value_maps, sorted(left)]))
"""
    module, dense, stored, left = run(stand_in, script, str(folder), str(trust))
    assert module == f"qectomy.modeling.{FAMILIES[family].modeling}"
    assert (dense, stored, left) == (["dense"] * 2, ["gauge", "dense"], [])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_only_has_identity_blocks_runs_in_vllms_own_class(stand_in, tmp_path, family):
    maps = ["gauge", "dense"]
    folder = save_variant(
        tmp_path / "m",
        family,
        "float32",
        query_maps=maps if family == "gpt2" else ["dense"] * 2,  # one tensor holds GPT-2's queries and values
        value_maps=maps,
    )
    script = """
import json, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model, config = model_of(folder)
model.load_weights(tensors_of(folder).items())
ids = torch.arange(1, 9)[None]
expected, got = AutoModelForCausalLM.from_pretrained(folder)(ids).logits, model.stock.eval()(ids).logits
apart = float((got - expected).abs().max() / expected.abs().max())
print(json.dumps([type(model).__mro__[1].__name__, model.config.model_type, config.value_maps, apart]))
"""
    own, kind, stored, apart = run(stand_in, script, str(folder))
    assert (own, kind, stored) == ("OwnModel", family, ["gauge", "dense"])
    assert apart < 1e-5


UNUSUAL = {  # fields that engines' own classes drop, or of which they compute something else
    "llama": [dict(attention_skip=False), dict(norms=False), dict(mlp_bias=True), dict(hidden_act="relu")],
    "gpt2": [dict(softmax_scale=0.3), dict(scale_attn_by_inverse_layer_idx=True), dict(scale_attn_weights=False)],
}


@pytest.mark.parametrize(("family", "field"), [(family, field) for family in UNUSUAL for field in UNUSUAL[family]])
def test_a_model_that_is_not_as_usual_stays_on_the_backend(family, field):
    config = FAMILIES[family].config_class(reduced=True)
    query = "gauge" if family == "gpt2" else "dense"
    usual = config(query_maps=[query] * 12, value_maps=["gauge"] * 12, num_hidden_layers=12)
    assert stock_config(usual).model_type == family
    assert stock_config(config(**(usual.to_dict() | field))) is None
    identity = {"query_maps": ["identity"] * 12, "value_maps": ["dense"] * 12}
    assert stock_config(config(**(usual.to_dict() | identity))) is None


@pytest.mark.parametrize("lost", ["index", "gain"])
def test_a_query_map_that_was_not_loaded_is_refused(stand_in, tmp_path, lost):
    folder = save_variant(tmp_path / "m", "llama", "float32", query_maps=["select", "dense"])
    script = """
import json
folder, lost = sys.argv[1:]
model, _ = model_of(folder)
try:
    model.load_weights((name, tensor) for name, tensor in tensors_of(folder).items() if not name.endswith(lost))
    print(json.dumps("loaded"))
except ValueError as error:
    print(json.dumps(str(error)))
"""
    said = run(stand_in, script, str(folder), lost)
    assert said.startswith(f"the checkpoint lacks model.layers.0.self_attn.query.{lost}, of which the queries are made")


@pytest.mark.parametrize("part", ["query.index", "pivots"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_other_channel_numbers_than_the_config_s_are_refused(stand_in, tmp_path, family, part):
    maps = dict(query_maps=["gauge" if family == "gpt2" else "dense", "select"], value_maps=["gauge", "dense"])
    folder = save_variant(tmp_path / "m", family, "float32", **maps)
    write_reduced_config(folder, open_checkpoint(folder, reduced=True).config)
    script = """
import json
folder, part = sys.argv[1:]
said = []
for change in (0, 1):
    model, _ = model_of(folder)
    try:
        model.load_weights((name, tensor.flip(-1) if change and name.endswith(part) else tensor)
                           for name, tensor in tensors_of(folder).items())
        said.append("loaded")
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""
    right, wrong = run(stand_in, script, str(folder), part)
    assert right == "loaded"
    assert wrong.startswith(f"layer {int(part != 'pivots')}: the channel numbers in memory")


@pytest.mark.parametrize(
    ("family", "ranks", "said"),
    [
        ("llama", 2, "built"),
        ("llama", 4, "tensor_parallel_size 4 does not divide the 2 key-value heads"),
        ("gpt2", 2, "tensor_parallel_size 2: a reduced GPT-2 is not sharded"),
    ],
)
def test_sharding_that_would_part_heads_from_their_keys_is_refused(stand_in, tmp_path, family, ranks, said):
    folder = save_variant(tmp_path / "m", family, "float32", query_maps=["key-shared", "identity"])
    script = """
import json
try:
    model_of(sys.argv[1], ranks=int(sys.argv[2]))
    print(json.dumps("built"))
except ValueError as error:
    print(json.dumps(str(error)))
"""
    assert run(stand_in, script, str(folder), str(ranks)).startswith(said)
