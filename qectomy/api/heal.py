"""`qectomy.heal`: a short fine-tune of a reduced checkpoint against its original."""

import os
from pathlib import Path
from typing import Any

from qectomy.api.arguments import Name, Names, call_of, check_numbers, check_texts, go_on, name_or_none, names
from qectomy.progress import Progress, stage
from qectomy.versions import check_transformers


def heal(
    reduced: Name,
    teacher: Name,
    out: Name,
    *,
    text: Names | None = None,
    dataset: Names | None = None,
    field: str | None = None,
    self_generated: bool = False,
    generated_tokens: int = 1_000_000,
    tokens: int | None = None,
    minutes: float | None = None,
    train: str = "all",
    loss: str = "kl",
    ce_weight: float = 0.5,
    hidden_weight: float = 0.0,
    lr: float | None = None,
    weight_decay: float = 2.0**-5,
    warmup: float = 0.05,
    clip: float = 1.0,
    batch_tokens: int | None = None,
    micro_batch: int | None = None,
    context: int | None = None,
    eval_text: Name | None = None,
    eval_tokens: int = 16_384,
    validation_tokens: int = 16_384,
    evaluations: int = 10,
    patience: int = 5,
    dtype: str | None = None,
    activation_checkpointing: bool = False,
    compile: bool = False,
    report_to: str = "none",
    resume: bool = False,
    resume_only: bool = False,
    device: str = "cpu",
    seed: int = 0,
    progress: bool | Progress = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Train a reduced checkpoint to predict what `teacher`, its original, predicts; return the record of `out`.

    The options are those of `qectomy heal`; numbers of tokens are whole numbers. `progress`: True for bars on stderr,
    or a function (done, total, note). `command`: what the record says made it; by default this call. Under a launcher
    every process calls this, and all but the first are returned an empty record. Raises QectomyError.
    """
    command = command or call_of(heal, locals())
    check_transformers()
    check_numbers(1, generated_tokens=generated_tokens, tokens=tokens, batch_tokens=batch_tokens)
    check_numbers(1, micro_batch=micro_batch, eval_tokens=eval_tokens, validation_tokens=validation_tokens)
    check_numbers(1, evaluations=evaluations)
    check_numbers(0, patience=patience, seed=seed)
    check_numbers(16, context=context)
    texts, held = names(text), name_or_none(eval_text)
    check_texts([*texts, held], field, context or 16)
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.conversion.settings import default_context
    from qectomy.healing.heal import heal as run
    from qectomy.healing.settings import HealSettings
    from qectomy.runs.run_folder import RunFolder, check_unhealed

    reduced, out = os.fspath(reduced), Path(out)
    if not (resume or resume_only):  # one that is resumed may be in its place already
        check_unhealed(out)
    elif resume_only and not out.exists():
        RunFolder(out).check_there()
    settings = HealSettings(
        texts=(*texts, *names(dataset)),
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
        context=context or default_context(open_checkpoint(reduced, reduced=True)),
        eval_text=held,
        eval_tokens=eval_tokens,
        validation_tokens=validation_tokens,
        evaluations=evaluations,
        patience=patience,
        dtype=dtype,
        activation_checkpointing=activation_checkpointing,
        compile=compile,
        report_to=report_to,
        device=device,
        seed=seed,
        command=command,
    )
    with stage(progress, "healing") as report:
        return run(reduced, os.fspath(teacher), out, settings, resume=go_on(resume, resume_only), progress=report) or {}
