"""Run checkpoints' own models with one layer of one of them in memory at a time, whatever their size.

On a GPU the next layer is on its way meanwhile (`checkpoint/prefetch.py`).

The model is the one that transformers loads from the folder, loaded without its weights, which shows whether every
tensor has its place. A layer's weights are read once for all windows (of a group whose hidden states fit into
STATES_BYTES): the model is asked what it passes to its layers, and each layer then runs on every batch before the next
one is read.
Dimensions: n windows, T positions, D d_model, M d_mlp, N scored tokens.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from qectomy.checkpoint.checkpoint import Checkpoint, locate, open_checkpoint
from qectomy.checkpoint.finite import all_finite
from qectomy.checkpoint.headers import read_json
from qectomy.checkpoint.memory import release_freed
from qectomy.checkpoint.prefetch import read_layers
from qectomy.errors import NonFiniteError
from qectomy.eval.at_once import ROWS_A_HEAD, SLICE, STATES_BYTES, STREAMED_ON_DEVICE, STREAMED_TOKENS
from qectomy.eval.cast_on_use import cast_on_use, projections
from qectomy.eval.loading import load_model
from qectomy.eval.protocol import ScoringWindows
from qectomy.eval.score_windows import batches
from qectomy.eval.token_scores import TokenScores, empty_scores, score_tokens
from qectomy.models.family import Dimensions
from qectomy.progress import Progress

SLICE_ON_DEVICE = 8192  # rows of the head read at a time, on an accelerator
Tap = Callable[[torch.Tensor], None]  # is given what each layer's W_down reads, in the order of the layers
Step = Callable[[], None]  # is called after each layer


def open_any(name: str) -> Checkpoint:
    """Open an original or a reduced checkpoint, whichever it is."""
    config = read_json(locate(name) / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    return open_checkpoint(name, reduced=str(model_type).startswith("qectomy_"))


class StreamedModel:
    """A checkpoint, original or reduced, that computes in `dtype`, all of it, norms included."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, device: str = "cpu"):
        family = checkpoint.family
        self.checkpoint, self.dtype, self.device = checkpoint, dtype, torch.device(device)
        self.model, _, _ = load_model(str(checkpoint.folder), "float32", "meta")
        for layer in dict.fromkeys(map(self.layer, range(checkpoint.dims.n_layers))):  # some share one module
            cast_on_use(layer, dtype)
        outside = [family.final_norm] if checkpoint.dims.norms else []
        outside += [family.positions.rpartition(".")[0]] if family.positions else []
        for name in outside:
            self._place(self.model.get_submodule(name), checkpoint.read_module(name))
        rotary = family.rotary(self.model.config)  # in no file
        if family.rotary_module is not None and rotary is not None:
            self.model.set_submodule(family.rotary_module, rotary.to(self.device))
        if dtype == torch.float64:
            family.in_own_type_(self.model)

    @property
    def label(self) -> str:
        return str(self.checkpoint.folder)

    def layer(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.checkpoint.family.prefix(layer).rstrip("."))

    def states(self, tokens: torch.Tensor, tap: Tap | None = None) -> torch.Tensor:
        """Return what the head reads for windows of tokens (n, T): (n, T, D).

        `tap` is given what each layer's W_down reads, (n, T, M): no exact change of basis or gauge changes it.
        """
        return self.states_of([tokens], tap)[0]

    @torch.no_grad()
    def states_of(
        self,
        tokens: Sequence[torch.Tensor],
        tap: Tap | None = None,
        step: Step | None = None,
        continued: Sequence[torch.Tensor] = (),
    ) -> list[torch.Tensor]:
        """Return what the head reads for batches of tokens, (n, T) each: (n, T, D) each, on the device.

        The batches `continued`, whose states come last, are one text in pieces: each layer has its keys and values of
        the pieces before from transformers' own cache, as in generation. Raises NonFiniteError naming the model and
        the layer.
        """
        layers = range(self.checkpoint.dims.n_layers)
        with read_layers(self.checkpoint, layers, None, self.device) as coming, self._tapped(tap):
            (hidden, calls), (later, their_calls) = self._entering(tokens), self._continuing(continued)
            hidden, calls = hidden + later, calls + their_calls
            for layer in layers:
                module = self.layer(layer)
                self._place(module, coming.take(layer))
                for batch, (states, each) in enumerate(zip(hidden, calls, strict=True)):
                    arguments, named = each[layer]
                    hidden[batch] = module(states, *arguments, **named)
                    if not all_finite(hidden[batch]):
                        raise NonFiniteError(f"{self.label} gives NaN or Inf in layer {layer}; nothing is skipped")
                module.to("meta")
                release_freed()  # or the heap grows with every layer
                if step:
                    step()
        for batch, states in enumerate(hidden):
            hidden[batch] = self._leaving(states)
        return hidden

    def _entering(self, tokens: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[list[Any]]]:
        """Return the states that enter the first layer for each batch, and what the model passes to each layer.

        Masks and angles depend on a batch's shape alone, so batches of one shape share them.
        """
        hidden: list[torch.Tensor] = []
        by_shape: dict[torch.Size, list[Any]] = {}
        for batch in tokens:
            states, calls = self._calls(batch, use_cache=False)
            hidden.append(states)
            by_shape.setdefault(batch.shape, calls)
        return hidden, [by_shape[batch.shape] for batch in tokens]

    def _continuing(self, pieces: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], list[list[Any]]]:
        """Return the same for pieces (n, t) of one text, each layer with the key/value cache of the pieces before.

        The model asks a cache how much it holds, so it is shown one that grows with the pieces; layers fill another.
        """
        shown, filled = (DynamicCache(config=self.model.config) for _ in range(2))
        named = {cache_keyword(self.model.base_model): shown}
        hidden: list[torch.Tensor] = []
        calls: list[list[Any]] = []
        for piece in pieces:
            states, each = self._calls(piece, use_cache=True, **named)
            hidden.append(states)
            calls.append([_with(filled, shown, *call) for call in each])
            for layer in range(self.checkpoint.dims.n_layers):
                shown.update(*(states.new_zeros(len(piece), 1, piece.shape[1], 1) for _ in range(2)), layer)
        return hidden, calls

    def _calls(self, batch: torch.Tensor, **options: Any) -> tuple[torch.Tensor, list[Any]]:
        """Return what enters the first layer, and what the model passes to each layer: (arguments, named arguments)."""
        calls: list[Any] = []

        def keep(states: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
            calls.append((states, arguments, named))
            return states

        with self._layers_are(keep):
            self.model.base_model(inputs_embeds=self._embedded(batch), **options)
        return calls[0][0], [(arguments, named) for _, arguments, named in calls]

    def _leaving(self, states: torch.Tensor) -> torch.Tensor:
        """Return what the head reads of the last layer's states."""
        with self._layers_are(lambda *_, **__: states):
            return self.model.base_model(inputs_embeds=states, use_cache=False).last_hidden_state

    @contextmanager
    def _layers_are(self, forward: Callable[..., torch.Tensor]) -> Iterator[None]:
        """Let every layer compute `forward` instead while the block runs."""
        modules = dict.fromkeys(self.layer(layer) for layer in range(self.checkpoint.dims.n_layers))
        for module in modules:
            module.forward = forward
        try:
            yield
        finally:
            for module in modules:
                del module.forward

    def _embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        checkpoint, wanted = self.checkpoint, tokens.unique()
        rows = [checkpoint.read_rows(checkpoint.family.embedding, i, i + 1, self.dtype) for i in wanted.tolist()]
        return torch.cat(rows)[torch.searchsorted(wanted, tokens)].to(self.device)

    def logits(self, states: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the logits (..., stop - start) of states (..., D) for a run of the vocabulary."""
        family = self.checkpoint.family
        name = family.embedding if self.checkpoint.dims.tied else family.head
        rows = self.checkpoint.read_rows(name, start, stop, self.dtype)
        return nn.functional.linear(states, rows.to(self.device))

    def all_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of a few states (N, D), (N, vocab_size); the head is read a slice at a time."""
        out = torch.empty(len(states), self.checkpoint.dims.vocab_size, dtype=self.dtype)
        for start, stop in ((a, min(a + SLICE, out.shape[1])) for a in range(0, out.shape[1], SLICE)):
            out[:, start:stop] = self.logits(states, start, stop)
        return out

    def _place(self, module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        """Give a module its tensors: those of projections as they are stored (`cast_on_use`), others in `dtype`."""
        stored = {name for name, _ in projections(module)}
        placed = {
            name: tensor.to(self.device)
            if name.rpartition(".")[0] in stored or not tensor.is_floating_point()
            else tensor.to(self.device, self.dtype)
            for name, tensor in tensors.items()
        }
        module.load_state_dict(placed, strict=True, assign=True)

    @contextmanager
    def _tapped(self, tap: Tap | None) -> Iterator[None]:
        name, layers = self.checkpoint.family.roles.mlp_out.module, range(self.checkpoint.dims.n_layers)
        modules = dict.fromkeys(self.layer(layer).get_submodule(name) for layer in layers)  # some layers share one
        hooks = [module.register_forward_pre_hook(partial(_give, tap)) for module in modules if tap]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def cache_keyword(model: nn.Module) -> str:
    """The keyword under which transformers' models take their key/value cache: 5.24 has renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _with(
    new: Any, old: Any, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with one object in the place of another."""
    swapped = {name: new if value is old else value for name, value in named.items()}
    return tuple(new if value is old else value for value in arguments), swapped


def random_tokens(dims: Dimensions, count: int = 256, seed: int = 0) -> torch.Tensor:
    """Return one window of random tokens, (1, T): for measuring where there is no text."""
    count = min(count, dims.n_positions)
    return torch.randint(dims.vocab_size, (1, count), generator=torch.Generator().manual_seed(seed))


def relative_logit_error(
    theirs: torch.Tensor, ours: torch.Tensor, original: StreamedModel, reduced: StreamedModel
) -> float:
    """Return the largest difference of a logit over the largest logit, from both models' last states (N, D)."""
    largest, worst, vocab = 0.0, 0.0, original.checkpoint.dims.vocab_size
    for start in range(0, vocab, SLICE):
        stop = min(start + SLICE, vocab)
        expected = original.logits(theirs, start, stop)
        largest = max(largest, float(expected.abs().max()))
        worst = max(worst, float((reduced.logits(ours, start, stop) - expected).abs().max()))
    return worst / largest


@torch.no_grad()
def score_streamed(
    models: Sequence[StreamedModel], windows: ScoringWindows, progress: Progress | None = None
) -> list[TokenScores]:
    """Return the scores of the windows' tokens under each model, in the order of the windows.

    The first is the reference: the others' come with KL(first || other). Progress counts layers. Raises NonFiniteError
    naming the model and the layer.
    """
    mask, numbers = windows.scored_mask(), windows.score_numbers()
    n = int(mask.sum())
    found = [empty_scores(n, with_reference=index > 0) for index in range(len(models))]
    groups = list(_groups(models[0], windows))
    done, total = 0, len(groups) * sum(model.checkpoint.dims.n_layers for model in models)

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total, "")

    for group in groups:
        tokens = [windows.tokens[rows, : length - 1] for rows, length in group]
        keeps = [mask[rows, : length - 1] for rows, length in group]
        places = torch.cat(
            [numbers[rows, : length - 1][keep] for (rows, length), keep in zip(group, keeps, strict=True)]
        )
        targets = windows.tokens[:, 1:][mask][places]
        first: torch.Tensor | None = None
        for model, scores in zip(models, found, strict=True):
            states = model.states_of(tokens, step=step)
            kept = torch.cat([part[keep.to(part.device)] for part, keep in zip(states, keeps, strict=True)])
            del states
            _score_states(model, kept, targets, places, scores, None if first is None else (models[0], first))
            first = kept if first is None else first
    return found


def _groups(model: StreamedModel, windows: ScoringWindows) -> Iterator[list[tuple[torch.Tensor, int]]]:
    """Yield the batches of windows in groups whose hidden states are held together."""
    at_once = STREAMED_TOKENS if model.device.type == "cpu" else STREAMED_ON_DEVICE
    most = STATES_BYTES // (model.checkpoint.dims.d_model * model.dtype.itemsize)
    group: list[tuple[torch.Tensor, int]] = []
    held = 0
    for rows, length in batches(windows, at_once):
        if group and held + len(rows) * length > most:
            yield group
            group, held = [], 0
        group.append((rows, length))
        held += len(rows) * length
    yield group


def _score_states(
    model: StreamedModel,
    states: torch.Tensor,
    targets: torch.Tensor,
    places: torch.Tensor,
    scores: TokenScores,
    reference: tuple[StreamedModel, torch.Tensor] | None,
) -> None:
    """Store the scores of the tokens whose states (N, D) the head reads."""
    vocab, size = model.checkpoint.dims.vocab_size, SLICE if model.device.type == "cpu" else SLICE_ON_DEVICE
    for start in range(0, len(targets), ROWS_A_HEAD):
        span = slice(start, start + ROWS_A_HEAD)
        theirs = None if reference is None else partial(reference[0].logits, reference[1][span])
        part = score_tokens(
            partial(model.logits, states[span]), targets[span].to(states.device), vocab, theirs, slice_size=size
        )
        if not part.finite():
            raise NonFiniteError(f"{model.label}: logits are NaN or Inf")
        scores.put(places[span], part)


def _give(tap: Tap, module: nn.Module, arguments: Any) -> None:
    tap(arguments[0])
