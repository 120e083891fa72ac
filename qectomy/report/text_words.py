"""What is said of the measured text, in the same words on the terminal, in the model card and on the page."""

from qectomy.record.reduced import Fitted, Reduced
from qectomy.record.texts import TextProtocol

MOST_SHARED = 0.01  # of a text, that may stand in another by chance and quotation
FEW_SPANS = 100  # below this a share says little


def read_as_words(protocol: TextProtocol) -> str:
    """Say as what the measured text was read; nothing of plain prose."""
    found = protocol.text_read_as
    if found and found.looks_like:
        return f"read as prose, though it looks like {found.looks_like}"
    if found is None or found.records is None:
        return ""
    field = f", field {found.field}" if found.field else ""
    chats = ", written by the model's chat template" if found.chat_template_sha256 else ""
    return f"{found.records:,} records ({found.kind}){field}{chats}"


def text_doubt(protocol: TextProtocol, report: Reduced | None = None) -> tuple[bool | None, str] | None:
    """Say whether the measured text is another than those fitted and trained on; False: it is not, None: not known.

    `report` says which texts those were; nothing is said where neither it nor the protocol tells of any.
    """
    found = protocol.overlap
    compared = f"of {found.spans:,} spans of {found.words} words compared" if found else ""
    if found and found.share is not None and found.share >= MOST_SHARED and found.spans:
        return False, (
            f"{found.share:.0%} of the measured text stands in text that was fitted or trained on ({compared}): other "
            "text will cost more"
        )
    if protocol.fitted_on:
        return False, "the measured text was fitted on, which flatters the result"
    texts = report.fitted_hashes if report else set()
    if (found and found.fitted_text) or protocol.text_sha256 in texts:
        return False, "the measured tokens are another part of a text that was fitted on: other text will cost more"
    if found and (validated := found.validation_share or 0.0) >= MOST_SHARED:
        return False, (
            f"{validated:.0%} of the measured text stands in text that healing was validated on, by which its best "
            "step was chosen: other text may cost more"
        )
    if found and found.share is not None and found.spans >= FEW_SPANS and found.complete:
        told = f"{found.share:.1%} {compared} stands there"
        return True, f"the measured text is none of those fitted or trained on: {told}"
    if not texts and not found:
        known = not isinstance(report, Fitted)
        return None if known else (None, "the report does not say which texts were fitted on")
    why = "what was fitted or trained on is not recorded by its content, as by this version"
    if found and found.complete:
        why = f"only {found.spans:,} spans of {found.words} words could be compared, and {FEW_SPANS} are needed"
    return None, f"whether the measured text stands in text that was fitted or trained on is not known: {why}"
