"""Results in files: whole or not at all, in the place of their like alone."""

import json
import math

import pytest

from qectomy.errors import OutputError
from qectomy.report.saved import check_savable, save_result

RESULT = {"qectomy": "0", "kind": "bench", "x": 1.5}


def test_a_result_is_saved_whole_and_replaces_its_like(tmp_path):
    path = tmp_path / "bench.json"
    save_result(RESULT, path)
    assert json.loads(path.read_text()) == RESULT
    save_result({**RESULT, "x": 2}, path)
    assert json.loads(path.read_text())["x"] == 2
    with pytest.raises(ValueError, match="JSON"):
        save_result({**RESULT, "x": math.nan}, path)
    assert json.loads(path.read_text())["x"] == 2  # as it was
    assert [entry.name for entry in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    "content", ["", "text", "[]", '{"models": []}', '{"qectomy": "0", "kind": "evaluation"}', "[" * 100_000]
)
def test_nothing_else_is_overwritten(tmp_path, content):
    path = tmp_path / "bench.json"
    path.write_text(content)
    for save in (lambda path: check_savable(path, "bench"), lambda path: save_result(RESULT, path)):
        with pytest.raises(OutputError, match=r"bench.json exists and is no result of bench; nothing is overwritten"):
            save(path)
    assert path.read_text() == content


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OutputError, match="is not a folder that can be written to"):
        check_savable(tmp_path / "missing" / "bench.json", "bench")
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(OutputError, match="exists and is no result"):
        check_savable(link, "bench")
