"""`qectomy.materialize`: the stock model with a reduced one's logits."""

import os
from pathlib import Path
from typing import Annotated, Any

from qectomy.api.arguments import begin, check_out
from qectomy.api.options import Argument, Clean, Name, Out, Resume, ResumeOnly
from qectomy.progress import Progress, stage


def materialize(
    reduced: Annotated[Name, Argument("Folder of a reduced checkpoint.")],
    out: Out,
    *,
    resume: Resume = False,
    resume_only: ResumeOnly = False,
    clean: Clean = False,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Write W_Q back into a checkpoint at `out`, for engines that know only stock models; return what it holds.

    The options are those of `qectomy materialize`. `progress`: True for bars on stderr, or a function (done, total,
    note). Raises QectomyError.
    """
    begin(materialize, locals())
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.surgery.materialize import materialize as run

    out = Path(out)
    go_on = check_out(out, resume, resume_only, clean)
    source = open_checkpoint(os.fspath(reduced), reduced=True)
    with stage(progress, "materializing") as report:
        return run(source, out, report, resume=go_on, clean=clean)
