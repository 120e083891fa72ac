"""Recipes that leave layers as they were: one share of W_Q in every place, and no ratio of two numbers near zero."""

import re

import page_folders
import pytest
from conversions import convert_tiny

from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.record.reduced import AttentionKL, Exact, Fitted, FittedLayer, Plan, read_reduced
from qectomy.report.model_card import model_card
from qectomy.report.page import quality
from qectomy.report.page.page import page
from qectomy.report.page.reading import read_folder
from qectomy.report.page.verdict import checks, heldout_ratio
from qectomy.report.query_share import query_share
from qectomy.report.tables import show_conversion, show_plan

ONE_LAYER = 9_953_280 // 30


def mixed_report(kl=(2e-8, 4e-7)):
    """Three of thirty layers are `key-shared`, whose held-out KL is 1.5 times the fitted one; all others are dense."""
    report = page_folders.full_report()
    for layer in report["layers"]:
        fitted, heldout = (0.02, 0.03) if layer["index"] < 3 else kl
        layer |= {"map": "key-shared" if layer["index"] < 3 else "dense"}
        layer["attention_kl"] = {"fitted": fitted, "heldout": heldout}
    report["query_parameters"] = {"before": 3 * ONE_LAYER, "after": 3 * ONE_LAYER // 9}
    return report


@pytest.fixture
def folder(tmp_path):
    return lambda report: read_folder(page_folders.write_folder(tmp_path / "mixed", report))


def fit_check(folder):
    return [check for check in checks(folder) if "Held-out attention error" in check.text]


# Ratios


@pytest.mark.parametrize("kl", [(2e-8, 4e-7), (1e-3, 0.5), (0.0, 0.0)])
def test_dense_layers_take_no_part_in_the_ratio_of_held_out_to_fitted(folder, kl):
    """What they are off by comes from the layers before them, and more calibration tokens would not change it."""
    (check,) = fit_check(folder(mixed_report(kl)))
    assert check.holds
    assert "in the 3 layers that were fitted is 1.50 times the fitted one: the fit carries over" in check.text


def test_a_uniform_recipe_has_the_ratio_of_all_its_layers(folder):
    (check,) = fit_check(folder(page_folders.full_report()))
    assert "Held-out attention error is 1." in check.text


def layer_of(fitted, heldout):
    return FittedLayer(index=0, map="select", attention_kl=AttentionKL(fitted=fitted, heldout=heldout))


def test_roundings_have_no_ratio(folder):
    """Say of W_Q that was the identity already: both KL are what float32 leaves."""
    report = mixed_report()
    for layer in report["layers"]:
        layer["attention_kl"] = {"fitted": 3e-8, "heldout": 9e-7}
    assert fit_check(folder(report)) == []
    assert heldout_ratio(layer_of(3e-8, 9e-7)) is None
    assert heldout_ratio(layer_of(1e-5, 2e-5)) == pytest.approx(2)


def test_the_layers_are_shown_without_ratios_of_dense_ones(folder, monkeypatch):
    drawn, chart = [], quality.layer_chart
    monkeypatch.setattr(quality, "layer_chart", lambda key, rows: (drawn.extend(rows), chart(key, rows))[1])
    html = page([folder(mixed_report())])
    table = re.search(r"Attention KL by layer.*?</table>", html, re.DOTALL)[0]
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in re.findall(r"<tr>.*?</tr>", table, re.DOTALL)[1:]]
    assert [row[4] for row in rows if row[1] == "key-shared"] == ["1.50"] * 3
    dense = [row for row in rows if row[1] == "dense"]
    assert len(dense) == 27
    assert all(row[-3] == "–" for row in dense), dense[0]  # then the seconds and their unit
    assert [index for index, *_ in drawn] == [0, 1, 2]
    assert "A dense layer was not fitted: it has no ratio" in html


# Shares


def test_the_share_is_of_all_layers(folder):
    found = query_share(Fitted.model_validate(mixed_report()))
    assert (found.before, found.after) == (30 * ONE_LAYER, 30 * ONE_LAYER - 3 * ONE_LAYER * 8 / 9)
    assert found.removed == pytest.approx(0.1 * 8 / 9)
    assert found.of_reduced == pytest.approx(8 / 9)
    assert found.words == "of all 30 layers; 88.9 % of the 3 reduced"
    assert query_share(Fitted.model_validate(page_folders.full_report())).words == "of all layers"
    assert query_share(Exact.model_validate(page_folders.exact_report())) is None


def test_an_exact_fold_counts_every_layer():
    """Its query_parameters are of all of them, also of those whose map is called dense."""
    report = page_folders.exact_report() | {"query_parameters": {"before": 300, "after": 270}}
    report["layers"][0]["map"] = "gauge"
    found = query_share(Exact.model_validate(report))
    assert (found.before, found.removed, found.words) == (300, pytest.approx(0.1), "of all layers")


def test_every_place_says_the_same_share(folder):
    alone = page([folder(mixed_report())])
    assert "<dt>W<sub>Q</sub> removed</dt><dd><strong>8.9 %</strong><span>of all 30 layers; 88.9 % of the 3" in alone
    row = re.search(r"W<sub>Q</sub> of all layers, and what stands in its place.*?</tr>", alone, re.DOTALL)[0]
    assert re.sub(r"<[^>]*>", " ", row).split()[-5:] == ["9,953,280", "9,068,544", "884,736", "8.89", "%"]
    several = page([folder(mixed_report())] * 2)
    table = re.search(r"All that is compared.*?</table>", several, re.DOTALL)[0]
    assert "W<sub>Q</sub> removed" in table
    assert "8.9 %" in table
    assert "88.9 %" not in table


def test_terminal_card_and_page_of_a_real_folder_agree(tiny_checkpoint, raven, tmp_path, capsys):
    source = tiny_checkpoint("llama", num_hidden_layers=3)
    convert_tiny(source, tmp_path / "out", "0=key-shared,1-2=dense", raven)
    report = read_reduced(tmp_path / "out/qectomy.json")
    share = query_share(report)
    assert share.removed == pytest.approx(share.of_reduced / 3)
    said = f"W_Q removed {100 * share.removed:.1f} %, of all 3 layers; {100 * share.of_reduced:.1f} % of the 1 reduced"
    show_conversion(report)
    assert said in " ".join(capsys.readouterr().out.split())
    needs = {"peak_memory_bytes": 1, "peak_memory_stage": "x", "disk_bytes": 1, "seconds": None, "stages": {}}
    show_plan(Plan(**dict(report) | {"plan": ["key-shared", "dense", "dense"], "needs": needs}))
    assert said in " ".join(capsys.readouterr().out.split())
    row = (
        f"| of which W_Q, and what stands in its place | {share.before:,.0f} | {share.after:,.0f} ({share.removed:.1%}"
    )
    assert row in model_card(report, open_checkpoint(source))
    assert f"{100 * share.removed:.1f} %</strong><span>of all 3 layers" in page([read_folder(tmp_path / "out")])
