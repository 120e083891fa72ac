"""The curve: rows out of Trainer's log, the CSV and the picture."""

import csv
import math

import pytest
from matplotlib.image import imread

from qectomy.healing.curve import curve_of, write_curve
from qectomy.record.healing import CurveRow

HISTORY = [
    {"eval_objective": 2.0, "eval_kl": 1.5, "eval_nll": 3.0, "step": 0},
    {"loss": 1.9, "learning_rate": 1e-3, "grad_norm": 0.5, "step": 1},
    {"loss": 1.5, "learning_rate": 2e-3, "step": 2},
    {"eval_objective": 1.25, "eval_kl": 1.0, "eval_nll": 2.5, "step": 2},
    {"loss": 1.0, "learning_rate": 5e-4, "step": 3},
    {"eval_objective": 1.5, "eval_kl": 1.25, "eval_nll": 2.75, "step": 4},
    {"train_runtime": 3.0, "train_loss": 1.4, "step": 4},
]


def test_a_row_for_each_validation():
    rows = curve_of(HISTORY, 128)
    assert [row.step for row in rows] == [0, 2, 4]
    assert [row.tokens for row in rows] == [0, 256, 512]
    assert [row.train_loss for row in rows] == [None, pytest.approx(1.7), 1.0]
    assert [row.validation_loss for row in rows] == [2.0, 1.25, 1.5]
    assert [row.validation_kl for row in rows] == [1.5, 1.0, 1.25]
    assert [row.validation_perplexity for row in rows] == [math.exp(x) for x in (3.0, 2.5, 2.75)]
    assert [row.learning_rate for row in rows] == [None, 2e-3, 5e-4]


def test_a_step_that_was_validated_again_after_a_resume_is_one_row():
    again = {"eval_objective": 1.2, "eval_kl": 0.9, "eval_nll": 2.4, "step": 2}
    rows = curve_of([*HISTORY, again], 128)
    assert [row.step for row in rows] == [0, 2, 4]
    assert rows[1].validation_loss == 1.2


def test_the_files(tmp_path):
    rows = curve_of(HISTORY, 128)
    write_curve(tmp_path, rows, 5.0, 2)
    text = (tmp_path / "healing.csv").read_bytes().decode()
    assert text.splitlines()[0] == ",".join(CurveRow.model_fields)
    assert "\r" not in text
    read = list(csv.DictReader(text.splitlines()))
    for row, line in zip(rows, read, strict=True):
        assert {name: float(value) if value else None for name, value in line.items()} == row.model_dump()
    picture = imread(tmp_path / "healing.png")
    height, width = picture.shape[:2]
    assert 600 <= width <= 2000
    assert 400 <= height <= 1500
    colours = {tuple(pixel) for pixel in (picture[..., :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {(255, 255, 255), (0x1F, 0x5F, 0xA8), (0xC8, 0x10, 0x2E)} <= colours  # paper, curve, and the one kept
    assert {path.name for path in tmp_path.iterdir()} == {"healing.csv", "healing.png"}


def test_the_kept_point_is_marked_where_it_lies(tmp_path):
    places = {}
    for best in (0, 2, 4):
        (tmp_path / str(best)).mkdir()
        write_curve(tmp_path / str(best), curve_of(HISTORY, 128), 5.0, best)
        pixels = (imread(tmp_path / str(best) / "healing.png")[..., :3] * 255).round().astype(int)
        _, columns = (pixels == [0xC8, 0x10, 0x2E]).all(-1).nonzero()
        places[best] = min(columns)
    assert places[0] < places[2] < places[4]


def test_a_single_validation_is_drawn(tmp_path):
    write_curve(tmp_path, curve_of(HISTORY[:1], 128), 5.0, 0)
    assert imread(tmp_path / "healing.png").shape[0] > 400
    assert len((tmp_path / "healing.csv").read_text().splitlines()) == 2
