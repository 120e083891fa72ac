"""What Trainer is told."""

import math
import os
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from qectomy.errors import QectomyError
from qectomy.healing.checkpoints import Checkpoints
from qectomy.healing.plan import Plan
from qectomy.healing.settings import HealSettings

LOGGED = 20  # training losses between two validations


def reporters(settings: HealSettings) -> list[str]:
    """Return where Trainer logs to. Raises QectomyError for what is not installed."""
    wanted = [] if settings.report_to == "none" else settings.report_to.split(",")
    usable = get_available_reporting_integrations()
    if missing := [name for name in wanted if name not in usable]:
        raise QectomyError(
            f"--report-to {','.join(missing)}: not installed, or not known to transformers; usable here: "
            f"{', '.join(usable) or 'none'}"
        )
    return wanted


def training_arguments(
    settings: HealSettings, plan: Plan, steps: int, checkpoints: Checkpoints, starts: bool
) -> TrainingArguments:
    """Return Trainer's arguments; `steps` is where the run ends, `starts` whether it begins with a validation."""
    every = math.ceil(plan.steps / settings.evaluations)  # the last one is Watch's
    # An accelerate configuration would otherwise decide on the type of products.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if settings.compute_dtype == "bfloat16" else "no"
    known = {field.name for field in fields(TrainingArguments)}
    saving = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    arguments = TrainingArguments(
        output_dir=str(checkpoints.path),
        max_steps=steps,
        per_device_train_batch_size=plan.micro_batch,
        per_device_eval_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        learning_rate=settings.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(settings.warmup * plan.steps),
        weight_decay=settings.weight_decay,
        adam_beta2=0.98,  # few steps: the second moment must settle soon
        max_grad_norm=settings.clip,
        bf16=settings.compute_dtype == "bfloat16",
        use_cpu=torch.device(settings.device).type == "cpu",
        optim="adamw_torch_fused",
        eval_on_start=starts,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        load_best_model_at_end=True,
        metric_for_best_model="eval_objective",
        greater_is_better=False,
        logging_steps=next(steps for steps in range(max(1, every // LOGGED), 0, -1) if every % steps == 0),
        logging_nan_inf_filter=False,
        report_to=reporters(settings),
        seed=settings.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        **{saving: settings.activation_checkpointing},
    )
    take_one_gpu_(arguments)
    return arguments


def take_one_gpu_(arguments: Any) -> None:
    """Keep a process that sees several GPUs on the first: Trainer would spread the model's forward over all of them."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
