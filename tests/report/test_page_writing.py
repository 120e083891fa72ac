"""`qectomy report`: what it writes where, what it refuses to replace, and real folders from end to end."""

import json
import os
import re
import stat
import sys
from pathlib import Path

import page_folders
import pytest
from conversions import convert_tiny, reload_here

from qectomy.cli import main
from qectomy.report.page import writing
from qectomy.report.page.page import page
from qectomy.report.page.reading import read_folder


@pytest.fixture
def report(monkeypatch, capsys):
    """Return a function (arguments…) -> (exit code, stdout, stderr) of `qectomy report`."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qectomy", "report", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path):
    return page_folders.write_folder(tmp_path / "reduced", page_folders.full_report())


def test_one_folder_gets_its_page_inside(report, folder):
    code, out, err = report(folder)
    assert (code, err) == (0, "")
    assert out.endswith(f"wrote {folder / 'report.html'}\n")
    assert re.search(r"reduced\s+│ 6\.58 %\s+│ 1\.0655 │ \[1\.0581, 1\.0732\] │ Heal before use", out)
    assert "\x1b" not in out
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html == page([read_folder(folder)])
    assert stat.S_IMODE((folder / "report.html").stat().st_mode) & 0o077 == 0o044 & ~_umask()
    assert sorted(os.listdir(folder)) == ["qectomy.json", "report.html"]


def _umask():
    found = os.umask(0)
    os.umask(found)
    return found


def test_several_are_compared_here(report, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exact = page_folders.write_folder(tmp_path / "[b]exact", page_folders.exact_report())
    points = tmp_path / "points.json"
    points.write_text('[{"name": "[/x] SVD", "parameters_removed": 0.0657, "ratio": 1.48}]')
    code, out, _ = report(folder, exact, "--also", points, "--title", "Mine & yours", "--json")
    assert code == 0
    result = json.loads(out)
    assert result["out"] == "qectomy-comparison.html"
    rows = {row["name"]: row for row in result["folders"]}
    assert rows["reduced"]["verdict"] == "Heal before use"
    assert rows["[b]exact"]["verdict"] == "Lossless"
    assert rows["[b]exact"]["ratio"] == 1
    assert {name: row["on_frontier"] for name, row in rows.items()} == {
        "reduced": True,
        "[b]exact": True,
        "[/x] SVD": False,
    }
    html = (tmp_path / "qectomy-comparison.html").read_text(encoding="utf-8")
    assert "<title>Mine &amp; yours – Qectomy</title>" in html
    assert "[/x] SVD" in html
    code, out, _ = report(folder, exact, "--also", points)
    assert code == 0
    assert "[/x] SVD" in out


def test_only_a_page_of_ours_is_replaced(report, folder):
    out = folder / "report.html"
    assert report(folder)[0] == 0
    out.write_text(out.read_text().replace("Heal before use", "old"))
    assert report(folder)[0] == 0
    assert "Heal before use" in out.read_text()
    for content in ("my notes", "x" * 5000 + '<meta name="generator" content="qectomy 1">'):
        out.write_text(content)
        code, printed, err = report(folder)
        assert (code, printed) == (1, "")
        assert "exists and is no report of qectomy; give another --out, or --force" in err
        assert out.read_text() == content
    assert report(folder, "--force")[0] == 0
    assert "Heal before use" in out.read_text()


def test_a_link_is_replaced_and_what_it_leads_to_is_not(report, folder, tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    (folder / "report.html").symlink_to(notes)
    assert report(folder)[0] == 1
    assert report(folder, "--force")[0] == 0
    assert notes.read_text() == "mine"
    assert not (folder / "report.html").is_symlink()


@pytest.mark.parametrize(
    "out, message",
    [("reduced", "is a folder"), ("no/such/page.html", "is no folder"), ("n" * 300, "File name too long")],
)
def test_places_that_cannot_be_written(out, message, report, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, _, err = report(folder, "--out", out)
    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_page_that_fails_half_way_leaves_the_old_one(folder, monkeypatch):
    out = writing.write_html("<old>", folder / "report.html")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "replace", full)
    with pytest.raises(writing.ReportError, match="No space left on device"):
        writing.write_html("<new>", out, force=True)
    assert out.read_text() == "<old>"
    assert sorted(os.listdir(folder)) == ["qectomy.json", "report.html"]


def test_errors_are_one_line_and_nothing_is_written(report, tmp_path):
    code, out, err = report(tmp_path)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {tmp_path} holds no qectomy.json")
    assert err.count("\n") == 1


@pytest.mark.parametrize("damage", ["none", "code"])
def test_a_page_that_cannot_be_made_does_not_undo_a_conversion(damage, folder, monkeypatch, capsys):
    report = read_folder(folder).report
    if damage == "code":
        monkeypatch.setattr(writing, "page", lambda *_: 1 / 0)
    path = writing.write_page(folder, report)
    err = capsys.readouterr().err
    assert path == (folder / "report.html" if damage == "none" else None)
    assert (folder / "report.html").exists() == (damage == "none")
    assert err.count("\n") == (damage != "none")
    assert {"none": "", "code": "ZeroDivisionError"}[damage] in err


@pytest.mark.parametrize("no_color", ["1", None])
def test_colours_are_off_where_they_are_not_wanted(no_color, monkeypatch):
    """A console made as the shared one is, on a terminal."""
    import io

    from rich.console import Console

    from qectomy.report import tables

    monkeypatch.setenv("TERM", "xterm-256color")
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    held = io.StringIO()
    terminal = Console(highlight=False, soft_wrap=False, emoji=False, force_terminal=True, file=held)
    terminal.print("[red]x[/]")
    assert ("\x1b[31m" in held.getvalue()) == (no_color is None)
    assert not tables.console.is_terminal


def test_a_real_conversion_shows_what_each_layer_stores(tiny_checkpoint, raven, tmp_path, report):
    out = tmp_path / "out"
    told = convert_tiny(tiny_checkpoint(), out, "0=key-shared,1=dense", raven)
    assert report(out)[0] == 0
    words = re.sub(r"<[^>]*>", " ", (out / "report.html").read_text())
    words = " ".join(words.split())
    # 4 heads of 8 on a width of 32: W_Q is 32 × 32, a mix a head 8 × 8
    rest = 2 * 16 * 32 + 32 * 32 + 3 * 40 * 32 + 2 * 32  # keys and values, output, MLP, norms: as they were
    assert f"0 key-shared 1,024 256 {rest:,} {rest:,} " in words
    assert f"1 dense 1,024 1,024 {rest:,} {rest:,} " in words
    assert f"{told['parameters']['after']:,}" in words
    assert "key-shared in layer 0, dense in layer 1" in words


def test_a_real_exact_fold_is_shown(tiny_checkpoint, tmp_path, report, monkeypatch):
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.conversion.exact import convert_exact
    from qectomy.conversion.settings import ConvertSettings

    reload_here(monkeypatch)
    source, out = tiny_checkpoint("gpt2"), tmp_path / "out"
    convert_exact(open_checkpoint(source), out, ConvertSettings(texts=(), context=32))
    assert report(out)[0] == 0
    words = " ".join(re.sub(r"<[^>]*>", " ", (out / "report.html").read_text()).split())
    assert "Lossless" in words
    assert "folded exactly" in words


def test_the_templates_travel_with_the_package():
    templates = Path(writing.__file__).parent / "templates"
    assert {"page.html", "blocks.html", "page.css"} == {path.name for path in templates.iterdir()}
