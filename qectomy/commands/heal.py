"""The command that heals a reduced checkpoint; `cli.py` registers it."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.commands.terminal import Field, Json, ResumeOnly, command_line, print_json, usage_errors

UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


def count(text: str | int) -> int:
    """Read a number of tokens: 65536, 500k, 10M, 1.5B; typer gives a default as the number it is."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", str(text).strip().lower().replace(",", "").replace("_", ""))
    number = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if number < 1:
        raise typer.BadParameter(f"{text!r} is not a number of tokens; write 65536, 500k, 10M or 1B")
    return number


def heal(
    reduced: Annotated[str, typer.Argument(help="Folder of a reduced checkpoint, as convert wrote it.")],
    teacher: Annotated[str, typer.Option(help="Folder or hub id of the original that it was made from.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist. The run lies in OUT.healing.")],
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text to heal on: a file (UTF-8, JSON, .parquet). May be repeated."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="A dataset to heal on, streamed: NAME, NAME:CONFIG or NAME:CONFIG:SPLIT. May be repeated."),
    ] = None,
    field: Field = None,
    self_generated: Annotated[
        bool, typer.Option("--self-generated", help="Heal on text that the original writes; no corpus is needed.")
    ] = False,
    generated_tokens: Annotated[
        int, typer.Option(parser=count, metavar="COUNT", help="About so many tokens does the original write, at most.")
    ] = 1_000_000,
    tokens: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="COUNT",
            help="Tokens to train on, as 500k or 10M; a shorter text is read again. Default: one reading, at most 10M.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Minutes of training: a few batches are timed first, and validations shrink to 15 % of it."),
    ] = None,
    train: Annotated[
        str,
        typer.Option(help="all; attention (and the norm before it); query-key (query map, W_K and that norm)."),
    ] = "all",
    loss: Annotated[str, typer.Option(help="kl to the original's predictions, ce on the text, or mixed: both.")] = "kl",
    ce_weight: Annotated[float, typer.Option(help="Weight of the cross-entropy in the mixed loss.")] = 0.5,
    hidden_weight: Annotated[
        float, typer.Option(min=0, help="Weight of each layer's hidden states: their error relative to the original's.")
    ] = 0.0,
    lr: Annotated[
        float | None,
        typer.Option(help="Largest learning rate. Default: 0.04 / d_model, less for steps under 4,096 tokens."),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(min=0, help="AdamW's, on matrices; 2^-5 suits models without W_Q.")
    ] = 2.0**-5,
    warmup: Annotated[float, typer.Option(min=0, max=1, help="Part of the steps in which the rate rises.")] = 0.05,
    clip: Annotated[float, typer.Option(help="Largest norm of a gradient.")] = 1.0,
    batch_tokens: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="COUNT",
            help="Tokens a step, over all devices. Default: 16,384, or a hundredth of the run if that is less.",
        ),
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Windows a device runs at a time. Default: as suits the device.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=16, help="Tokens a window. Default: 512, or what the model was made for if less.")
    ] = None,
    eval_text: Annotated[
        str | None,
        typer.Option(
            help="Text to measure on, never trained on. Default: the start of the first --text, or what follows the "
            "part that the reduced model was fitted on."
        ),
    ] = None,
    eval_tokens: Annotated[int, typer.Option(parser=count, metavar="COUNT", help="Tokens to measure on.")] = 16_384,
    validation_tokens: Annotated[
        int,
        typer.Option(parser=count, metavar="COUNT", help="Tokens kept apart to choose the best checkpoint by."),
    ] = 16_384,
    evaluations: Annotated[int, typer.Option(min=1, help="Validations, and checkpoints, over the run.")] = 10,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after so many validations without a better one; 0: never.")
    ] = 5,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type of the products: bfloat16 or float32; weights are trained in float32. "
            "Default: bfloat16 where the device is made for it. Written is the reduced checkpoint's type."
        ),
    ] = None,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory for a third more time.")
    ] = False,
    compile_models: Annotated[
        bool, typer.Option("--compile", help="Compile both models first: minutes at the start, faster steps.")
    ] = False,
    report_to: Annotated[
        str, typer.Option(help="Where Trainer logs to besides: tensorboard, wandb, ... (to be installed), or none.")
    ] = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.healing.")] = False,
    resume_only: ResumeOnly = False,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Seed of everything random.")] = 0,
    as_json: Json = False,
) -> None:
    """Win perplexity back: train a reduced checkpoint for a short while to predict what its original predicts.

    On several devices: `torchrun --nproc-per-node 8 -m qectomy heal ...` or `accelerate launch -m qectomy heal ...`
    (DDP, FSDP, DeepSpeed as configured there).
    """
    from qectomy.api.heal import heal as run

    with usage_errors():
        report = run(
            reduced,
            teacher,
            out,
            text=text,
            dataset=dataset,
            field=field,
            self_generated=self_generated,
            generated_tokens=generated_tokens,
            tokens=tokens,
            minutes=minutes,
            train=train,
            loss=loss,
            ce_weight=ce_weight,
            hidden_weight=hidden_weight,
            lr=lr,
            weight_decay=weight_decay,
            warmup=warmup,
            clip=clip,
            batch_tokens=batch_tokens,
            micro_batch=micro_batch,
            context=context,
            eval_text=eval_text,
            eval_tokens=eval_tokens,
            validation_tokens=validation_tokens,
            evaluations=evaluations,
            patience=patience,
            dtype=dtype,
            activation_checkpointing=activation_checkpointing,
            compile=compile_models,
            report_to=report_to,
            resume=resume,
            resume_only=resume_only,
            device=device,
            seed=seed,
            progress=True,
            command=command_line(),
        )
    if as_json and report:
        print_json(report)
    elif report:
        show_healed(report, out)


def show_healed(report: dict[str, Any], out: Path) -> None:
    """Print the outcome of a healing run."""
    from qectomy.healing.budget import too_few
    from qectomy.report.tables import show_healing

    show_healing(report)
    healing = report["healing"]
    if (enough := healing["budget"]["enough_minutes"]) is not None:
        typer.echo(too_few(healing["settings"]["minutes"], enough, healing["planned_steps"]))
    typer.echo(f"wrote {out}")
