"""Results belong to checkpoints by their files: those of another are not shown, nor another model as the original."""

import shutil

import pytest
from conversions import convert_tiny
from damage import edit_json, edit_weights

from qectomy.checkpoint.file_identity import fingerprint
from qectomy.errors import ReportError
from qectomy.eval.evaluate import Measure, evaluate_all
from qectomy.eval.protocol import Protocol
from qectomy.record.base import made
from qectomy.record.evaluation import Evaluation
from qectomy.report.page.page import page
from qectomy.report.page.reading import check_original, read_folder


@pytest.fixture(scope="module")
def reduced(tiny_checkpoint, raven, tmp_path_factory):
    """Two reduced checkpoints of one original."""
    root = tmp_path_factory.mktemp("reduced")
    for query in ("select", "key-shared"):
        convert_tiny(tiny_checkpoint(), root / query, query, raven)
    return root


def test_it_is_the_files_and_not_the_name(tiny_copy, tiny_checkpoint):
    folder = tiny_copy()
    assert fingerprint(folder) == fingerprint(tiny_checkpoint())
    edit_weights(folder, lambda tensors: tensors["model.norm.weight"].mul_(2))
    changed = fingerprint(folder)
    assert changed != fingerprint(tiny_checkpoint())
    edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    assert fingerprint(folder) != changed


@pytest.mark.parametrize("own", [True, False])
def test_an_evaluation_of_others_is_not_shown(own, reduced, tiny_checkpoint, raven, tmp_path):
    folder = shutil.copytree(reduced / "select", tmp_path / "copy")
    measured = folder if own else reduced / "key-shared"
    results = evaluate_all(
        [str(tiny_checkpoint()), str(measured)], str(raven), Measure(protocol=Protocol(context=32, tokens=320))
    )
    (folder / "evaluation.json").write_text(Evaluation(**made("eval"), results=results).as_json())
    html = page([read_folder(folder)])
    assert ("Measured again by qectomy eval" in html) == own
    assert ("evaluation.json in this folder was measured on other checkpoints" in html) != own


def test_the_original_is_known_by_its_hashes(reduced, tiny_checkpoint, tiny_copy):
    folder = read_folder(reduced / "select")
    check_original(folder, tiny_checkpoint())
    with pytest.raises(ReportError, match=r"is not the original of select: its .* is another one, or missing"):
        check_original(folder, tiny_checkpoint("mqa"))
    other = tiny_copy()
    edit_weights(other, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(ReportError, match=r"its model.safetensors is another one"):
        check_original(folder, other)
