"""The part of a model card that says what a checkpoint is fit for; `qectomy report` writes it anew."""

from pathlib import Path

from qectomy.checkpoint.headers import MAX_JSON_BYTES, read_regular
from qectomy.errors import OutputError
from qectomy.report.page.verdict import Verdict
from qectomy.report.saved import write_whole

START = "<!-- The verdict; `qectomy report` writes it anew. -->"
END = "<!-- End of the verdict. -->"


def card_verdict(found: Verdict) -> str:
    """Return the part, its marks included."""
    return f"{START}\n**{found.word}.** {found.meaning}\nBy the rule: {found.rule}.\n{END}"


def renew_card_verdict(folder: Path, found: Verdict) -> bool:
    """Put a verdict in the place of the one in a folder's README.md; return whether that changed it.

    What else stands there stays. A card without the marks, or one that is a link, is left as it is.
    """
    path = folder / "README.md"
    if path.is_symlink() or not path.is_file():
        return False
    try:
        text = (read_regular(path, MAX_JSON_BYTES) or b"").decode()
    except (OSError, UnicodeDecodeError):  # no card of ours
        return False
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    renewed = before + card_verdict(found) + after
    if not (start and end) or renewed == text:
        return False
    try:
        write_whole(path, renewed)
    except OSError as error:
        raise OutputError(f"{path} could not be written: {error.strerror or error}") from error
    return True
