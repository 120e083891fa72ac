"""What is said of the measured text, in the same words on the terminal, in the model card and on the page."""

from typing import Any

from qectomy.text.overlap import fitted_hashes

MOST_SHARED = 0.01  # of a text, that may stand in another by chance and quotation
FEW_SPANS = 100  # below this a share says little


def read_as_words(protocol: dict[str, Any]) -> str:
    """Say as what the measured text was read; nothing of plain prose, and of reports that do not tell."""
    found = protocol.get("text_read_as", {})
    if "looks_like" in found:
        return f"read as prose, though it looks like {found['looks_like']}"
    if "records" not in found:
        return ""
    field = f", field {found['field']}" if "field" in found else ""
    chats = ", written by the model's chat template" if "chat_template_sha256" in found else ""
    return f"{found['records']:,} records ({found.get('kind', 'of some kind')}){field}{chats}"


def text_doubt(report: dict[str, Any], protocol: dict[str, Any]) -> tuple[bool | None, str] | None:
    """Say whether the measured text is another than those fitted and trained on; False: it is not, None: not known.

    `report` says which texts those were; nothing is said where neither it nor the protocol tells of any.
    """
    found = protocol.get("overlap", {})
    share, spans, words = found.get("share"), found.get("spans", 0), found.get("words", 0)
    compared = f"of {spans:,} spans of {words} words compared"
    if share is not None and share >= MOST_SHARED and spans:
        return False, (
            f"{share:.0%} of the measured text stands in text that was fitted or trained on ({compared}): other text "
            "will cost more"
        )
    if protocol.get("fitted_on"):
        return False, "the measured text was fitted on, which flatters the result"
    texts = fitted_hashes(report)
    if found.get("fitted_text") or protocol.get("text_sha256") in texts:
        return False, "the measured tokens are another part of a text that was fitted on: other text will cost more"
    if (validated := found.get("validation_share", 0.0)) >= MOST_SHARED:
        return False, (
            f"{validated:.0%} of the measured text stands in text that healing was validated on, by which its best "
            "step was chosen: other text may cost more"
        )
    if share is not None and spans >= FEW_SPANS and found.get("complete"):
        return True, f"the measured text is none of those fitted or trained on: {share:.1%} {compared} stands there"
    if not texts and not found:
        return None if report.get("method") == "exact" else (None, "the report does not say which texts were fitted on")
    why = "what was fitted or trained on is not recorded by its content, as by this version"
    if found.get("complete"):
        why = f"only {spans:,} spans of {words} words could be compared, and {FEW_SPANS} are needed"
    return None, f"whether the measured text stands in text that was fitted or trained on is not known: {why}"
