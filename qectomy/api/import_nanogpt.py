"""`qectomy.import_nanogpt`: a nanoGPT checkpoint as a folder that transformers loads."""

import os
from pathlib import Path
from typing import Annotated, Any

from qectomy.api.arguments import begin, check_out
from qectomy.api.options import Argument, Clean, Name, Option, Out, Resume, ResumeOnly


def import_nanogpt(
    checkpoint: Annotated[Name, Argument("A nanoGPT checkpoint, as in ckpt.pt.", path=True)],
    out: Out,
    *,
    tokenizer: Annotated[
        Name | None, Option("Folder or hub id whose tokenizer files go along: a nanoGPT checkpoint holds none.")
    ] = None,
    resume: Resume = False,
    resume_only: ResumeOnly = False,
    clean: Clean = False,
) -> dict[str, Any]:
    """Write a nanoGPT checkpoint, one of the paper's repository too, to the folder `out`; return what it holds.

    The options are those of `qectomy import-nanogpt`. Raises QectomyError.
    """
    begin(import_nanogpt, locals())
    out = Path(out)
    go_on = check_out(out, resume, resume_only, clean)
    from qectomy.checkpoint.checkpoint import locate
    from qectomy.checkpoint.config_files import TOKENIZER_FILES
    from qectomy.surgery.nanogpt import import_nanogpt as run
    from qectomy.text.text import load_tokenizer

    folder = locate(os.fspath(tokenizer), TOKENIZER_FILES) if tokenizer else None
    if folder is not None:
        load_tokenizer(folder)  # one that does not load is refused before anything is written
    return run(Path(checkpoint), out, folder, resume=go_on, clean=clean)
