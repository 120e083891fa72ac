"""Chats as text: a list of {role, content} as the model's own chat template writes it."""

import hashlib
import json
from typing import Any

from qectomy.errors import TextError, reason_of


def is_chat(value: Any) -> bool:
    """Whether a field of a record holds a chat."""
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) and "role" in turn for turn in value)


class ChatWriter:
    """Writes chats by a tokenizer's template. Raises TextError for a tokenizer that has none."""

    def __init__(self, tokenizer: Any, where: str):
        self._tokenizer, template = tokenizer, getattr(tokenizer, "chat_template", None)
        if not template:
            raise TextError(
                f"{where} holds a chat, and this model's tokenizer has no chat template to write it with: the model "
                "never saw chats, or its chat_template.jinja is missing. Give prose, or name its field: --field NAME"
            )
        self.sha256 = hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()

    def written(self, chat: list[dict[str, Any]], where: str) -> str:
        """Return a chat as text. Raises TextError for a turn that is no text, and what the template refuses."""
        if not all(isinstance(turn.get(name), str) for turn in chat for name in ("role", "content")):
            raise TextError(f"{where}: a turn of the chat is not a `role` and a `content` that are texts")
        try:
            return str(self._tokenizer.apply_chat_template(chat, tokenize=False))
        except Exception as error:  # a template raises what it likes
            raise TextError(f"{where}: the model's chat template refuses this chat: {reason_of(error)}") from error
