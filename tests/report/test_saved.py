"""Results in files: whole or not at all, in the place of their like alone."""

import math

import pytest
from page_folders import full_evaluation

from qectomy.errors import OutputError
from qectomy.record.base import read_record
from qectomy.record.evaluation import Evaluation
from qectomy.report.saved import check_savable, save_result

RESULT = Evaluation.model_validate(full_evaluation())


def test_a_result_is_saved_whole_and_replaces_its_like(tmp_path):
    path = tmp_path / "evaluation.json"
    save_result(RESULT, path)
    assert read_record(path, Evaluation) == RESULT
    save_result(RESULT.model_copy(update={"command": "again"}), path)
    assert read_record(path, Evaluation).command == "again"
    spoilt = [row.model_copy(update={"nll": math.nan}) for row in RESULT.results]
    with pytest.raises(ValueError, match="JSON"):
        save_result(RESULT.model_copy(update={"results": spoilt}), path)
    assert read_record(path, Evaluation).command == "again"  # as it was
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.json"]


@pytest.mark.parametrize(
    "content", ["", "text", "[]", '{"models": []}', '{"qectomy": "0", "kind": "bench"}', "[" * 100_000]
)
def test_nothing_else_is_overwritten(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    for save in (lambda path: check_savable(path, "evaluation"), lambda path: save_result(RESULT, path)):
        with pytest.raises(
            OutputError, match=r"evaluation.json exists and is no result of evaluation; nothing is overwritten"
        ):
            save(path)
    assert path.read_text() == content


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="is not a folder that can be written to"):
        check_savable(tmp_path / "missing" / "evaluation.json", "evaluation")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(OutputError, match="exists and is no result"):
        check_savable(link, "evaluation")
