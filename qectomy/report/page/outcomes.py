"""The sections on what healing won and how the model does on the tasks of lm-eval."""

import math
from typing import Any

from qectomy.record.evaluation import Task, TaskValue
from qectomy.report.page import numbers
from qectomy.report.page.blocks import Block, Cell, Chart, Facts, Section, Table
from qectomy.report.page.charts import healing_chart
from qectomy.report.page.reading import Folder


def healing_section(folder: Folder, key: str) -> Section | None:
    """The curve of a healing run and what it was made of."""
    healing = folder.report.get("healing")
    if healing is None:
        return None
    curve = [(row["tokens"], row["validation_perplexity"]) for row in folder.curve if "validation_perplexity" in row]
    kept = healing["best_step"] * healing["tokens_a_step"] if {"best_step", "tokens_a_step"} <= healing.keys() else None
    blocks: list[Block] = []
    if curve:
        original = healing.get("validation", {}).get("original_perplexity")
        picture = healing_chart(f"{key}-heal", curve, original, kept)
        blocks.append(Chart(picture=picture, caption="Perplexity on windows that are neither trained nor measured on."))
    settings, seconds = healing.get("settings", {}), healing.get("seconds", {}).get("training")
    rows = [
        ("Trained on", f"{healing['tokens']:,} tokens" if "tokens" in healing else ""),
        ("Texts", ", ".join(text.get("text", "?") for text in healing.get("texts", []))),
        ("Steps", _steps(healing)),
        ("Loss", str(settings.get("loss", ""))),
        ("Largest learning rate", numbers.short(settings["lr"]) if _is_number(settings.get("lr")) else ""),
        ("Time", numbers.seconds(seconds) if seconds is not None else ""),
        ("Device", healing.get("device", "")),
    ]
    for name, words in (
        ("kl", "Mean KL to the original, fitted → healed"),
        ("top1_agreement", "Same most likely token"),
    ):
        pair = healing.get(name, {})
        if {"fitted", "healed"} <= pair.keys():
            write = numbers.short if name == "kl" else numbers.percent
            rows.append((words, f"{write(pair['fitted'])} → {write(pair['healed'])}"))
    blocks.append(Facts(rows=[row for row in rows if row[1]]))
    return Section(key=f"{key}-healing", title="Healing", blocks=blocks)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _steps(healing: dict[str, Any]) -> str:
    if "steps" not in healing:
        return ""
    words = f"{healing['steps']:,}"
    if healing.get("planned_steps", healing["steps"]) > healing["steps"]:
        words += f" of {healing['planned_steps']:,} planned"
    if "best_step" in healing:
        best = healing["best_step"]
        words += f"; step {best:,} is kept" if best else "; none was better than the start, which is kept"
    return words


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
