"""Finding tasks of lm-evaluation-harness: the folder's own first, and a clear word on each that cannot be had."""

import re
from pathlib import Path

import pytest
from lm_eval_tasks import QUESTIONS, write_tasks

from qectomy.eval.harness_tasks import TaskError, check_tasks


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder of tasks to add broken ones to."""
    (tmp_path / "own").mkdir()
    return write_tasks(tmp_path / "own")


@pytest.fixture
def few_built_in(monkeypatch, tmp_path):
    """Let lm-eval's own tasks be two, quick to list; return the list of whether they were listed."""
    from lm_eval import tasks

    built_in = tmp_path / "built-in"
    built_in.mkdir()
    for name in ("hellaswag", "quiz"):
        (built_in / f"{name}.yaml").write_text(f"task: {name}\ndataset_path: nobody/nothing\ntest_split: test\n")
    listed = []

    class Manager(tasks.TaskManager):
        def __init__(self, include_path=None, include_defaults=True):
            listed.append(include_defaults)
            paths = ([built_in] if include_defaults else []) + ([include_path] if include_path else [])
            super().__init__(include_path=paths, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", Manager)
    return listed


def test_the_folders_own_tasks_come_first(own, few_built_in):
    tasks = check_tasks(["everything"], own).loaded["everything"]["tasks"]
    assert few_built_in == [False]
    assert len(tasks["quiz"].eval_docs) == len(QUESTIONS)
    with pytest.raises(TaskError, match=r"'hellaswag' needs data from the hub.*nobody/nothing.*local file"):
        check_tasks(["quiz", "hellaswag"], own)
    assert few_built_in == [False, False, True]


def test_a_group_may_call_for_built_in_tasks(own, few_built_in):
    inline = "{task: own, dataset_path: json}"
    (own / "mixed.yaml").write_text(f"group: mixed\ntask: [quiz, {{group: inner, task: [hellaswag]}}, {inline}]\n")
    with pytest.raises(TaskError, match="'mixed' needs data from the hub"):
        check_tasks(["mixed"], own)
    assert few_built_in == [False, True]
    (own / "mixed.yaml").write_text("group: mixed\ntask: [quiz, {task: helaswag, num_fewshot: 1}, mixed]\n")
    with pytest.raises(TaskError, match=r"unknown lm-eval task 'helaswag' \(did you mean hellaswag\?\)"):
        check_tasks(["mixed"], own)


def test_an_unknown_task_is_named_with_those_like_it():
    """Among lm-eval's own thousands; the groups among them are known with all their members."""
    with pytest.raises(TaskError) as error:
        check_tasks(["mmlu", "helaswag", "arc_easy", "wikitext"])
    assert str(error.value).startswith("unknown lm-eval task 'helaswag' (did you mean hellaswag, ")
    assert "mmlu" not in str(error.value)
    assert "--lm-eval-path" in str(error.value)


def test_an_unknown_task_beside_a_folder(own, few_built_in):
    with pytest.raises(TaskError, match=r"'quizz' \(did you mean quiz\b.*neither in .*own nor among lm-eval's own"):
        check_tasks(["lines", "quizz"], own)
    with pytest.raises(TaskError, match="unknown lm-eval task 'zzz': neither"):
        check_tasks(["zzz"], own)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("task: mine\n  dataset_path: json\n", "line 2: mapping values are not allowed here"),
        ("task: mine\nmetric_list: [{metric: acc\n", r"line \d: expected"),
        ("include: shared.yaml\ntask: mine\n", "what it includes, shared.yaml, is not there"),
    ],
)
def test_a_broken_file_is_named(own, few_built_in, text, reason):
    """lm-eval leaves such files out without a word, and would then say that there is no such task."""
    (own / "broken.yaml").write_text(text)
    with pytest.raises(TaskError, match=rf"broken\.yaml is no task that lm-eval can read: {reason}"):
        check_tasks(["quiz", "mine"], own)
    assert check_tasks(["quiz"], own).loaded.keys() == {"quiz"}
    with pytest.raises(TaskError, match="unknown lm-eval task 'min'"):
        check_tasks(["min"], own)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("output_type:", "outputtype:", r"'lines' \(.*lines\.yaml\) cannot be made: TypeError: .*outputtype"),
        (
            "test_split: test",
            "test_split: dev",
            r"'lines' .*cannot be made: KeyError: 'dev'; does its data have the splits that it names\?",
        ),
        ("lines.jsonl", "gone.jsonl", r"'lines': its data cannot be read: .*gone\.jsonl"),
        ("noise.keep", "noise.lost", r"'lines' .*cannot be made: AttributeError: .*no function 'lost'"),
        ("dataset_path: json", "dataset_path: nobody/nothing", "'lines' needs data from the hub.*nobody/nothing"),
    ],
)
def test_a_task_that_cannot_be_made(own, old, new, message):
    text = (own / "lines.yaml").read_text()
    assert old in text
    text = text.replace(old, new)
    if "nobody" in new:
        text = re.sub("dataset_kwargs.*\n", "", text)
    (own / "lines.yaml").write_text(text)
    with pytest.raises(TaskError, match=message) as error:
        check_tasks(["lines"], own)
    assert "\n" not in str(error.value)


def test_no_names_and_no_folder(tmp_path):
    with pytest.raises(TaskError, match="no lm-eval task is named"):
        check_tasks([" ", ""])
    with pytest.raises(TaskError, match=r"--lm-eval-path .*absent is no folder"):
        check_tasks(["quiz"], tmp_path / "absent")


def test_a_task_that_runs_what_the_model_writes(own):
    (own / "code.yaml").write_text(
        (own / "quiz.yaml").read_text().replace("task: quiz", "task: code\nunsafe_code: true")
    )
    with pytest.raises(TaskError, match="'code' runs code that the model writes, which is not done here"):
        check_tasks(["code"], own)
