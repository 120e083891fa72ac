"""Folders that another version wrote get this version's code, whole or not at all, and nothing else is touched."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conversions import convert_tiny, hashes
from damage import edit_json, edit_weights
from page_folders import full_report
from safetensors.torch import save_file
from tiny_models import load_reduced, tokens

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.config_files import has_model_code, model_code
from qectomy.checkpoint.file_identity import fingerprint
from qectomy.errors import CheckpointError, OutputError
from qectomy.record.bench import BenchModel
from qectomy.report.page.reading import read_folder
from qectomy.surgery import renew as module
from qectomy.surgery.renew import has_old_code, renew

OLD = b"raise SystemExit('the code of another version')\n"
CODE = {
    "llama": "modeling_qectomy_llama.py",
    "mistral": "modeling_qectomy_llama.py",
    "qwen2": "modeling_qectomy_llama.py",
    "gpt2": "modeling_qectomy_gpt2.py",
}
LLAMA = CODE["llama"]
REPORT = full_report() | {"qectomy": "0.0.9", "layers": []}


@pytest.fixture
def old(tiny_reduced, tmp_path):
    """Return a function (family) -> a reduced folder of the test's own whose model code is another version's."""

    def make(name="llama", report=True):
        folder = Path(shutil.copytree(tiny_reduced(("select", "key-shared"), name), tmp_path / name))
        (folder / CODE[name]).write_bytes(OLD)
        if report:
            (folder / "qectomy.json").write_text(json.dumps(REPORT))
        return folder

    return make


def states(folder):
    """All that would show that a file was written, by name."""
    return {
        path.name: (path.lstat().st_ino, path.lstat().st_mtime_ns, path.lstat().st_mode) for path in folder.iterdir()
    }


@pytest.mark.parametrize("name", CODE)
def test_the_code_is_this_versions_and_the_rest_as_it_was(old, name):
    folder = old(name)
    before, logits = hashes(folder), load_reduced(folder)(tokens()).logits
    assert has_old_code(folder)
    assert renew(folder) == {
        "folder": str(folder),
        "state": "renewed",
        "files": [CODE[name], "qectomy.json"],
        "fields": [],
    }
    after = hashes(folder)
    assert {file for file in {*before, *after} if before.get(file) != after.get(file)} == {CODE[name], "qectomy.json"}
    own = model_code(open_checkpoint(folder, reduced=True).family)
    assert (folder / CODE[name]).read_bytes() == own.read_bytes()
    assert not has_old_code(folder)
    assert torch.equal(load_reduced(folder)(tokens()).logits, logits)


def test_the_report_keeps_what_it_said_and_notes_the_renewal(old):
    folder = old()
    renew(folder)
    report = json.loads((folder / "qectomy.json").read_text())
    renewed = report.pop("renewed")
    assert list(report.items()) == list(REPORT.items())
    assert (renewed["qectomy"], renewed["fingerprints"]) == (module.__version__, [])


def test_a_current_folder_is_not_written(old):
    folder = old()
    renew(folder)
    before = states(folder)
    assert renew(folder) == {"folder": str(folder), "state": "current", "files": [], "fields": []}
    assert states(folder) == before


def test_a_dry_run_writes_nothing_and_says_what_it_would(old):
    folder = old()
    before = states(folder)
    told = renew(folder, dry_run=True)
    assert (told.pop("state"), states(folder)) == ("old", before)
    done = renew(folder)
    assert (done.pop("state"), done) == ("renewed", told)


def test_missing_code_is_put_there_and_a_folder_saved_anew_needs_no_report(old):
    folder = old(report=False)
    (folder / LLAMA).unlink()
    assert has_old_code(folder)
    assert renew(folder)["files"] == [LLAMA]
    assert has_model_code(open_checkpoint(folder, reduced=True).family, folder)
    assert (folder / LLAMA).stat().st_mode == (folder / "config.json").stat().st_mode


def test_who_has_the_old_file_open_or_by_another_name_keeps_it_whole(old, tmp_path):
    folder = old()
    os.link(folder / LLAMA, tmp_path / "elsewhere.py")
    (folder / LLAMA).chmod(0o640)
    with (folder / LLAMA).open("rb") as reading:
        renew(folder)
        assert reading.read() == OLD
    assert (tmp_path / "elsewhere.py").read_bytes() == OLD
    assert (folder / LLAMA).read_bytes() != OLD
    assert (folder / LLAMA).stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_run_that_fails_leaves_each_file_whole_and_no_draft(old, error, monkeypatch):
    folder = old()
    before = hashes(folder)

    def fails(*_):
        raise error

    monkeypatch.setattr(module.os, "replace", fails)
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        renew(folder)
    assert hashes(folder) == before
    if isinstance(error, OSError):
        assert str(caught.value) == (
            f"{folder} could not be renewed: the disk is full. Each of its files is whole; run it again"
        )


def test_code_that_the_config_seeks_elsewhere_is_sought_beside_the_weights(old):
    """What transformers writes when a model of the Hub is saved: the Hub's code would be run, not the folder's."""
    folder = old()
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    theirs = {name: f"some-org/model--{value}" for name, value in auto_map.items()} | {"AutoTokenizer": ["x.X", None]}
    edit_json(folder / "config.json", lambda config: config.update(auto_map=theirs))
    config = json.loads((folder / "config.json").read_text())
    known = fingerprint(folder)
    told = renew(folder)
    assert (told["files"], told["fields"]) == ([LLAMA, "config.json", "qectomy.json"], ["auto_map"])
    assert json.loads((folder / "config.json").read_text()) == config | {
        "auto_map": auto_map | {"AutoTokenizer": ["x.X", None]}
    }
    assert fingerprint(folder) != known
    assert json.loads((folder / "qectomy.json").read_text())["renewed"]["fingerprints"] == [known]
    found, row = read_folder(folder), BenchModel.model_construct
    assert found.owns([row(fingerprint=known)])  # an evaluation.json from before stays this folder's
    assert found.owns([row(fingerprint=fingerprint(folder))])
    assert not found.owns([row(fingerprint="f" * 32)])


@pytest.fixture
def before_index_hashes(tiny_checkpoint, raven, tmp_path):
    """A converted folder as it was before config.json told of channel numbers, and its config as it is written now."""
    out = tmp_path / "out"
    convert_tiny(tiny_checkpoint(), out, "0=select,1=key-shared", raven)
    config = json.loads((out / "config.json").read_text())
    edit_json(out / "config.json", lambda older: older.pop("index_sha256"))
    return out, config


def test_hashes_of_the_channel_numbers_are_added(before_index_hashes):
    folder, config = before_index_hashes
    assert not has_old_code(folder)  # a conversion ends with this version's
    told = renew(folder)
    assert (told["files"], told["fields"]) == (["config.json", "qectomy.json"], ["index_sha256"])
    assert json.loads((folder / "config.json").read_text()) == config
    assert [digest is not None for digest in config["index_sha256"]] == [True, False]
    assert renew(folder)["state"] == "current"


def test_channel_numbers_that_were_averaged_are_refused_and_not_hashed(before_index_hashes):
    folder, _ = before_index_hashes
    name = "model.layers.0.self_attn.query.index"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors[name].flip(0).contiguous()}))
    before = hashes(folder)
    with pytest.raises(CheckpointError, match=f"the channel numbers {name} are not those that were written"):
        renew(folder)
    assert hashes(folder) == before
    (folder / "qectomy.json").unlink()
    assert renew(folder)["state"] == "current"  # nobody knows, and nothing is claimed


def test_fingerprints_of_renewals_before_are_kept(old):
    folder = old()
    edit_json(folder / "qectomy.json", lambda report: report.update(renewed={"fingerprints": ["a" * 32, 3]}))
    renew(folder)
    assert json.loads((folder / "qectomy.json").read_text())["renewed"]["fingerprints"] == ["a" * 32]


def test_a_quantized_folder_is_renewed(old):
    """Its tensors go by an engine's names, and it needs code that fits the installed transformers all the same."""
    folder = old()
    save_file(
        {"model.layers.0.mlp.up_proj.qweight": torch.zeros(2, 2, dtype=torch.int32)}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"tensor\(s\) that config.json calls for are missing"):
        renew(folder)
    edit_json(folder / "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq"}))
    assert renew(folder)["state"] == "renewed"


def a_link(folder, name):
    target = folder.parent / "elsewhere"
    target.mkdir()
    shutil.move(folder / name, target / name)
    (folder / name).symlink_to(target / name)


DAMAGE = {
    "an original": (
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(model_type="llama")),
        "model_type 'llama' is not a checkpoint that qectomy reduced; those are: qectomy_gpt2, qectomy_llama",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "holds no config.json; it is not a checkpoint"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors and no"),
    "cut weights": (lambda folder: os.truncate(folder / "model.safetensors", 3000), "not a whole safetensors file"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "config.json: not a JSON object"),
    "no report": (lambda folder: (folder / "qectomy.json").write_text("[]"), "qectomy.json: not a JSON object"),
    "linked code": (lambda folder: a_link(folder, LLAMA), "is a link to .*elsewhere.*nothing is written through links"),
    "linked report": (lambda folder: a_link(folder, "qectomy.json"), "qectomy.json is a link to .*elsewhere"),
    "code that leads nowhere": (
        lambda folder: ((folder / LLAMA).unlink(), (folder / LLAMA).symlink_to("/nowhere.py")),
        "is a link to /nowhere.py",
    ),
    "a folder as code": (
        lambda folder: ((folder / LLAMA).unlink(), (folder / LLAMA).mkdir()),
        "modeling_qectomy_llama.py is no file: remove it",
    ),
    "a newer version": (
        lambda folder: edit_json(folder / "qectomy.json", lambda report: report.update(qectomy="99.1rc1")),
        "was written by qectomy '99.1rc1', and this is .* would become older, not newer",
    ),
    "renewed by a newer version": (
        lambda folder: edit_json(folder / "qectomy.json", lambda report: report.update(renewed={"qectomy": "99"})),
        "was written by qectomy '99'",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_other_folders_are_refused_with_the_reason_and_left_as_they_are(old, damage):
    folder = old()
    damaged, message = DAMAGE[damage]
    damaged(folder)
    before = states(folder)
    for dry_run in (True, False):
        with pytest.raises(CheckpointError, match=message) as caught:
            renew(folder, dry_run)
        assert str(folder) in str(caught.value)
        assert states(folder) == before


def test_a_linked_folder_a_file_and_a_hub_id_are_refused(old, tmp_path):
    folder = old()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(CheckpointError, match=rf"link is a link to {folder}, .* Give the folder that it leads to"):
        renew(tmp_path / "link")
    for other in (folder / "config.json", Path("some-org/model")):
        with pytest.raises(CheckpointError, match=f"{other} is no folder on this disk"):
            renew(other)
    assert (folder / LLAMA).read_bytes() == OLD


@pytest.mark.parametrize("version", ["next year's", 3, None])
def test_a_version_that_is_none_says_nothing(old, version):
    folder = old()
    edit_json(folder / "qectomy.json", lambda report: report.update(qectomy=version))
    assert renew(folder)["state"] == "renewed"


def test_what_is_no_reduced_folder_has_no_old_code(old, tiny_checkpoint, tmp_path):
    assert not has_old_code(tiny_checkpoint())
    assert not has_old_code(tmp_path)
    folder = old()
    (folder / "config.json").write_text("{")
    assert not has_old_code(folder)
