"""What people see of lm-evaluation-harness: one row a metric, the checkpoints side by side."""

from rich.markup import escape
from rich.table import Table

from qectomy.record.evaluation import Harness, TaskValue
from qectomy.report.tables import console

ARROWS = {True: "↑", False: "↓", None: ""}


def show_harness(result: Harness) -> None:
    """Print what `run_harness` found: value ± standard error a checkpoint, and its difference from the first."""
    if not result.tasks:
        console.print("lm-eval: no task gave a number")
        return
    first, *others = [escape(value.checkpoint) for value in result.tasks[0].values]
    table = Table("task")
    table.add_column("metric", no_wrap=True)
    table.add_column("n")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, overflow="fold")
        table.add_column("difference")
    shown = ""
    for row in result.tasks:
        task, shown = "" if row.task == shown else f"{'  ' if row.group else ''}{row.task}", row.task
        kind = "" if row.filter == "none" else f" ({row.filter})"
        base, *values = row.values
        cells = [_cell(base)]
        for value in values:
            cells += [_cell(value), f"{value.value - base.value:+,.{_digits(base.value)}f}"]
        metric = f"{row.metric}{kind} {ARROWS[row.higher_is_better]}".rstrip()
        table.add_row(escape(task), escape(metric), f"{row.n:,}", *cells)
    console.print(table)
    for line in _notes(result, len(others)):
        console.print(line, markup=False)


def _cell(value: TaskValue) -> str:
    digits = _digits(value.value)
    error = "" if value.stderr is None else f" ± {value.stderr:,.{digits}f}"
    return f"{value.value:,.{digits}f}{error}"


def _digits(value: float) -> int:
    """Return how many decimals to show: four of a share, fewer of a large perplexity."""
    return 4 if abs(value) < 100 else 2 if abs(value) < 10_000 else 0


def _notes(result: Harness, others: int) -> list[str]:
    """Say what the columns mean and by which settings they came about."""
    settings = result.settings
    dtypes = list(dict.fromkeys(settings.dtype))
    limit = "every document" if settings.limit is None else f"the first {settings.limit:,} documents of a task"
    shots = "examples as the tasks say" if settings.num_fewshot is None else f"{settings.num_fewshot} examples"
    lines = [
        f"lm-eval {result.version}, {limit}, {shots}, at most {settings.max_length} tokens, {', '.join(dtypes)}",
        "↑ higher is better, ↓ lower; ± one standard error of the value alone"
        + ("; difference: from the first checkpoint" if others else ""),
    ]
    if any(settings.truncated):
        lines.append(f"texts cut on the left to fit, by checkpoint: {', '.join(map(str, settings.truncated))}")
    return lines
