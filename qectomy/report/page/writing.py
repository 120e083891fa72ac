"""Pages on disk: written whole or not at all, and never over a file that is not one of ours."""

import os
from pathlib import Path

from qectomy.errors import ReportError, note
from qectomy.record.reduced import Reduced
from qectomy.report.page.page import page
from qectomy.report.page.reading import folder_of
from qectomy.report.saved import write_whole

OURS = b'<meta name="generator" content="qectomy '
NAME, COMPARISON = "report.html", "qectomy-comparison.html"


def write_page(folder: Path, report: Reduced) -> Path | None:
    """Write the page of a reduced checkpoint that was just made to report.html in its folder; return its path.

    For the end of a conversion, which a page that cannot be made must not undo: then None, and a note.
    """
    try:
        return write_html(page([folder_of(folder, report)]), folder / NAME)
    except Exception as error:
        reason = str(error) if isinstance(error, ReportError) else f"{type(error).__name__}: {error}"
        note(f"no {NAME} was written ({' '.join(reason.split())})")
        return None


def write_html(html: str, out: Path, *, force: bool = False) -> Path:
    """Write a page to `out`, in one step. Raises ReportError where that holds something that is no page of ours."""
    check_replaceable(out, force=force)
    try:
        write_whole(out, html)
    except OSError as error:
        raise ReportError(f"{out} could not be written: {error.strerror or error}. Nothing was left behind.") from error
    return out


def check_replaceable(out: Path, *, force: bool = False) -> None:
    """Raise ReportError where `out` is taken by something else than a page of ours, or cannot be made."""
    try:
        if out.is_dir():
            raise ReportError(f"{out} is a folder; give --out the name of a file")
        if not out.absolute().parent.is_dir():
            raise ReportError(
                f"{out.absolute().parent} is no folder, so {out.name} cannot be written there; make it first"
            )
        if force or not os.path.lexists(out):
            return
        with out.open("rb") as file:
            ours = OURS in file.read(4096)
    except OSError as error:
        raise ReportError(f"{str(out)[:200]} cannot be read: {error.strerror or error}; give another --out") from error
    if not ours:
        raise ReportError(f"{out} exists and is no report of qectomy; give another --out, or --force to replace it")
