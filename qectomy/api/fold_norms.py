"""`qectomy.fold_norms`: a stock model with the same logits whose norms lie in the matrices around them."""

import os
from pathlib import Path
from typing import Annotated, Any

from qectomy.api.arguments import begin, check_out, names
from qectomy.api.options import Argument, Clean, Name, Names, Option, Out, Resume, ResumeOnly
from qectomy.progress import Progress, stage


def fold_norms(
    checkpoint: Annotated[Name, Argument("Folder or hub id of an original checkpoint.")],
    out: Out,
    *,
    only: Annotated[
        Names | None, Option("gain, shift or mean; may be repeated. Default: all that the family's norms have.")
    ] = None,
    resume: Resume = False,
    resume_only: ResumeOnly = False,
    clean: Clean = False,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Write a checkpoint whose norms' gains, shifts and means are folded to `out`; return what was folded.

    The options are those of `qectomy fold-norms`. `progress`: True for bars on stderr, or a function (done, total,
    note). Raises QectomyError.
    """
    begin(fold_norms, locals())
    out = Path(out)
    go_on = check_out(out, resume, resume_only, clean)
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.surgery.norm_fusion import fold_norms as run

    source = open_checkpoint(os.fspath(checkpoint))
    with stage(progress, "folding norms") as report:
        return run(source, out, names(only), report, resume=go_on, clean=clean)
