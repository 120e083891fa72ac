"""`qectomy.materialize`: the stock model with a reduced one's logits."""

import os
from pathlib import Path
from typing import Any

from qectomy.api.arguments import Name, check_out, go_on
from qectomy.progress import Progress, stage
from qectomy.versions import check_transformers


def materialize(
    reduced: Name,
    out: Name,
    *,
    resume: bool = False,
    resume_only: bool = False,
    clean: bool = False,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Write W_Q back into a checkpoint at `out`, for engines that know only stock models; return what it holds.

    The options are those of `qectomy materialize`. `progress`: True for bars on stderr, or a function (done, total,
    note). Raises QectomyError.
    """
    check_transformers()
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.surgery.materialize import materialize as run

    resumed, out = go_on(resume, resume_only), Path(out)
    check_out(out, resumed, clean)
    source = open_checkpoint(os.fspath(reduced), reduced=True)
    with stage(progress, "materializing") as report:
        return run(source, out, report, resume=resumed, clean=clean)
