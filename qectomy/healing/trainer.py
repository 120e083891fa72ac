"""Hugging Face's Trainer with the teacher beside it, checkpoints that are whole, and a watch over the numbers."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_utils import EvalPrediction

from qectomy.distributed.process_group import ProcessGroup
from qectomy.errors import NonFiniteError
from qectomy.healing.checkpoints import Checkpoints, mark_complete
from qectomy.healing.models import Distillation
from qectomy.healing.settings import HealSettings
from qectomy.progress import Progress
from qectomy.runs.run_dir import RunDir

SECONDS_A_CHECKPOINT = 600.0  # at most, beside those at each evaluation


class HealTrainer(Trainer):
    """Trainer whose loss is Distillation's. A training window is read by its number in the run: there is one epoch."""

    loss_is_scaled_for_ga = False  # a mean over the batch: Trainer divides it by the accumulation steps

    def __init__(self, criterion: Distillation, checkpoints: Checkpoints, watch: "Watch", **kwargs: Any):
        super().__init__(compute_metrics=Means(criterion.ce_weight), callbacks=[watch], **kwargs)
        self.remove_callback(PrinterCallback)  # the progress bar says it
        self._criterion, self._checkpoints, self._watch = criterion, checkpoints, watch
        self._losses: list[Tensor] = []  # of the micro-batches of this step

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        found = super()._init_training_state(*args, **kwargs)
        best = self._checkpoints.path / f"checkpoint-{self.state.best_global_step}"
        if best.is_dir():  # also where the folder lies elsewhere than when that was saved
            self.state.best_model_checkpoint = str(best)
        return found

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super().evaluate(*args, **kwargs)
        except NonFiniteError as error:
            raise NonFiniteError(f"step {self.state.global_step}: {error}") from error

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any) -> Any:
        teacher_states = self._criterion.teach(inputs["input_ids"])
        found = model(input_ids=inputs["input_ids"], teacher_states=teacher_states)
        return (found["loss"], found) if return_outputs else found["loss"]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def prediction_step(
        self, model: Any, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch's loss and each window's KL and negative log-likelihood; there are no labels."""
        with torch.no_grad():
            loss, found = self.compute_loss(model, self._prepare_inputs(inputs), return_outputs=True)
        each = torch.stack([found["kl"], found["nll"]], 1)
        return loss.detach(), each, torch.zeros(len(each), device=each.device)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # the windows come shuffled

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """Matrices alone are drawn to zero, not gains and biases."""
        return [name for name, parameter in model.named_parameters() if parameter.ndim > 1]

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self._check_finite(norm)
        return norm

    def _check_finite(self, norm: Any) -> None:
        """Raise NonFiniteError before the optimizer takes in what is not finite; every process sees the same norm."""
        loss = self._watch.loss = float(torch.stack(self._losses).sum())
        self._losses = []
        size = 0.0 if norm is None else float(norm)
        if not (math.isfinite(size) and math.isfinite(loss)):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the loss is {loss:.4g}, the norm of its gradient {size:.4g}. "
                f"{self._checkpoints.run.path} keeps the last checkpoint before it. A new run (--clean) may get past "
                "it with a lower --lr, a longer --warmup or --dtype float32"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = self._checkpoints.path / f"checkpoint-{self.state.global_step}"
            mark_complete(folder)
            self._checkpoints.keep_latest(folder)
        self.accelerator.wait_for_everyone()


@dataclass(frozen=True)
class Means:
    """Mean KL and negative log-likelihood over the validation windows, all of one length, and what is to be least.

    (Trainer's own loss is a mean over batches, in which a window that fills one up counts twice.)
    """

    ce_weight: float

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        kl, nll = (float(mean) for mean in prediction.predictions.astype("float64").mean(0))
        if not (math.isfinite(kl) and math.isfinite(nll)):
            raise NonFiniteError(f"on the validation windows the model gives NaN or Inf (KL {kl}, -log p {nll})")
        return {"kl": kl, "nll": nll, "objective": (1 - self.ce_weight) * kl + self.ce_weight * nll}


class Watch(TrainerCallback):
    """Progress with loss and tokens a second; the end of patience and of the minutes; a checkpoint now and then.

    The seconds of earlier processes of the same run count. The first process's clock is everyone's.
    """

    def __init__(
        self,
        folder: RunDir,
        processes: ProcessGroup,
        tokens_a_step: int,
        settings: HealSettings,
        progress: Progress | None,
    ):
        self._folder, self._processes, self._tokens_a_step = folder, processes, tokens_a_step
        self._limit = None if settings.minutes is None else 60 * settings.minutes
        self._patience = settings.patience
        self._progress = progress if processes.is_main else None
        self.spent = float(folder.record().get("seconds", 0.0))
        self._since = self._saved = time.perf_counter()
        self._first = 0
        self.loss = math.nan  # of the last step

    @property
    def seconds(self) -> float:
        return self.spent + time.perf_counter() - self._since

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = self._saved = time.perf_counter()
        self._first = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        over, due = self._processes.on_main(self._time)
        if over and state.global_step < state.max_steps:
            control.should_training_stop = True
        if over or state.global_step == state.max_steps:  # what the run ends with is a candidate, too
            control.should_evaluate = control.should_save = control.should_log = True
        if due:
            control.should_save = control.should_log = True  # what was not logged would be lost with this process
        if self._progress:
            rate = (state.global_step - self._first) * self._tokens_a_step / (time.perf_counter() - self._since)
            self._progress(state.global_step, state.max_steps, f"loss {self.loss:.4f}, {rate:,.0f} tokens/s")

    def _time(self) -> tuple[bool, bool]:
        """Say whether the minutes are over, and whether a checkpoint is due."""
        over = self._limit is not None and self.seconds > self._limit
        return over, time.perf_counter() - self._saved > SECONDS_A_CHECKPOINT

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if out_of_patience(state.log_history, self._patience):
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = time.perf_counter()
        if state.is_world_process_zero:
            self._folder.note(seconds=round(self.seconds, 3))


def out_of_patience(history: list[dict[str, Any]], patience: int) -> bool:
    """Say whether the last `patience` validations (0: any number) were none better than the best before them."""
    losses = validation_losses(history)
    return bool(patience and losses) and len(losses) - 1 - losses.index(min(losses)) >= patience


def ended_at(checkpoint: Path, folder: RunDir, settings: HealSettings) -> int | None:
    """Return the step of a checkpoint if it was a run's last: none is to follow, whenever its process was killed."""
    record = folder.record()
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    out_of_time = settings.minutes is not None and record.get("seconds", 0.0) > 60 * settings.minutes
    if (
        record.get("stopped_at") == state.global_step
        or out_of_time
        or out_of_patience(state.log_history, settings.patience)
    ):
        return state.global_step
    return None


def validation_losses(history: list[dict[str, Any]]) -> list[float]:
    """Return the loss of each validation so far, the one at the start first."""
    return [entry["eval_objective"] for entry in history if "eval_objective" in entry]
