"""What `qectomy report` prints: a row for each folder and point, plain where it is no terminal."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from qectomy.report.page import numbers
from qectomy.report.tables import console


def show_summary(result: dict[str, Any]) -> None:
    """Print what the page says at its head."""
    table = Table("checkpoint", "removed", "ratio", "95 %", "verdict", *(["frontier"] if result["compared"] else []))
    for row in result["folders"]:
        cells = [
            escape(row["name"]),
            numbers.percent(row["parameters_removed"], 2),
            numbers.ratio(row["ratio"]),
            escape(numbers.between(row["ratio_95"], "ratio")),
            row["verdict"] or numbers.DASH,
        ]
        table.add_row(*cells, *(["yes" if row["on_frontier"] else "no"] if result["compared"] else []))
    console.print(table)
