"""`qectomy.heal`: a short fine-tune of a reduced checkpoint against its original."""

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qectomy.api.arguments import begin, check_out, check_texts, name_or_none, names
from qectomy.api.options import Argument, Context, Device, Field, Name, Names, Option, ResumeOnly
from qectomy.progress import Progress, stage

if TYPE_CHECKING:
    from qectomy.record.reduced import Fitted


def heal(
    reduced: Annotated[Name, Argument("Folder of a reduced checkpoint, as convert wrote it.")],
    teacher: Annotated[Name, Option("Folder or hub id of the original that it was made from.")],
    out: Annotated[Name, Option("Folder to write; it must not exist. The run lies in OUT.healing.", path=True)],
    *,
    text: Annotated[Names | None, Option("Text to heal on: a file (UTF-8, JSON, .parquet). May be repeated.")] = None,
    dataset: Annotated[
        Names | None,
        Option("A dataset to heal on, streamed: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT. May be repeated."),
    ] = None,
    field: Field = None,
    self_generated: Annotated[bool, Option("Heal on text that the original writes; no corpus is needed.")] = False,
    generated_tokens: Annotated[
        int, Option("About so many tokens does the original write, at most.", min=1, counts=True)
    ] = 1_000_000,
    tokens: Annotated[
        int | None,
        Option(
            "Tokens to train on, as 500k or 10M; a shorter text is read again. Default: one reading, at most 10M.",
            min=1,
            counts=True,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        Option("Minutes of training: a few batches are timed first, and validations shrink to 15 % of it."),
    ] = None,
    train: Annotated[
        str, Option("all; attention (and the norm before it); query-key (query map, W_K and that norm).")
    ] = "all",
    loss: Annotated[str, Option("kl to the original's predictions, ce on the text, or mixed: both.")] = "kl",
    ce_weight: Annotated[float, Option("Weight of the cross-entropy in the mixed loss.")] = 0.5,
    hidden_weight: Annotated[
        float, Option("Weight of each layer's hidden states: their error relative to the original's.", min=0)
    ] = 0.0,
    lr: Annotated[
        float | None, Option("Largest learning rate. Default: 0.04 / d_model, less for steps under 4,096 tokens.")
    ] = None,
    weight_decay: Annotated[float, Option("AdamW's, on matrices; 2^-5 suits models without W_Q.", min=0)] = 2.0**-5,
    warmup: Annotated[float, Option("Part of the steps in which the rate rises.", min=0, max=1)] = 0.05,
    clip: Annotated[float, Option("Largest norm of a gradient.")] = 1.0,
    batch_tokens: Annotated[
        int | None,
        Option(
            "Tokens a step, over all devices. Default: 16,384, or a hundredth of the run if that is less.",
            min=1,
            counts=True,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None, Option("Windows a device runs at a time. Default: as suits the device.", min=1)
    ] = None,
    context: Context = None,
    eval_text: Annotated[
        Name | None,
        Option(
            "Text to measure on, never trained on. Default: the start of the first --text, or what follows the "
            "part that the reduced model was fitted on."
        ),
    ] = None,
    eval_tokens: Annotated[int, Option("Tokens to measure on.", min=1, counts=True)] = 16_384,
    validation_tokens: Annotated[
        int, Option("Tokens kept apart to choose the best checkpoint by.", min=1, counts=True)
    ] = 16_384,
    evaluations: Annotated[int, Option("Validations, and checkpoints, over the run.", min=1)] = 10,
    patience: Annotated[int, Option("Stop after so many validations without a better one; 0: never.", min=0)] = 5,
    dtype: Annotated[
        str | None,
        Option(
            "Type of the products: bfloat16 or float32; weights are trained in float32. "
            "Default: bfloat16 where the device is made for it. Written is the reduced checkpoint's type."
        ),
    ] = None,
    activation_checkpointing: Annotated[bool, Option("Less memory for a third more time.")] = False,
    compile: Annotated[bool, Option("Compile both models first: minutes at the start, faster steps.")] = False,
    report_to: Annotated[
        str, Option("Where Trainer logs to besides: tensorboard, wandb, ... (to be installed), or none.")
    ] = "none",
    resume: Annotated[bool, Option("Go on with the run in OUT.healing.")] = False,
    resume_only: ResumeOnly = False,
    clean: Annotated[bool, Option("First remove what a run before left in OUT.healing.")] = False,
    device: Device = "cpu",
    seed: Annotated[int, Option("Seed of everything random.", min=0, max=2**31 - 1)] = 0,
    progress: bool | Progress = False,
    command: str | None = None,
) -> "Fitted | None":
    """Train a reduced checkpoint to predict what `teacher`, its original, predicts; return the record of `out`.

    The options are those of `qectomy heal`; numbers of tokens are whole numbers. `progress`: True for bars on stderr,
    or a function (done, total, note). `command`: what the record says made it; by default this call. Under a launcher
    every process calls this, and all but the first are returned None. Raises QectomyError.
    """
    given = {**locals(), "command": begin(heal, locals())}
    texts, held = names(text), name_or_none(eval_text)
    check_texts([*texts, held], field, context or 16)
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.conversion.settings import default_context
    from qectomy.healing.heal import heal as run
    from qectomy.healing.settings import HealSettings

    reduced, out = os.fspath(reduced), Path(out)
    go_on = check_out(out, resume, resume_only, clean, "healing")
    given["texts"], given["eval_text"] = (*texts, *names(dataset)), held
    given["context"] = context or default_context(open_checkpoint(reduced, reduced=True))
    settings = HealSettings(**{setting.name: given[setting.name] for setting in fields(HealSettings)})
    with stage(progress, "healing") as report:
        return run(reduced, os.fspath(teacher), out, settings, resume=go_on, clean=clean, progress=report)
