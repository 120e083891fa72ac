"""The healing curve: validation perplexity over tokens, as CSV and as a picture."""

import csv
import math
from pathlib import Path
from typing import Any

from qectomy.record.healing import CurveRow


def curve_of(history: list[dict[str, Any]], tokens_a_step: int) -> list[CurveRow]:
    """Return one row a validation from Trainer's log: the loss trained on is the mean since the row before."""
    rows: dict[int, CurveRow] = {}
    losses: list[float] = []
    rate: float | None = None
    for entry in history:
        if "loss" in entry:
            losses.append(entry["loss"])
            rate = entry.get("learning_rate", rate)
        if "eval_objective" in entry:
            step = int(entry["step"])
            rows[step] = CurveRow(
                step=step,
                tokens=step * tokens_a_step,
                train_loss=sum(losses) / len(losses) if losses else None,
                validation_loss=entry["eval_objective"],
                validation_kl=entry["eval_kl"],
                validation_perplexity=math.exp(entry["eval_nll"]),
                learning_rate=rate,
            )
            losses = []
    return [rows[step] for step in sorted(rows)]


def write_curve(folder: Path, rows: list[CurveRow], original: float, best_step: int) -> None:
    """Write healing.csv and healing.png; `original` is the teacher's perplexity on the validation windows."""
    with (folder / "healing.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(CurveRow.model_fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.model_dump() for row in rows)
    _draw(folder / "healing.png", rows, original, best_step)


def _draw(path: Path, rows: list[CurveRow], original: float, best_step: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    tokens = [row.tokens for row in rows]
    values = [row.validation_perplexity for row in rows]
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(tokens, values, marker="o", markersize=4, color="#1f5fa8", label="reduced model")
    axes.axhline(original, color="#555555", linestyle="--", linewidth=1, label=f"original, {original:.3f}")
    best = next(row for row in rows if row.step == best_step)
    label = f"kept, {best.validation_perplexity:.3f} (lowest loss)"
    axes.plot([best.tokens], [best.validation_perplexity], "o", color="#c8102e", label=label)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("perplexity on the validation windows")
    axes.set_title("Healing")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
