"""The model files that travel with a reduced checkpoint, and how config.json names them; nothing here needs mlx."""

import ast
import json
import py_compile
import shutil

import pytest
from foldings import fold
from tiny_models import load_reduced, save_reduced, save_variant, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import qectomy
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import code_fields, copy_model_code, model_code, model_files, reduced_config
from qectomy.eval.certificate import _same_model
from qectomy.models.architectures import FAMILIES
from qectomy.surgery.materialize import materialize
from qectomy.surgery.norm_fusion import fold_norms

qectomy.register()
MLX = "mlx_qectomy_llama.py"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def edit_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps(config_of(folder) | fields))


def test_which_files_travel(tmp_path):
    names = {name: [file.name for file in model_files(family)] for name, family in FAMILIES.items()}
    llama = ["modeling_qectomy_llama.py", MLX]
    assert names == {"gpt2": ["modeling_qectomy_gpt2.py"], "llama": llama, "mistral": llama, "qwen2": llama[:1]}
    for name, family in FAMILIES.items():
        assert model_files(family)[0] == model_code(family)
        (tmp_path / name).mkdir()
        copy_model_code(family, tmp_path / name)
        assert {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} == {
            file.name: file.read_bytes() for file in model_files(family)
        }
        named = {value.partition(".")[0] + ".py" for value in code_fields(family)["auto_map"].values()}
        assert named | {code_fields(family).get("model_file", model_code(family).name)} == set(names[name])


def test_the_file_for_mlx_imports_what_mlx_lm_brings(tmp_path):
    (code,) = [file for file in model_files(FAMILIES["llama"]) if file.name == MLX]
    py_compile.compile(str(code), cfile=str(tmp_path / "compiled.pyc"), doraise=True)
    found = set()
    for node in ast.walk(ast.parse(code.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, ast.unparse(node)
            found.add(node.module.partition(".")[0])
    standard = {"dataclasses", "hashlib", "importlib", "re", "struct", "typing"}
    assert {"mlx", "mlx_lm"} <= found <= standard | {"mlx", "mlx_lm", "transformers"}


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt2"])
def test_the_config_names_our_file_and_no_other(tiny_copy, tmp_path, name):
    """A source's own model code is left behind, and so is its name: mlx-lm would run whatever is called that."""
    source = tiny_copy(name)
    (source / "evil.py").write_text("raise SystemExit('was run')")
    edit_config(source, model_file="evil.py")
    reduced = save_reduced(tmp_path / "reduced", source, ("key-shared", "dense"))
    assert config_of(reduced).get("model_file") == (MLX if name in ("llama", "mistral") else None)
    materialize(open_checkpoint(reduced, reduced=True), tmp_path / "stock")
    fold_norms(open_checkpoint(source), tmp_path / "folded", ["gain"])
    for folder in (tmp_path / "stock", tmp_path / "folded"):
        assert "model_file" not in config_of(folder)
        assert not list(folder.glob("*.py"))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_folded_norms_of_a_class_of_ours_come_with_all_files(tmp_path, name):
    source = save_variant(tmp_path / "variant", name, mlp_skip=False)
    assert "model_file" not in config_of(source)
    fold_norms(open_checkpoint(source), tmp_path / "folded", ["gain"])
    assert config_of(tmp_path / "folded").get("model_file") == (MLX if name in ("llama", "mistral") else None)
    assert {file.name for file in (tmp_path / "folded").glob("*.py")} == {
        file.name for file in model_files(FAMILIES[name])
    }


def test_an_exact_fold_names_it_too(tiny_checkpoint, tmp_path):
    fold(tiny_checkpoint(), tmp_path / "exact")
    assert config_of(tmp_path / "exact")["model_file"] == MLX
    assert config_of(tmp_path / "exact")["value_maps"] == ["gauge", "gauge"]
    assert (tmp_path / "exact" / MLX).is_file()


def test_transformers_passes_over_the_field(tiny_reduced, tmp_path):
    """It loads, computes and saves as without it; what it saves still names the file, which mlx-lm then misses."""
    folder = shutil.copytree(tiny_reduced(("key-shared", "select")), tmp_path / "reduced")
    assert AutoConfig.from_pretrained(folder).model_file == MLX
    model, ids = AutoModelForCausalLM.from_pretrained(folder), tokens()
    expected = load_reduced(folder)(ids).logits
    assert (model(ids).logits - expected).abs().max() < 1e-5
    model.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["model_file"] == MLX
    assert not (tmp_path / "again" / MLX).exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert (again(ids).logits - expected).abs().max() < 1e-5


def test_verify_sees_no_difference_in_it(tiny_checkpoint, tiny_reduced):
    reduced = open_checkpoint(tiny_reduced(("key-shared", "dense")), reduced=True)
    assert reduced.config["model_file"] == MLX
    assert _same_model(reduced, open_checkpoint(tiny_checkpoint())) == []


def test_a_reduced_config_written_again_keeps_it(tiny_reduced):
    reduced = open_checkpoint(tiny_reduced(("key-shared", "dense")), reduced=True)
    assert reduced_config(reduced, reduced.recipe, "F32")["model_file"] == MLX
