"""What people see of lm-evaluation-harness: every number in its place, and names as they are."""

import pytest

from qectomy.record.evaluation import Harness
from qectomy.report.harness_table import show_harness
from qectomy.report.tables import console

SETTINGS = dict(limit=None, num_fewshot=None, max_length=2048, dtype=["float32", "bfloat16"], truncated=[0, 0])
SETTINGS |= dict(batch_size=8, device="cpu", bootstrap_iters=1000, seeds={"torch": 0}, seconds=[1.0, 2.0])


def row(task, metric, values, *, group=None, better=True, filter_name="none"):
    return {
        "task": task,
        "group": group,
        "metric": metric,
        "filter": filter_name,
        "higher_is_better": better,
        "n": 1234,
        "values": [
            {"checkpoint": name, "value": value, "stderr": error}
            for name, (value, error) in zip(("[red]a[/]", "b", "c"), values, strict=False)
        ],
    }


@pytest.fixture
def printed(monkeypatch, capsys):
    """A function that shows a result on a wide console and returns the lines."""
    monkeypatch.setattr(console, "_width", 200)  # COLUMNS is not asked where TERM says that there is no terminal
    monkeypatch.setattr(console, "_height", 50)

    def show(tasks, **settings):
        show_harness(
            Harness.model_validate({"version": "0.4.13", "tasks": tasks, "settings": {**SETTINGS, **settings}})
        )
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return show


def test_values_errors_directions_and_differences(printed):
    text = printed(
        [
            row("whole", "acc", [(0.5, 0.01), (0.4375, 0.02)]),
            row("part", "acc", [(0.25, None), (0.5, None)], group="whole", filter_name="strict"),
            row("part", "word_perplexity", [(123.456, None), (130.0, None)], group="whole", better=False),
            row("own", "odd", [(12345.6, 100.4), (2.0, 0.125)], better=None),
        ]
    )
    assert "┃ task ┃ metric ┃ n ┃ [red]a[/] ┃ b ┃ difference ┃" in text
    assert "│ whole │ acc ↑ │ 1,234 │ 0.5000 ± 0.0100 │ 0.4375 ± 0.0200 │ -0.0625 │" in text
    assert "│ part │ acc (strict) ↑ │ 1,234 │ 0.2500 │ 0.5000 │ +0.2500 │" in text
    assert "│ │ word_perplexity ↓ │ 1,234 │ 123.46 │ 130.00 │ +6.54 │" in text
    assert "│ own │ odd │ 1,234 │ 12,346 ± 100 │ 2.0000 ± 0.1250 │ -12,344 │" in text
    assert "lm-eval 0.4.13, every document, examples as the tasks say, at most 2048 tokens, float32, bfloat16" in text
    assert not any("cut" in line for line in text)


def test_one_checkpoint_has_no_difference_and_three_have_two(printed):
    text = printed([row("t", "acc", [(0.5, None)])])
    assert "│ t │ acc ↑ │ 1,234 │ 0.5000 │" in text
    assert not any("difference" in line for line in text)
    text = printed([row("t", "acc", [(0.5, None), (0.25, None), (0.75, None)])])
    assert "│ t │ acc ↑ │ 1,234 │ 0.5000 │ 0.2500 │ -0.2500 │ 0.7500 │ +0.2500 │" in text


def test_what_limits_the_numbers_is_said(printed):
    text = " ".join(printed([row("t", "acc", [(0.5, None)])], limit=1000, num_fewshot=5, truncated=[3, 0]))
    assert "the first 1,000 documents of a task, 5 examples" in text
    assert "texts cut on the left to fit, by checkpoint: 3, 0" in text
    assert printed([]) == ["lm-eval: no task gave a number"]
