"""Folders that are none, files that are damaged: one error that names the file and the field."""

import json
import os
from contextlib import suppress
from pathlib import Path

import page_folders
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qectomy.errors import CONTROLS, ReportError, clean
from qectomy.record.base import checked
from qectomy.record.bench import Bench
from qectomy.record.evaluation import Evaluation
from qectomy.record.reduced import Fitted
from qectomy.report.page.page import page
from qectomy.report.page.reading import read_folder, read_folders, read_points


@pytest.fixture
def folder(tmp_path):
    return page_folders.write_folder(tmp_path / "reduced", page_folders.healed_report())


def refused(path, *parts):
    with pytest.raises(ReportError) as stop:
        read_folder(path)
    message = str(stop.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_what_is_no_folder_of_a_reduced_checkpoint(tmp_path, folder):
    refused(tmp_path / "nowhere", "no folder", "nowhere")
    refused(folder / "qectomy.json", "is a file")
    refused(tmp_path, f"{tmp_path} holds no qectomy.json", "`qectomy convert`")


@pytest.mark.parametrize("name", ["qectomy.json", "evaluation.json", "bench.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"a": 1}}'])
def test_what_is_no_json(name, content, folder):
    (folder / name).write_bytes(content)
    refused(folder, str(folder / name), "is not JSON", "make it again")


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("perplexity", "ratio"), "1.02", "perplexity.ratio is '1.02'; it should be a valid number"),
        (("perplexity", "ratio"), 0, "perplexity.ratio is 0; it should be greater than 0"),
        (("perplexity", "before"), True, "perplexity.before is True; it should be a valid number"),
        (("perplexity", "after"), float("nan"), "perplexity.after is nan; it should be a finite number"),
        (("perplexity", "after"), float("inf"), "perplexity.after is inf; it should be a finite number"),
        (("perplexity", "after"), 10**400, "perplexity.after is 1000"),
        (
            ("perplexity", "ratio_95"),
            [1.2, 1.1],
            "perplexity.ratio_95 is [1.2, 1.1]; it should be an interval [low, high]",
        ),
        (("perplexity", "ratio_95"), [1.2], "perplexity.ratio_95[1] is missing"),
        (("perplexity", "windows"), 1.5, "perplexity.windows is 1.5; it should be a valid integer"),
        (("top1_agreement",), 1.01, "top1_agreement is 1.01; it should be less than or equal to 1"),
        (("layers",), {}, "layers is {}; it should be a valid list"),
        (("layers", 3), None, "layers[3] is None; it should be a valid dictionary"),
        (("layers", 3, "attention_kl", "heldout"), [], "layers[3].attention_kl.heldout is []"),
        (("layers", 3, "map"), None, "layers[3].map is None; it should be a valid string"),
        (("parameters", "before"), 0, "parameters.before is 0; it should be greater than 0"),
        (("parameters",), None, "parameters is None"),
        (("per_position", "before"), [1.0], "before has 1 numbers for 9 edges"),
        (("per_position", "edges"), [1, 1, 2, 3, 4, 5, 6, 7, 8], "; its numbers should rise"),
        (("per_position", "edges"), None, "per_position.edges is None"),
        (("token_sample", "tokens", 1, "text"), 5, "token_sample.tokens[1].text is 5; it should be a valid string"),
        (("source", "sha256", "config.json"), 5, "source.sha256.config.json is 5; it should be a valid string"),
        (("seconds", "text"), -1, "seconds.text is -1; it should be greater than or equal to 0"),
        (("healing", "validation", "curve", 0, "tokens"), "0", "healing.validation.curve[0].tokens is '0'"),
        (("healing", "settings", "lr"), [1], "healing.settings.lr is [1]"),
        (("healing", "settings", "train"), [1], "healing.settings.train"),
    ],
)
def test_a_field_of_the_wrong_type(path, value, message, folder):
    report = page_folders.healed_report()
    holder = report
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    (folder / "qectomy.json").write_text(json.dumps(report))
    found = refused(folder, str(folder / "qectomy.json"), message)
    assert len(found) < 500


def test_a_file_of_another_shape(folder):
    (folder / "qectomy.json").write_text("[1, 2]")
    refused(folder, "qectomy.json: the file is [1, 2]; it should be a valid dictionary")


def test_a_format_that_another_version_reads(folder):
    """One without a number is an older version's, and is read as far as it has what is needed."""
    report = page_folders.healed_report()
    for found in (0, 2, "1", [1]):
        page_folders.write_folder(folder, report | {"format": found, "qectomy": "0.7.3"})
        told = f"is of format {found!r}, which qectomy '0.7.3' wrote and reads; this is qectomy "
        refused(folder, str(folder / "qectomy.json"), told, "which reads format 1. Install that version")
    del report["format"], report["method"]
    page_folders.write_folder(folder, report)
    assert read_folder(folder).report == Fitted.model_validate(report)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folder):
    (folder / "qectomy.json").chmod(0)
    refused(folder, "cannot be read: Permission denied")


def test_folders_of_the_same_name_are_told_apart(tmp_path):
    paths = [page_folders.write_folder(tmp_path / one / "out", page_folders.full_report()) for one in ("a", "b")]
    assert [folder.name for folder in read_folders(paths)] == ["a/out", "b/out"]
    with pytest.raises(ReportError, match="are the same one"):
        read_folders([paths[0], paths[0]])


def test_points_of_a_file(tmp_path):
    file = tmp_path / "points.json"
    file.write_text('[{"name": "SVD", "parameters_removed": 0.067, "ratio": 1.48, "source": "mine"}]')
    (point,) = read_points(file)
    assert (point.name, point.parameters_removed, point.ratio, point.source) == ("SVD", 0.067, 1.48, "mine")
    file.write_text('[{"name": "SVD", "parameters_removed": 6.7, "ratio": 1.48}]')
    with pytest.raises(ReportError, match=r"points.json: \[0\].parameters_removed is 6.7; it should be less than or"):
        read_points(file)
    with pytest.raises(ReportError, match="cannot be read: No such file"):
        read_points(tmp_path / "none.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


def _replaced(value, place, other):
    """Put `other` at the place-th node of a JSON value; return it and how many nodes were passed."""
    if place == 0:
        return other, 0
    place -= 1
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        copy = dict(value) if isinstance(value, dict) else list(value)
        for key, item in items:
            copy[key], place = _replaced(item, place, other)
            if place <= 0:
                return copy, 0
        return copy, place
    return value, place


@given(st.integers(1, 400), JSON)
def test_whatever_stands_anywhere_is_shown_or_refused(place, other):
    for kind, content in (
        (Fitted, page_folders.healed_report()),
        (Evaluation, page_folders.full_evaluation()),
        (Bench, page_folders.full_bench()),
    ):
        damaged, _ = _replaced(content, place, other)
        with suppress(ReportError):
            checked(damaged, kind, Path("x"))


SMALL = {name: value for name, value in page_folders.healed_report().items() if name not in ("layers", "token_sample")}
SMALL["layers"] = page_folders.healed_report()["layers"][:2]


@settings(max_examples=12)
@given(st.integers(1, 160), st.sampled_from([None, 0, 1, 5e-300, 9e299, "", "x", [], {}, [0.0, 0.0], -1]))
def test_what_passes_the_checks_can_be_drawn(place, other):
    from qectomy.report.page.reading import Folder

    damaged, _ = _replaced(SMALL, place, other)
    try:
        report = checked(damaged, Fitted, Path("x"))
    except ReportError:
        return
    assert "</html>" in page([Folder(name="x", report=report)])


@given(st.text(st.characters()))
def test_clean_text_can_be_written_and_keeps_the_rest(text):
    found = clean(text)
    found.encode("utf-8")
    assert not any(ord(c) in CONTROLS for c in found if c != "\ufffd")
    assert len(found) == len(text)
    assert all(
        new == old for old, new in zip(text, found, strict=True) if old.isprintable() and ord(old) not in CONTROLS
    )
