"""Records are there whole or as they were; what is damaged is said, and what differs is named."""

import json
import os

import pytest

from qectomy.errors import QectomyError
from qectomy.runs.records import differences, read_record, write_json, write_record


def test_differences_name_what_one_side_lacks():
    assert differences({"a": 1, "b": 2}, {"b": 2, "c": 3}) == ["a was 1, is None", "c was None, is 3"]
    assert differences({"a": 1}, {"a": 1}) == []


@pytest.mark.parametrize("content", ["{", "", "\udcff", "[1]", "null"])
def test_a_damaged_record_is_one_clear_error(tmp_path, content):
    (tmp_path / "run.json").write_text(content, errors="surrogateescape")
    with pytest.raises(QectomyError, match=r"run\.json .*; remove the folder to start anew"):
        read_record(tmp_path / "run.json")


def test_a_byte_that_flips_is_noticed(tmp_path):
    path = tmp_path / "run.json"
    write_record(path, {"seed": 12})
    assert read_record(path) == {"seed": 12}
    path.write_text(path.read_text().replace("12", "13", 1))
    with pytest.raises(QectomyError, match=r"run\.json was damaged on the disk after it was written"):
        read_record(path)


def test_json_is_there_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": [0] * 1000})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
