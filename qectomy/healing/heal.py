"""Healing: the reduced model is trained for a short while to predict what its original predicts.

    open and compare both ─► pack the text ─► Trainer, the teacher beside it ─► the best checkpoint by validation
        ─► a reduced checkpoint, reloaded by a fresh process ─► perplexity of original, fitted and healed model

Everything until the last two steps lies in OUT.healing, from which `resume` goes on; OUT appears whole or not at all.
"""

import gc
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.conversion.fitted import check_device
from qectomy.conversion.settings import check_context
from qectomy.distributed.process_group import ProcessGroup, join
from qectomy.errors import CheckpointError, TextError, note
from qectomy.eval.protocol import ScoringWindows
from qectomy.healing.budget import Budget, budget_of, spending
from qectomy.healing.checkpoints import Checkpoints, step_of
from qectomy.healing.data import prepare
from qectomy.healing.devices import only_visible
from qectomy.healing.export import Outcome, export, teacher_perplexity
from qectomy.healing.models import (
    Distillation,
    Unchanged,
    enable_checkpointing_,
    is_trained,
    load_student,
    load_teacher,
    open_pair,
    stream_basis,
)
from qectomy.healing.plan import Plan, make_plan
from qectomy.healing.self_generated import self_generated_text, tokens_to_write
from qectomy.healing.settings import TOKENS, HealSettings
from qectomy.healing.trainer import HealTrainer, Watch, ended_at, validation_losses
from qectomy.healing.training_arguments import reporters, training_arguments
from qectomy.healing.translate_errors import explained
from qectomy.progress import Progress
from qectomy.record.base import read_record as read_report
from qectomy.record.reduced import Fitted
from qectomy.runs.output import check_room, interruptible
from qectomy.runs.records import read_record
from qectomy.runs.run_dir import HEALING, GoOn, RunDir, check_out, finished
from qectomy.text.documents import own_hash
from qectomy.text.packing import Packed, PackedWindows, Shuffled

BYTES_A_WEIGHT, BYTES_A_TRAINED_ONE = 4, 8  # float32, and AdamW's two means of it
KEPT_CHECKPOINTS = 4  # the best, the last two, and one that is being written


@dataclass(frozen=True)
class Job:
    """One healing run: what it is given, where it lies, and who takes part."""

    student: Checkpoint
    original: Checkpoint
    settings: HealSettings
    processes: ProcessGroup
    folder: RunDir
    progress: Progress | None
    unchanged: Unchanged

    def say(self, what: str) -> None:
        """Tell what is being done before there are steps to count."""
        if self.progress and self.processes.is_main:
            self.progress(0, 1, what)


def heal(
    reduced: str,
    teacher: str,
    out: Path,
    settings: HealSettings,
    *,
    resume: GoOn = False,
    clean: bool = False,
    progress: Progress | None = None,
) -> Fitted | None:
    """Write the healed checkpoint to `out`; return its report (also in `out`/qectomy.json).

    Run by torchrun or `accelerate launch`, every process calls this; all but the first return None. Raises a
    QectomyError before any step is taken for checkpoints that do not belong together, text that is too short, and a run
    folder of another run; during training for numbers that are not finite, leaving the last good checkpoint; at the end
    if either checkpoint has changed meanwhile, leaving the run.
    """
    begun = time.perf_counter()
    check_out(out, resume, HEALING)
    processes = join(only_visible(settings.device))
    device = check_device(processes.device)
    student, original = open_pair(reduced, teacher)
    settings = settings.resolved()
    check_context(student, settings.context)
    reporters(settings)
    unchanged = Unchanged.since_now(student, original, processes)
    job = Job(student, original, settings, processes, RunDir(out, HEALING), progress, unchanged)
    told = processes.on_main(lambda: fingerprint(settings, unchanged))
    if resume and processes.on_main(lambda: finished(out, told, HEALING)):
        return read_report(out / "qectomy.json", Fitted) if processes.is_main else None
    check_room(out, _bytes_needed(student, settings) - job.folder.nbytes())
    try:
        if clean:
            processes.on_main(job.folder.clean)
        resumed = processes.on_main(lambda: job.folder.start(told, resume))
        if resume and not resumed:
            job.say(f"nothing to resume in {job.folder.path}: starting anew")
        with _signals(processes), explained(settings, job.folder), _undone_if_refused(job, resumed):
            outcome, packed, held = _run(job, device, resumed)
            _free_memory(device)
            if not processes.is_main:
                return None
            return export(
                job.folder, student, original, settings, outcome, packed, held, device, progress, begun, unchanged
            )
    finally:
        job.folder.release()


def _signals(processes: ProcessGroup) -> AbstractContextManager[None]:
    """Treat the signals that end a process as Ctrl-C; one of several may be deep in a call that never returns then."""
    return interruptible() if processes.world_size == 1 else nullcontext()


def _free_memory(device: str) -> None:
    """Give back what training held: Trainer and the student's forward refer to themselves in circles."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def _undone_if_refused(job: Job, resumed: bool) -> Iterator[None]:
    """Leave no folder behind where a text or a checkpoint was refused before the run began."""
    try:
        yield
    except (TextError, CheckpointError):
        if job.processes.is_main and not resumed and "plan" not in job.folder.record():
            job.folder.remove()
        raise


def _run(job: Job, device: str, resumed: bool) -> tuple[Outcome, Packed, ScoringWindows]:
    """Load both models, pack the text and train; both are freed when this returns."""
    settings, processes = job.settings, job.processes
    job.say("loading both models")
    teacher = load_teacher(job.original, settings.compute_dtype, device)
    processes.on_main(job.unchanged.check)  # what it writes is kept for other runs
    names = list(settings.texts)
    if settings.self_generated:
        names = [processes.on_main(lambda: _written_by(job, teacher))]
    model = load_student(job.student)
    processes.on_main(job.unchanged.check)  # before a step from weights that another run would not have
    if settings.activation_checkpointing:
        enable_checkpointing_(model)  # before a batch is timed, too
    chosen = is_trained(job.student, settings.train)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    basis = stream_basis(model, teacher) if settings.hidden_weight else None
    criterion = Distillation(teacher, settings.cross_entropy, settings.hidden_weight, basis)
    criterion.attach_(model)
    if settings.compile:
        for compiled in (model, teacher):
            compiled.base_model.compile()
    if settings.minutes is not None:
        job.say("timing a few batches")
    budget = processes.on_main(lambda: budget_of(job.folder, settings, model, criterion, processes))
    settings = replace(settings, evaluations=budget.evaluations, validation_tokens=budget.validation_tokens)
    packed, held = processes.on_main(
        lambda: prepare(job.folder.path, job.student, settings, names, budget.tokens or TOKENS, job.progress)
    )
    plan = processes.on_main(lambda: make_plan(job.folder, settings, budget.tokens, packed, processes))
    if budget.tokens_a_second is not None and processes.is_main:
        for line in spending(settings, budget, plan.steps, plan.tokens_a_step, held.report.scored_tokens):
            note(line)
    outcome = _train(replace(job, settings=settings), model, criterion, plan, packed, resumed, budget)
    if settings.self_generated:
        outcome = replace(outcome, generated=read_record(Path(names[0]).with_name("provenance.json")))
    return outcome, packed, held


def fingerprint(settings: HealSettings, inputs: Unchanged) -> dict[str, Any]:
    """Return all that decides what a run computes, but for the machine and the number of processes."""
    told = asdict(settings)
    # Neither do these change what is computed, and they are the knobs to turn when memory runs out.
    for name in ("command", "device", "report_to", "micro_batch", "activation_checkpointing"):
        told.pop(name)
    if settings.field is None:
        told.pop("field")
    texts = [*settings.texts, *([settings.eval_text] if settings.eval_text else [])]
    return {
        **told,
        "texts": list(settings.texts),
        "text hashes": {name: own for name in texts if (own := own_hash(name))},
        "reduced checkpoint": inputs.student.hashes,
        "original checkpoint": inputs.original.hashes,
    }


def _written_by(job: Job, model: Any) -> str:
    """Return the file of text that the original writes, for training, validation and, if need be, measuring."""
    settings = job.settings
    tokens = tokens_to_write(settings.tokens, settings.generated_tokens, settings.validation_tokens)
    tokens += 0 if settings.eval_text else settings.eval_tokens
    path = self_generated_text(
        job.original,
        job.unchanged.original.weights,
        model,
        tokens=tokens,
        length=settings.context,
        seed=settings.seed,
        progress=job.progress,
    )
    return str(path)


def _bytes_needed(student: Checkpoint, settings: HealSettings) -> int:
    """Return what the run's checkpoints and the result take of the disk."""
    chosen = is_trained(student, settings.train)
    trained = sum(info.numel for name, info in student.tensors.items() if chosen(name))
    checkpoint = BYTES_A_WEIGHT * student.parameters + BYTES_A_TRAINED_ONE * trained
    return KEPT_CHECKPOINTS * checkpoint + student.nbytes


def _train(
    job: Job, model: Any, criterion: Distillation, plan: Plan, packed: Packed, resumed: bool, budget: Budget
) -> Outcome:
    """Train, and return the best weights by validation with the run's history."""
    processes, folder, checkpoints = job.processes, job.folder, Checkpoints(job.folder)
    rate = job.settings.learning_rate(job.student.dims.d_model, plan.tokens_a_step)
    settings = replace(job.settings, lr=rate)
    last = processes.on_main(lambda: checkpoints.last() if resumed else None)
    if last is None:
        processes.on_main(folder.check_may_begin)
    ended = processes.on_main(lambda: ended_at(last, folder, settings) if last is not None else None)
    steps = ended or plan.steps
    windows = PackedWindows(packed.train, settings.context)
    order = Shuffled(windows.stored, settings.seed)
    watch = Watch(folder, processes, plan.tokens_a_step, settings, job.progress)
    trainer = HealTrainer(
        criterion,
        checkpoints,
        watch,
        model=model,
        args=training_arguments(settings, plan, steps, checkpoints, starts=last is None),
        train_dataset=PackedWindows(packed.train, settings.context, order, steps * plan.windows_a_step),
        eval_dataset=PackedWindows(packed.validation, settings.context),
    )
    if resumed:
        job.say(f"resuming at step {step_of(last)}" if last is not None else "no checkpoint yet: starting anew")
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    state = trainer.state
    losses = validation_losses(state.log_history)
    best = state.best_global_step if state.best_model_checkpoint else state.global_step
    original = 0.0
    if processes.is_main:
        folder.note(stopped_at=state.global_step, seconds=round(watch.seconds, 3))
        original = teacher_perplexity(criterion, packed, settings, processes.device)
    return Outcome(
        weights={name: tensor.detach().cpu() for name, tensor in weights.items()} if processes.is_main else {},
        history=state.log_history,
        plan=plan,
        budget=budget,
        steps=state.global_step,
        best_step=best if min(losses) < losses[0] else 0,
        seconds=watch.seconds,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        original_perplexity=original,
        processes=processes.world_size,
        logs=checkpoints.path / "runs",
        generated=None,
        lr=rate,
    )
