"""A folder of tasks for lm-evaluation-harness that read local files alone."""

import json
from pathlib import Path

from tiny_models import RAVEN

LINES = [
    "Once upon a midnight dreary, while I pondered, weak and weary,",
    "Eagerly I wished the morrow;  vainly I had sought to borrow é",
    " ".join(["Nameless here forevermore. Ah, distinctly I remember, it was in the bleak December"] * 8),
]
HALVES = [line.split(" ", 3) for line in RAVEN.splitlines() if len(line) > 40]
QUESTIONS = [  # how a line of the poem begins; how it, and two others, go on; which of them it is
    (" ".join(half[:cut]), [" ".join(HALVES[(i + k) % len(HALVES)][cut:]) for k in order], order.index(0))
    for i, half in enumerate(HALVES)
    for cut, order in ((2 + i % 2, (1, 0, 5)), (2 + i % 2, (2, 3, 0)))
]
SHARED = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
PERPLEXITY = """task: lines
{shared}output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
process_docs: !function noise.keep
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 3}}
"""
CHOICE = """task: {name}
tag: asked
{shared}fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: brier_score, aggregation: brier_score, higher_is_better: false}}
{more}"""
GROUP = """group: everything
task: [quiz, lines]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


def write_tasks(folder: Path) -> Path:
    """Write the tasks lines, quiz and quiz-alone, the group everything and the tag asked; return the folder."""
    lines, quiz = folder / "lines.jsonl", folder / "quiz.jsonl"
    lines.write_text("".join(json.dumps({"page": line}) + "\n" for line in LINES))
    rows = (dict(question=question, choices=choices, answer=answer) for question, choices, answer in QUESTIONS)
    quiz.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lines.yaml").write_text(PERPLEXITY.format(shared=SHARED.format(data=lines)))
    for name, more in (("quiz", ""), ("quiz-alone", "num_fewshot: 0\n")):
        (folder / f"{name}.yaml").write_text(CHOICE.format(name=name, shared=SHARED.format(data=quiz), more=more))
    (folder / "group.yaml").write_text(GROUP)
    (folder / "noise.py").write_text("def keep(docs):\n    print('noise')\n    return docs\n")
    return folder
