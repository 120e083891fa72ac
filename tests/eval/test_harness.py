"""lm-evaluation-harness on checkpoints: the numbers are those of a loop of our own, and of a stranger's lm_eval."""

import gc
import json
import math
import re
import shutil
import subprocess
import weakref
from pathlib import Path

import pytest
import torch
from damage import edit_weights
from lm_eval_tasks import LINES, QUESTIONS, write_tasks
from strangers import make_stranger, strange_environment
from tiny_models import EVERY_MAP, bos_tokenizer, load_reduced, tiny_tokenizer
from transformers import AutoModelForCausalLM

from qectomy.errors import CheckpointError, NonFiniteError, QectomyError, TextError
from qectomy.eval import harness
from qectomy.eval.harness import HarnessSettings, run_harness
from qectomy.eval.harness_tasks import check_tasks
from qectomy.record.evaluation import Harness

LENGTH = 128  # positions of the tiny models


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint, tiny_reduced) -> dict[str, Path]:
    layers = len(EVERY_MAP)
    return {
        "gpt2": tiny_checkpoint("gpt2", num_hidden_layers=layers),
        "reduced-gpt2": tiny_reduced(EVERY_MAP, "gpt2"),
        "llama": tiny_checkpoint("llama", num_hidden_layers=layers),
        "reduced-llama": tiny_reduced(EVERY_MAP, "llama"),
    }


def model_of(path: Path) -> torch.nn.Module:
    if "query_maps" in json.loads((path / "config.json").read_text()):
        return load_reduced(path)
    return AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def log_likelihood(model, context: list[int], target: list[int], length: int = LENGTH) -> float:
    """Log-probability of the target after the context, cut on the left to `length` inputs, one token at a time."""
    ids = (context + target)[-(length + 1) :]
    total = 0.0
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    for position in range(len(ids) - len(target), len(ids)):
        row = logits[position - 1]
        total += float(row[ids[position]] - row.logsumexp(0))
    return total


def rolled(model, tokenizer, line: str) -> float:
    """Log-likelihood of a line after BOS; a longer one in chunks, each after as much of it as fits before."""
    ids = [tokenizer.bos_token_id, *tokenizer(line, add_special_tokens=False)["input_ids"]]
    total, scored = 0.0, 1
    while scored < len(ids):
        stop = min(scored + LENGTH, len(ids))
        start = max(0, stop - LENGTH - 1)
        total += log_likelihood(model, ids[start:scored], ids[scored:stop])
        scored = stop
    return total


def expected_lines(model) -> dict[str, float]:
    total = sum(rolled(model, tiny_tokenizer(), line) for line in LINES)
    words = sum(len(re.split(r"\s+", line)) for line in LINES)
    n_bytes = sum(len(line.encode()) for line in LINES)
    return {
        "word_perplexity": math.exp(-total / words),
        "byte_perplexity": math.exp(-total / n_bytes),
        "bits_per_byte": -total / n_bytes / math.log(2),
    }


def expected_quiz(model, tokenizer, length: int = LENGTH) -> dict[str, tuple[float, float | None]]:
    """{metric: (value, its standard error)}"""
    found: dict[str, list[float]] = {"acc": [], "acc_norm": [], "brier_score": []}
    for question, choices, answer in QUESTIONS:
        context = tokenizer(question)["input_ids"]
        scores = []
        for choice in choices:
            whole = tokenizer(f"{question} {choice}")["input_ids"]
            scores.append(log_likelihood(model, context, whole[len(context) :], length))
        normed = [score / len(choice) for score, choice in zip(scores, choices, strict=True)]
        found["acc"].append(float(scores.index(max(scores)) == answer))
        found["acc_norm"].append(float(normed.index(max(normed)) == answer))
        shares = [math.exp(score - max(scores)) for score in scores]
        shares = [share / sum(shares) for share in shares]
        found["brier_score"].append(sum((share - (k == answer)) ** 2 for k, share in enumerate(shares)))
    n = len(QUESTIONS)
    means = {metric: sum(values) / n for metric, values in found.items()}
    errors = {metric: math.sqrt(means[metric] * (1 - means[metric]) / (n - 1)) for metric in ("acc", "acc_norm")}
    return {metric: (mean, errors.get(metric)) for metric, mean in means.items()}


def rows_of(result, task: str) -> dict[str, dict]:
    return {row.metric: row for row in result.tasks if row.task == task}


@pytest.fixture(scope="module")
def everything(folder, checkpoints):
    """All checkpoints on all tasks in one call."""
    tasks = check_tasks(["everything", "quiz-alone"], folder)
    return run_harness([str(path) for path in checkpoints.values()], tasks)


@pytest.mark.parametrize("index, name", [*enumerate(["gpt2", "reduced-gpt2", "llama", "reduced-llama"])])
def test_the_numbers_are_those_of_a_plain_loop(everything, checkpoints, index, name):
    model = model_of(checkpoints[name])
    found = rows_of(everything, "lines")
    expected = expected_lines(model)
    assert found.keys() == expected.keys()
    for metric, value in expected.items():
        entry = found[metric].values[index]
        assert (entry.checkpoint, entry.stderr) == (str(checkpoints[name]), None)
        assert entry.value == pytest.approx(value, rel=1e-4)
        assert found[metric].higher_is_better is False
    found = rows_of(everything, "quiz")
    for metric, (share, error) in expected_quiz(model, tiny_tokenizer()).items():
        assert found[metric].values[index].value == pytest.approx(share, rel=1e-4), metric
        assert found[metric].values[index].stderr == (error and pytest.approx(error)), metric
        assert found[metric].higher_is_better is (metric != "brier_score")


def test_the_checkpoints_and_the_metrics_tell_apart(everything):
    """What the test above compares is not the same everywhere."""
    for task, metric in (("lines", "bits_per_byte"), ("quiz", "brier_score")):
        values = [value.value for value in rows_of(everything, task)[metric].values]
        assert len({round(value, 3) for value in values}) == 4
    quiz = rows_of(everything, "quiz")
    assert len({value.value for value in quiz["acc"].values}) > 1
    assert [value.value for value in quiz["acc"].values] != [v.value for v in quiz["acc_norm"].values]


def test_a_group_stands_over_its_tasks(everything):
    assert [(row.task, row.group) for row in everything.tasks] == [
        ("everything", None),
        *[("quiz", "everything")] * 3,
        *[("lines", "everything")] * 3,
        *[("quiz-alone", None)] * 3,
    ]
    n = len(QUESTIONS)
    (group,) = rows_of(everything, "everything").values()
    task = rows_of(everything, "quiz")["acc"]
    assert group.values == task.values
    assert (group.n, task.n, rows_of(everything, "lines")["bits_per_byte"].n) == (n, n, 3)
    assert (group.version, rows_of(everything, "lines")["bits_per_byte"].version) == (None, 3)


def test_the_settings_are_recorded_and_it_is_json(everything):
    assert Harness.model_validate(json.loads(everything.as_json())) == everything
    settings = everything.settings
    assert everything.version.split(".")[:2] == ["0", "4"]
    assert (settings.max_length, settings.limit, settings.num_fewshot) == (LENGTH, None, None)
    assert settings.dtype == ["float32"] * 4
    assert settings.truncated == [0] * 4
    assert settings.seeds == {"python": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}


def test_a_tag_is_its_tasks_and_none_is_listed_twice(folder, checkpoints, capsys):
    tasks = check_tasks(["asked", " quiz", "quiz", ""], folder)
    result = run_harness([str(checkpoints["llama"])], tasks, HarnessSettings(limit=3))
    assert [(row.task, row.group, row.metric) for row in result.tasks] == [
        (task, "asked", metric) for task in ("quiz", "quiz-alone") for metric in ("acc", "acc_norm", "brier_score")
    ]
    assert {row.n for row in result.tasks} == {3}
    assert capsys.readouterr().out == ""


def test_nothing_but_progress_is_printed(folder, checkpoints, capfd):
    """Not the bars of lm-eval, not what a task prints to stdout."""
    seen = []
    names = [str(checkpoints["gpt2"]), str(checkpoints["llama"])]
    run_harness(names, check_tasks(["lines", "quiz"], folder), progress=lambda *report: seen.append(report))
    out, err = capfd.readouterr()
    assert out == ""
    assert set(err.split("\n")) <= {"noise", ""}
    assert seen == [
        (0, 4, f"{names[0]}: loading"),
        (0, 4, f"{names[0]}: lines"),
        (1, 4, f"{names[0]}: quiz"),
        (2, 4, f"{names[1]}: loading"),
        (2, 4, f"{names[1]}: lines"),
        (3, 4, f"{names[1]}: quiz"),
        (4, 4, ""),
    ]


def test_one_model_is_in_memory_at_a_time(folder, checkpoints, monkeypatch):
    alive: list[weakref.ref] = []
    load = harness.load_model

    def watched(*arguments):
        assert not any(ref() is not None for ref in alive)
        loaded = load(*arguments)
        gc.disable()  # so that nothing but its last reference ends a model
        alive.append(weakref.ref(loaded[0]))
        return loaded

    monkeypatch.setattr(harness, "load_model", watched)
    try:
        run_harness([str(path) for path in checkpoints.values()], check_tasks(["quiz"], folder))
    finally:
        gc.enable()
    assert len(alive) == 4


def test_long_questions_are_cut_on_the_left_and_counted(folder, checkpoints):
    result = run_harness([str(checkpoints["llama"])], check_tasks(["quiz"], folder), HarnessSettings(max_length=33))
    expected = expected_quiz(model_of(checkpoints["llama"]), tiny_tokenizer(), length=33)
    for metric, row in rows_of(result, "quiz").items():
        assert row.values[0].value == pytest.approx(expected[metric][0])
    texts = {f"{question} {choice}" for question, choices, _ in QUESTIONS for choice in choices}  # each is run once
    sizes = [len(tiny_tokenizer()(text)["input_ids"]) for text in texts]
    assert result.settings.truncated == [sum(size > 34 for size in sizes)]
    assert 0 < result.settings.truncated[0] < len(sizes)


def test_a_tokenizer_that_adds_bos(folder, checkpoints, tmp_path):
    path = Path(shutil.copytree(checkpoints["llama"], tmp_path / "bos"))
    bos_tokenizer().save_pretrained(path)
    result = run_harness([str(path), str(checkpoints["llama"])], check_tasks(["quiz"], folder))
    expected = expected_quiz(model_of(path), bos_tokenizer())
    for metric, row in rows_of(result, "quiz").items():
        assert row.values[0].value == pytest.approx(expected[metric][0])
    assert expected != expected_quiz(model_of(path), tiny_tokenizer())


def test_code_in_a_folder_is_not_run(folder, checkpoints, everything, tmp_path):
    path = Path(shutil.copytree(checkpoints["reduced-gpt2"], tmp_path / "evil"))
    (path / "modeling_qectomy_gpt2.py").write_text("raise SystemExit('was run')")
    result = run_harness([str(path)], check_tasks(["quiz"], folder))
    (found,) = rows_of(result, "quiz")["brier_score"].values
    assert found.value == pytest.approx(rows_of(everything, "quiz")["brier_score"].values[1].value)


def test_examples_before_a_question(folder, checkpoints, everything):
    """Asked for, they are given, but not to a task that says 0; the same ones to every checkpoint."""
    names = [str(checkpoints["gpt2"])] * 2
    result = run_harness(names, check_tasks(["quiz", "quiz-alone"], folder, num_fewshot=2))
    assert [row.num_fewshot for row in result.tasks] == [2, 2, 2, 0, 0, 0]
    assert result.settings.num_fewshot == 2
    for row in result.tasks:
        assert row.values[0] == row.values[1]
    changed, same = (
        [rows_of(found, task)["brier_score"].values[0].value for found in (result, everything)]
        for task in ("quiz", "quiz-alone")
    )
    assert abs(changed[0] - changed[1]) > 1e-3
    assert same[0] == pytest.approx(same[1])


COMMANDS = """
import importlib.util, json, sys
from lm_eval.__main__ import cli_evaluate
from lm_eval.tasks import manager

assert importlib.util.find_spec("qectomy") is None
manager.__file__ = "nowhere/manager.py"  # leaves out lm-eval's own tasks, which take ten seconds to list
for command in json.loads(sys.argv[1]):
    sys.argv = command
    cli_evaluate()
"""


@pytest.fixture(scope="module")
def strangers_results(folder, checkpoints, tmp_path_factory):
    """What the lm_eval command of someone without qectomy says of the reduced checkpoints, by name."""
    home = tmp_path_factory.mktemp("stranger")
    python, commands = make_stranger(home), []
    for name in ("reduced-gpt2", "reduced-llama"):
        options = {
            "--model": "hf",
            "--model_args": f"pretrained={checkpoints[name]},trust_remote_code=True",
            "--tasks": "lines,quiz",
            "--include_path": str(folder),
            "--device": "cpu",
            "--batch_size": "4",
            "--num_fewshot": "1",
            "--output_path": str(home / name),
        }
        commands.append(["lm_eval", *(word for pair in options.items() for word in pair)])
    done = subprocess.run(
        [python, "-c", COMMANDS, json.dumps(commands)],
        env=strange_environment(home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    written = {name: next((home / name).rglob("results_*.json")) for name in ("reduced-gpt2", "reduced-llama")}
    return {name: json.loads(path.read_text())["results"] for name, path in written.items()}


@pytest.mark.parametrize("name", ["reduced-gpt2", "reduced-llama"])
def test_a_strangers_lm_eval_says_the_same(strangers_results, folder, checkpoints, name):
    result = run_harness([str(checkpoints[name])], check_tasks(["lines", "quiz"], folder, num_fewshot=1))
    assert len(result.tasks) == 6
    for row in result.tasks:
        theirs = strangers_results[name][row.task]
        (value,) = row.values
        assert theirs[f"{row.metric},none"] == pytest.approx(value.value, rel=1e-5), row.metric
        stderr = theirs[f"{row.metric}_stderr,none"]
        assert stderr == ("N/A" if value.stderr is None else pytest.approx(value.stderr, rel=1e-5))


def test_not_a_number_is_refused(folder, tiny_copy):
    """An accuracy would not show it: of logits that are all NaN, the first choice is the likeliest."""
    path = tiny_copy("gpt2")
    edit_weights(path, lambda tensors: tensors["transformer.ln_f.weight"].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=f"lm-eval task 'quiz' with {re.escape(str(path))}: .*NaN or Inf"):
        run_harness([str(path)], check_tasks(["quiz"], folder))


def test_a_result_too_large_to_be_a_number_is_refused(folder, tiny_copy):
    path = tiny_copy("llama")
    edit_weights(path, lambda tensors: tensors["lm_head.weight"].mul_(1e4))
    with pytest.raises(NonFiniteError, match=r"lm-eval task 'lines' with .*(too large|is inf)"):
        run_harness([str(path)], check_tasks(["lines"], folder))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_result_that_is_no_number_is_refused(checkpoints, tmp_path, value):
    own = write_tasks(tmp_path)
    (own / "own.py").write_text(f"def results(doc, found):\n    return {{'odd': float('{value}')}}\n")
    text = (own / "quiz.yaml").read_text().replace("output_type", "process_results: !function own.results\noutput_type")
    text = text[: text.index("  - {metric: acc,")] + "  - {metric: odd, aggregation: mean, higher_is_better: true}\n"
    (own / "quiz.yaml").write_text(text)
    with pytest.raises(NonFiniteError, match=f"lm-eval task 'quiz' with .*gpt2.*: odd is {value}, which compares"):
        run_harness([str(checkpoints["gpt2"])], check_tasks(["quiz"], own))


def test_what_would_fail_late_fails_first(folder, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "load_model", lambda *arguments: pytest.fail("a model was loaded"))
    tasks, good = check_tasks(["quiz"], folder), str(checkpoints["gpt2"])
    bare = Path(shutil.copytree(checkpoints["llama"], tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    with pytest.raises(CheckpointError, match="no tokenizer"):
        run_harness([good, str(bare)], tasks)
    with pytest.raises(CheckpointError, match="no folder"):
        run_harness([good, str(tmp_path / "absent")], tasks)
    with pytest.raises(TextError, match=f"a length of 129 tokens is more than the 128 positions of {re.escape(good)}"):
        run_harness([good], tasks, HarnessSettings(max_length=129))


def test_a_task_that_fails_while_it_runs(checkpoints, tmp_path):
    own = write_tasks(tmp_path)
    text = (own / "quiz.yaml").read_text()
    (own / "quiz.yaml").write_text(text.replace('"{{question}}"', "!function ask.once"))
    (own / "ask.py").write_text(
        f"def once(doc):\n    assert doc['question'] == {QUESTIONS[0][0]!r}\n    return 'Once'\n"
    )
    with pytest.raises(
        QectomyError, match=r"lm-eval task 'quiz' failed with .*: AssertionError: assert doc\['question'\] == "
    ):
        run_harness([str(checkpoints["gpt2"])], check_tasks(["quiz"], own))
