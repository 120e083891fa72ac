"""Student and teacher: whether they belong together, how they are loaded, and which weights are trained."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qectomy.checkpoint.checkpoint import Checkpoint, differing_sizes, open_checkpoint
from qectomy.distributed.process_group import ProcessGroup
from qectomy.errors import CheckpointError
from qectomy.healing.loss import head_loss, hidden_loss
from qectomy.runs.input_hashes import SourceWatch
from qectomy.text.text import load_tokenizer

SAME_STREAM = 1e-2  # of the embedding's norm: what a change of basis may leave over; bfloat16 leaves 2e-3


def open_pair(reduced: str, teacher: str) -> tuple[Checkpoint, Checkpoint]:
    """Open the reduced checkpoint and the original that it came from, from their headers alone.

    Raises CheckpointError for a teacher that is reduced itself, for sizes or tokenizers that differ, and for a
    checkpoint that was folded exactly, which has nothing to heal.
    """
    original = open_checkpoint(teacher)
    student = open_checkpoint(reduced, reduced=True)
    if student.family.model_type != original.family.model_type:
        raise CheckpointError(
            f"{student.folder} is of the family {student.family.model_type}, its teacher {original.folder} of "
            f"{original.family.model_type}; the teacher is the original that the reduced checkpoint was made from"
        )
    if shown := differing_sizes(student, original):
        raise CheckpointError(
            f"{student.folder} and its teacher {original.folder} differ in {shown}; the teacher is the original that "
            "the reduced checkpoint was made from"
        )
    if any(spec.gauged or spec.output != "dense" for spec in student.recipe):
        raise CheckpointError(
            f"{student.folder} was folded exactly: it computes what its original does, and there is nothing to heal"
        )
    vocabularies = [load_tokenizer(checkpoint.folder).get_vocab() for checkpoint in (student, original)]
    if vocabularies[0] != vocabularies[1]:
        raise CheckpointError(
            f"{student.folder} and its teacher {original.folder} have different tokenizers, so their predictions "
            "cannot be compared token by token"
        )
    return student, original


@dataclass(frozen=True)
class Unchanged:
    """The files of both checkpoints as they were when the run began, each hashed once."""

    student: SourceWatch
    original: SourceWatch

    @staticmethod
    def since_now(student: Checkpoint, original: Checkpoint, processes: ProcessGroup) -> "Unchanged":
        return Unchanged(*(SourceWatch(checkpoint, processes.on_main) for checkpoint in (student, original)))

    def check(self) -> None:
        """Raise Stopped, naming it, for a file whose content is another now."""
        self.student.check()
        self.original.check()


def load_student(checkpoint: Checkpoint) -> Any:
    """Return the reduced model in float32, without dropout: the teacher has none either."""
    from qectomy.eval.loading import load_model

    model, _, _ = load_model(str(checkpoint.folder), "float32", "cpu")
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.config.use_cache = False
    return model


def enable_checkpointing_(model: Any) -> None:
    """Keep only each layer's input for the backward, by whichever name transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


def load_teacher(checkpoint: Checkpoint, dtype: str, device: str) -> Any:
    """Return the original model, frozen."""
    from qectomy.eval.loading import load_model

    model, _, _ = load_model(str(checkpoint.folder), dtype, device)
    model.config.use_cache = False
    return model.requires_grad_(False)


def is_trained(checkpoint: Checkpoint, train: str) -> Callable[[str], bool]:
    """Return what says of a parameter's name whether `--train all|attention|query-key` trains it.

    `attention`: all of the attention and the norm before it. `query-key`: the query map, W_K and that norm; in GPT-2,
    whose W_K and W_V are one tensor, W_V too.
    """
    roles = checkpoint.family.roles
    modules = {
        "all": ("",),
        "attention": (roles.attention, roles.attention_norm),
        "query-key": (roles.query_map, roles.reduced_key.module, roles.attention_norm),
    }[train]
    prefixes = tuple(
        checkpoint.prefix(layer) + module for layer in range(checkpoint.dims.n_layers) for module in modules
    )
    return lambda name: train == "all" or name.startswith(prefixes)


def stream_basis(student: Any, teacher: Any) -> Float[Tensor, "D D"] | None:
    """Return Θ with h_student = h_teacher Θ at the start, None where it is the identity, from the two embeddings.

    `identity` on Llama turns the stream. Raises CheckpointError where no Θ takes one embedding to the other.
    """
    theirs, ours = (model.get_input_embeddings().weight.detach().double().cpu() for model in (teacher, student))
    if torch.allclose(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max())):
        return None
    basis = torch.linalg.lstsq(theirs, ours).solution
    left = float((theirs @ basis - ours).norm() / ours.norm())
    if left > SAME_STREAM:
        raise CheckpointError(
            f"no change of basis takes the teacher's embedding to the student's ({left:.1e} is left over), so their "
            "hidden states cannot be compared: give --hidden-weight 0"
        )
    # A tied embedding took in the final norm's gains D besides: DΘ = Θ(ΘᵀDΘ), whose polar factor is Θ.
    U, _, Vh = torch.linalg.svd(basis)
    return (U @ Vh).float()


class Distillation:
    """A student's forward that returns its loss against the teacher, computed inside it.

    Inside, so that wrappers which gather a model's weights for the time of its forward (FSDP, ZeRO) have the head's
    weights there too. The teacher is no part of the student: it is neither wrapped, nor saved, nor trained.
    """

    def __init__(self, teacher: Any, ce_weight: float, hidden_weight: float = 0.0, basis: Tensor | None = None):
        self.teacher, self.ce_weight, self.hidden_weight = teacher, ce_weight, hidden_weight
        self._basis = basis

    def attach_(self, student: Any) -> None:
        """Let student(input_ids, teacher_states) return {loss, kl, nll}; kl and nll are means of each window, (B,)."""
        criterion = self

        def forward(self: Any, input_ids: Tensor, teacher_states: tuple[Tensor, ...]) -> dict[str, Tensor]:
            return criterion(self, input_ids, teacher_states)

        student.forward = MethodType(forward, student)

    @torch.no_grad()
    def teach(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Return the teacher's last hidden states (B, T, D); with hidden-state terms, before them each layer's."""
        with torch.autocast(input_ids.device.type, enabled=False):
            return self._states(self.teacher, input_ids)

    def __call__(self, student: Any, input_ids: Tensor, teacher_states: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return self.of_states(student, self._states(student, input_ids), input_ids, teacher_states)

    def of_states(
        self, student: Any, states: tuple[Tensor, ...], input_ids: Tensor, teacher_states: tuple[Tensor, ...]
    ) -> dict[str, Tensor]:
        """Return what student(input_ids, teacher_states) does, from the student's own states."""
        last, their_last = (found[-1][:, :-1].flatten(0, 1) for found in (states, teacher_states))
        loss, kl, nll = head_loss(
            last,
            student.get_output_embeddings().weight,
            their_last,
            self.teacher.get_output_embeddings().weight,
            input_ids[:, 1:].flatten(),
            self.ce_weight,
        )
        if self.hidden_weight:
            basis = None if self._basis is None else self._basis.to(loss.device)
            loss = loss + self.hidden_weight * hidden_loss(states[:-1], teacher_states[:-1], basis)
        of_windows = {name: values.view(len(input_ids), -1).mean(1) for name, values in (("kl", kl), ("nll", nll))}
        return {"loss": loss, **of_windows}

    def _states(self, model: Any, input_ids: Tensor) -> tuple[Tensor, ...]:
        wants = bool(self.hidden_weight)
        out = model.base_model(input_ids=input_ids, use_cache=False, output_hidden_states=wants)
        # The last of a model's hidden states is what its final norm gives, as is the first its embedding.
        return (*out.hidden_states[1:-1], out.last_hidden_state) if wants else (out.last_hidden_state,)
