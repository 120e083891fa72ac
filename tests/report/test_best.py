"""The best measurement makes the verdict, in the page, the card and the terminal; no other checkpoint's does."""

import sys
from dataclasses import replace

import page_folders
import pytest
from conversions import convert_tiny

from qectomy.cli import main
from qectomy.report.card_verdict import END, START
from qectomy.report.page import verdict as verdict_module
from qectomy.report.page.best import best_measurement
from qectomy.report.page.compare import summary
from qectomy.report.page.page import page
from qectomy.report.page.reading import read_folder
from qectomy.report.page.verdict import checks, judged

MINE, ORIGINAL, OTHER = ("a" * 32, "b" * 32, "c" * 32)


def short_report():
    """A fit that was measured on 2,000 tokens."""
    report = page_folders.full_report()
    report["source"]["fingerprint"] = ORIGINAL
    report["perplexity"] |= {"ratio": 1.01, "ratio_95": [0.99, 1.04], "windows": 4}
    report["perplexity"]["protocol"] |= {"scored_tokens": 2_000}
    return report


def evaluation(tokens=20_000, interval=(1.01, 1.03), first=ORIGINAL, second=MINE, text=page_folders.SHA):
    protocol = {**page_folders._protocol(), "scored_tokens": tokens, "text_sha256": text}
    found = page_folders.full_evaluation()
    original, mine = found["results"]
    original |= {"checkpoint": "./original", "fingerprint": first, "perplexity": 20.0, "protocol": protocol}
    mine |= {"checkpoint": "./mine", "fingerprint": second, "perplexity": 20.4, "protocol": protocol}
    mine["overlap"] = protocol["overlap"]
    mine["paired"] |= {"against": "./original", "ratio": 1.02, "ratio_95": interval, "windows": 40}
    return found


@pytest.fixture
def folder(tmp_path):
    """Return a function (report, evaluation) -> Folder, whose files have the fingerprint MINE."""

    def make(report=None, found=None):
        written = page_folders.write_folder(
            tmp_path / "reduced", report or short_report(), **({"evaluation": found} if found else {})
        )
        return replace(read_folder(written), fingerprint=MINE)

    return make


def test_a_saved_measurement_on_more_tokens_makes_the_verdict(folder):
    assert judged(folder()).word == "Close, on little text"
    found = folder(found=evaluation())
    assert judged(found).word == "Close"
    assert judged(found).rule == (
        "the upper end of the ratio’s 95 % interval on 20,000 tokens (evaluation.json) is 1.0300, at most 1.05"
    )
    html = page([found])
    assert "1.0200</strong><span>95 %: [1.0100, 1.0300]; by evaluation.json" in html
    assert "Perplexity is measured on 20,000 tokens (evaluation.json)." in html
    assert "The verdict goes by this measurement" in html
    assert "on little text" not in html
    row = summary([found], [])["folders"][0]
    assert (row["verdict"], row["ratio"]) == ("Close", 1.02)


def test_a_saved_measurement_can_also_be_the_worse_news(folder):
    assert judged(folder(found=evaluation(interval=(1.04, 1.2)))).word == "Heal before use"


@pytest.mark.parametrize(
    "change",
    [
        dict(second=OTHER),  # another checkpoint, or this one before it was healed
        dict(first=OTHER),  # against no original: say another reduced one
        dict(first=MINE, second=MINE),
        dict(tokens=1_999),
        dict(interval=None),
        dict(text=page_folders.OTHER_SHA),  # it was fitted on that
        dict(tokens=2_000, interval=(0.98, 1.04)),  # as many, a wider interval
    ],
)
def test_what_is_no_better_measurement_of_this_checkpoint_does_not(folder, change):
    found = folder(found=evaluation(**change))
    assert best_measurement(found).file == "qectomy.json"
    assert judged(found).word == "Close, on little text"


def test_of_as_many_tokens_the_narrower_interval_counts(folder):
    found = folder(found=evaluation(tokens=2_000, interval=(1.0, 1.04)))
    assert best_measurement(found).file == "evaluation.json"


def test_a_measurement_against_what_is_not_known_as_the_original_is_told(folder):
    found = folder(short_report(), evaluation(first=OTHER))
    assert judged(found).word == "Close, on little text"
    told = [check.text for check in checks(found) if check.holds is None]
    assert any("its first checkpoint is not known, by its files, to be the original" in text for text in told)
    assert not any("not known, by its files" in check.text for check in checks(folder(found=evaluation())))


def test_a_checkpoint_that_was_renewed_is_still_known_by_its_older_files(folder):
    report = short_report() | {
        "renewed": {"qectomy": "0.1.0", "created": "2026-11-26T10:36:08+00:00", "fingerprints": [OTHER]}
    }
    assert judged(folder(report, evaluation(second=OTHER))).word == "Close"


def test_a_proof_is_not_measured_away(folder):
    report = page_folders.exact_report()
    report["source"]["fingerprint"] = ORIGINAL
    assert judged(folder(report, evaluation(interval=(1.0, 3.0)))).word == "Lossless"


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qectomy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        found = capsys.readouterr()
        assert not stop.value.code, found.err
        return found.out

    return run


def test_what_the_verdict_advises_changes_it(cli, tiny_checkpoint, raven, tmp_path, monkeypatch):
    """From end to end: measured on little, then as advised, in the page, the card and the terminal."""
    monkeypatch.setattr(verdict_module, "FEW_TOKENS", 400)
    monkeypatch.setattr(verdict_module, "CLOSE", 2.0)
    original, reduced = tiny_checkpoint(), tmp_path / "reduced"
    convert_tiny(original, reduced, "key-shared", raven)
    card, html = reduced / "README.md", reduced / "report.html"
    assert "Close, on little text" in card.read_text()
    card.write_text(card.read_text().replace("## Limits", "My own words.\n\n## Limits"))
    assert "Close, on little text" in cli("report", reduced)
    assert "Close, on little text" in html.read_text()
    told = ["--text", raven, "--context", "32", "--save", reduced / "evaluation.json"]
    cli("eval", original, reduced, *told)
    said = cli("report", reduced)
    assert f"wrote the verdict in {reduced / 'README.md'} anew\n" in said
    for text in (said, html.read_text(), card.read_text()):
        assert "Close" in text
        assert "Close, on little text" not in text
    assert "(evaluation.json)" in card.read_text()
    assert card.read_text().count(START) == card.read_text().count(END) == 1
    assert "My own words." in card.read_text()
    assert "anew" not in cli("report", reduced), "nothing has changed since"


def test_a_card_without_the_marks_or_a_link_stays(cli, tmp_path):
    folder = page_folders.write_folder(tmp_path / "reduced", short_report())
    card, elsewhere = folder / "README.md", tmp_path / "elsewhere.md"
    card.write_text(f"mine {END}")
    cli("report", folder)
    assert card.read_text() == f"mine {END}"
    elsewhere.write_text(f"{START}{END}")
    card.unlink()
    card.symlink_to(elsewhere)
    cli("report", folder)
    assert card.is_symlink()
    assert elsewhere.read_text() == f"{START}{END}"
