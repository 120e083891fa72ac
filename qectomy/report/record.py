"""What lies beside the weights of a reduced checkpoint: its record, a model card and a page."""

from pathlib import Path

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.record.reduced import Reduced
from qectomy.report.model_card import model_card
from qectomy.report.page.writing import write_page


def write_report(folder: Path, report: Reduced, source: Checkpoint) -> None:
    """Write qectomy.json, README.md and report.html beside the weights."""
    (folder / "qectomy.json").write_text(report.as_json(), encoding="utf-8")
    card = _card(report, source)  # file names need not be UTF-8
    (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    write_page(folder, report)


def _card(report: Reduced, source: Checkpoint) -> str:
    """Return the model card; one that cannot be made must not undo a conversion."""
    try:
        return model_card(report, source)
    except Exception as error:
        why = f"No model card was made ({type(error).__name__}). See qectomy.json."
        return f"# {source.name}, reduced by Qectomy\n\n{why}\n"
