"""`qectomy.verify`: a certificate that a reduced checkpoint computes what its original does, or where it does not."""

import os
from typing import Annotated, Any

from qectomy.api.arguments import begin, check_texts, name_or_none
from qectomy.api.options import Argument, Field, Name, Option
from qectomy.progress import Progress, stage


def verify(
    reduced: Annotated[Name, Argument("Folder of a reduced checkpoint.")],
    against: Annotated[Name, Option("Folder or hub id of the original.")],
    *,
    text: Annotated[
        Name | None, Option("Text to measure on: a file or a dataset's name. Default: 256 random tokens.")
    ] = None,
    field: Field = None,
    tokens: Annotated[int, Option("Tokens of the text to measure on.", min=1)] = 2048,
    context: Annotated[
        int | None, Option("Tokens a window. Default: 512, or what the model was made for if that is less.", min=2)
    ] = None,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Return the certificate that `qectomy verify --json` prints; its `verdict` is `exact`, `not exact` or `failed`.

    The options are those of the command. `progress`: True for bars on stderr, or a function (done, total, note).
    Raises QectomyError for two checkpoints that cannot be compared; a verdict is returned, never raised.
    """
    begin(verify, locals())
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
