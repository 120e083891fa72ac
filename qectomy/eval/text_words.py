"""What is said of the measured text, in the same words on the terminal, in the model card and on the page."""

from typing import Any


def read_as_words(protocol: dict[str, Any]) -> str:
    """Say as what the measured text was read; nothing of prose, and of reports that do not tell."""
    found = protocol.get("text_read_as", {})
    if "records" not in found:
        return ""
    field = f", field {found['field']}" if "field" in found else ""
    chats = ", written by the model's chat template" if "chat_template_sha256" in found else ""
    return f"{found['records']:,} records ({found.get('kind', 'of some kind')}){field}{chats}"
