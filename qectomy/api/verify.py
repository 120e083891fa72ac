"""`qectomy.verify`: a certificate that a reduced checkpoint computes what its original does, or where it does not."""

import os
from typing import Any

from qectomy.api.arguments import Name, check_numbers, check_texts, name_or_none
from qectomy.progress import Progress, stage
from qectomy.versions import check_transformers


def verify(
    reduced: Name,
    against: Name,
    *,
    text: Name | None = None,
    field: str | None = None,
    tokens: int = 2048,
    context: int | None = None,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Return the certificate that `qectomy verify --json` prints; its `verdict` is `exact`, `not exact` or `failed`.

    The options are those of the command. `progress`: True for bars on stderr, or a function (done, total, note).
    Raises QectomyError for two checkpoints that cannot be compared; a verdict is returned, never raised.
    """
    check_transformers()
    check_numbers(1, tokens=tokens)
    check_numbers(2, context=context)
    held_text, against = name_or_none(text), os.fspath(against)
    check_texts([held_text], field, context or 2)
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.checkpoint.config_files import load_config
    from qectomy.conversion.settings import default_context
    from qectomy.eval.certificate import verify as run
    from qectomy.eval.protocol import Protocol, check_positions, scoring_windows
    from qectomy.text.documents import Reading
    from qectomy.text.text import load_tokenizer, read_source

    ours, theirs = open_checkpoint(os.fspath(reduced), reduced=True), open_checkpoint(against)
    held = None
    if held_text:
        protocol = Protocol(context=context or min(tokens, default_context(theirs)), tokens=tokens)
        check_positions(against, load_config(theirs.family, theirs.config, theirs.reduced), protocol.context)
        tokenizer = load_tokenizer(theirs.folder)
        found = read_source(held_text, Reading(field=field, tokenizer=lambda: tokenizer))
        held = scoring_windows(tokenizer, found, protocol, theirs.dims.vocab_size)
    with stage(progress, "verifying") as report:
        return run(ours, theirs, held, report)
