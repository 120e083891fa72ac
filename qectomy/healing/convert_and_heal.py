"""Fit and heal in one go."""

import shlex
import shutil
from dataclasses import replace
from pathlib import Path

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.conversion.fitted import convert
from qectomy.conversion.settings import ConvertSettings
from qectomy.distributed.launch import launch
from qectomy.errors import QectomyError, Stopped, resumable
from qectomy.healing.devices import only_visible
from qectomy.healing.heal import heal
from qectomy.healing.settings import HealSettings
from qectomy.models.query_maps import QueryMapSpec
from qectomy.progress import Progress
from qectomy.record.reduced import Fitted
from qectomy.runs.run_dir import HEALING, GoOn, RunDir, check_out


def convert_and_heal(
    source: Checkpoint,
    out: Path,
    recipe: tuple[QueryMapSpec, ...],
    settings: ConvertSettings,
    heal_settings: HealSettings,
    progress: Progress | None = None,
    *,
    resume: GoOn = False,
    clean: bool = False,
) -> Fitted:
    """Write the fitted checkpoint to OUT.fitted, heal it to `out`, remove the first; return the report.

    `resume` and `clean` are those of `convert`, for the fit. What goes wrong in healing leaves OUT.fitted, and
    OUT.healing to resume from; the error says with which command.
    """
    if launch().count > 1:
        raise QectomyError("--heal in convert is for one process: convert first, then start `qectomy heal` on several")
    device = only_visible(settings.device)
    settings, heal_settings = replace(settings, device=device), replace(heal_settings, device=device)
    fitted = out.absolute().with_name(f"{out.absolute().name}.fitted")
    command = _heal_command(fitted, source, out, heal_settings)
    check_out(out, False, HEALING)
    if fitted.exists():
        RunDir(fitted).remove_rest()
        raise QectomyError(f"{fitted} is there from a run before. Go on with it by\n  {command}\nor remove it")
    if (run := RunDir(out, HEALING).path).exists():
        raise QectomyError(f"{run} holds a run that was not finished; remove it, or give another --out")
    convert(source, fitted, recipe, settings, progress, resume=resume, clean=clean)
    try:
        report = heal(str(fitted), str(source.folder), out, heal_settings, progress=progress)
    except (QectomyError, KeyboardInterrupt) as error:
        ended = error if isinstance(error, QectomyError) else resumable(Stopped("interrupted"))
        told = type(ended)(
            f"{ended}\nThe fitted checkpoint is whole, in {fitted}. Go on with it, also "
            f"with other settings and --clean in the place of --resume, by\n  {command}"
        )
        raise (resumable(told, command) if ended.resumable else told) from error
    assert report is not None, "one process"
    shutil.rmtree(fitted)
    return report


def _heal_command(fitted: Path, source: Checkpoint, out: Path, settings: HealSettings) -> str:
    """Return the command line that heals the fitted checkpoint as `convert --heal` does."""
    told = {
        "field": settings.field,
        "teacher": source.folder,
        "out": out,
        "tokens": settings.tokens,
        "context": settings.context,
        "eval-text": settings.eval_text,
        "eval-tokens": settings.eval_tokens,
        "device": settings.device,
        "seed": settings.seed,
    }
    command = ["qectomy", "heal", str(fitted), *(["--self-generated"] if settings.self_generated else [])]
    for name in settings.texts:
        command += ["--text", name]
    for name, value in told.items():
        command += [] if value is None else [f"--{name}", str(value)]
    return shlex.join([*command, "--resume"])
