"""The sections on what healing won and how the model does on the tasks of lm-eval."""

import math

from qectomy.record.evaluation import Task, TaskValue
from qectomy.record.healing import Healing
from qectomy.record.reduced import Fitted
from qectomy.report.page import numbers
from qectomy.report.page.blocks import Block, Cell, Chart, Facts, Section, Table
from qectomy.report.page.charts import healing_chart
from qectomy.report.page.reading import Folder


def healing_section(folder: Folder, key: str) -> Section | None:
    """The curve of a healing run and what it was made of."""
    healing = folder.report.healing if isinstance(folder.report, Fitted) else None
    if healing is None:
        return None
    blocks: list[Block] = []
    if curve := [(row.tokens, row.validation_perplexity) for row in healing.validation.curve]:
        kept, original = healing.best_step * healing.tokens_a_step, healing.validation.original_perplexity
        picture = healing_chart(f"{key}-heal", curve, original, kept)
        blocks.append(Chart(picture=picture, caption="Perplexity on windows that are neither trained nor measured on."))
    kl, agreement = healing.kl, healing.top1_agreement
    rows = [
        ("Trained on", f"{healing.tokens:,} tokens"),
        ("Texts", ", ".join(text.text for text in healing.texts)),
        ("Steps", _steps(healing)),
        ("Loss", healing.settings.loss),
        ("Largest learning rate", numbers.short(healing.settings.lr)),
        ("Time", numbers.seconds(healing.seconds.training)),
        ("Device", healing.device),
        ("Mean KL to the original, fitted → healed", f"{numbers.short(kl.fitted)} → {numbers.short(kl.healed)}"),
        ("Same most likely token", f"{numbers.percent(agreement.fitted)} → {numbers.percent(agreement.healed)}"),
    ]
    blocks.append(Facts(rows=rows))
    return Section(key=f"{key}-healing", title="Healing", blocks=blocks)


def _steps(healing: Healing) -> str:
    words, best = f"{healing.steps:,}", healing.best_step
    if healing.planned_steps > healing.steps:
        words += f" of {healing.planned_steps:,} planned"
    return words + (f"; step {best:,} is kept" if best else "; none was better than the start, which is kept")


def task_section(folder: Folder, key: str) -> Section | None:
    """The tasks of lm-eval, the difference marked where it is beyond two standard errors."""
    found = folder.evaluation.lm_eval if folder.evaluation else None
    if not found or not found.tasks:
        return None
    names = list(dict.fromkeys(value.checkpoint for task in found.tasks for value in task.values))
    columns = ["task", "n", names[0]]
    for name in names[1:]:
        columns += [name, "difference"]
    rows = []
    for task in found.tasks:
        values = {value.checkpoint: value for value in task.values}
        first = values.get(names[0])
        metric = task.metric + (f", {task.filter}" if task.filter != "none" else "")
        row: list[str | Cell] = [f"{task.task} ({metric})", numbers.whole(task.n), _with_error(first)]
        for name in names[1:]:
            row += [_with_error(values.get(name)), _difference(first, values.get(name), task)]
        rows.append(row)
    table = Table(
        caption=f"Tasks of lm-evaluation-harness {found.version}, value ± standard error",
        columns=columns,
        rows=rows,
        note="▼ worse, ▲ better: the difference is beyond two of its standard errors, √(s₁² + s₂²). Both models answer "
        "the same questions, so that this is cautious. Where neither stands, the task cannot tell them apart.",
    )
    return Section(key=f"{key}-tasks", title="Tasks", blocks=(table,))


def _with_error(found: TaskValue | None) -> str:
    if found is None:
        return numbers.DASH
    error = f" ± {numbers.plain(found.stderr, 4)}" if found.stderr is not None else ""
    return numbers.plain(found.value, 4) + error


def _difference(first: TaskValue | None, other: TaskValue | None, task: Task) -> Cell:
    """The difference of two values; marked where it is more than two standard errors."""
    if first is None or other is None:
        return Cell(text=numbers.DASH)
    gap = other.value - first.value
    text = numbers.signed(gap, 4)
    if first.stderr is None or other.stderr is None or abs(gap) <= 2 * math.hypot(first.stderr, other.stderr):
        return Cell(text=text)
    better = (gap > 0) == (task.higher_is_better is not False)
    return Cell(text=f"{'▲' if better else '▼'} {text}", mark="better" if better else "worse")
