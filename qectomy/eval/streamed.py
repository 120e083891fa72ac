"""Run a checkpoint's own model with one layer of it in memory at a time.

The model is the one that transformers loads from the folder, loaded without its weights, which shows whether every
tensor has its place. A layer's weights are read when the forward comes to it and let go after it.
Dimensions: n windows, T positions, D d_model, M d_mlp.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from qectomy.calibrate.memory import release_freed
from qectomy.errors import NonFiniteError
from qectomy.eval.perplexity import Progress, ScoringWindows, load_model
from qectomy.eval.scores import SLICE, TokenScores, join_scores, score_tokens
from qectomy.surgery.checkpoint import Checkpoint
from qectomy.surgery.family import Dimensions
from qectomy.surgery.finite import all_finite

TOKENS_AT_ONCE = 2048  # on which the model runs before its layers are read anew
Tap = Callable[[torch.Tensor], None]  # is given what each layer's W_down reads, in the order of the layers


class StreamedModel:
    """A checkpoint, original or reduced, that computes in `dtype`, all of it, norms included."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32):
        family = checkpoint.family
        self.checkpoint, self.dtype = checkpoint, dtype
        self.model, _, _ = load_model(str(checkpoint.folder), "float32", "meta")
        for layer in range(checkpoint.dims.n_layers):
            module = self.layer(layer)
            module.register_forward_pre_hook(partial(self._fill, layer))
            module.register_forward_hook(_empty)
        outside = [family.final_norm] if checkpoint.dims.norms else []
        outside += [family.positions.rpartition(".")[0]] if family.positions else []
        for name in outside:
            self.model.get_submodule(name).load_state_dict(checkpoint.read_module(name, dtype), assign=True)
        if family.rotary_module is not None:
            self.model.set_submodule(family.rotary_module, family.rotary(self.model.config))  # in no file
        if dtype == torch.float64:
            family.in_own_type_(self.model)

    def layer(self, layer: int) -> nn.Module:
        return self.model.get_submodule(self.checkpoint.family.prefix(layer).rstrip("."))

    @torch.no_grad()
    def states(self, tokens: torch.Tensor, tap: Tap | None = None) -> torch.Tensor:
        """Return what the head reads for windows of tokens (n, T): (n, T, D).

        `tap` is given what each layer's W_down reads, (n, T, M): no exact change of basis or gauge changes it.
        """
        checkpoint, wanted = self.checkpoint, tokens.unique()
        rows = [checkpoint.read_rows(checkpoint.family.embedding, i, i + 1, self.dtype) for i in wanted.tolist()]
        embedded = torch.cat(rows)[torch.searchsorted(wanted, tokens)]
        hooks = self._tapped(tap) if tap else []
        try:
            return self.model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()

    def logits(self, states: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return the logits (..., stop - start) of states (..., D) for a run of the vocabulary."""
        family = self.checkpoint.family
        name = family.embedding if self.checkpoint.dims.tied else family.head
        return nn.functional.linear(states, self.checkpoint.read_rows(name, start, stop, self.dtype))

    def all_logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits of a few states (N, D), (N, vocab_size); the head is read a slice at a time."""
        out = torch.empty(len(states), self.checkpoint.dims.vocab_size, dtype=self.dtype)
        for start, stop in ((a, min(a + SLICE, out.shape[1])) for a in range(0, out.shape[1], SLICE)):
            out[:, start:stop] = self.logits(states, start, stop)
        return out

    def _tapped(self, tap: Tap) -> list[Any]:
        name, layers = self.checkpoint.family.roles.mlp_out.module, range(self.checkpoint.dims.n_layers)
        modules = dict.fromkeys(self.layer(layer).get_submodule(name) for layer in layers)  # some layers share one
        return [module.register_forward_pre_hook(partial(_give, tap)) for module in modules]

    def _fill(self, layer: int, module: nn.Module, arguments: Any) -> None:
        tensors = self.checkpoint.read_layer(layer, self.dtype)
        module.load_state_dict(tensors, strict=True, assign=True)


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


def score_streamed(
    original: StreamedModel, reduced: StreamedModel, windows: ScoringWindows, progress: Progress | None = None
) -> tuple[TokenScores, TokenScores]:
    """Return the scores of the windows' tokens under both models, the reduced one's with KL(original || reduced).

    Raises NonFiniteError naming the windows.
    """
    mask, parts, vocab = windows.scored_mask(), [], reduced.checkpoint.dims.vocab_size
    at_once = max(1, TOKENS_AT_ONCE // windows.tokens.shape[1])
    for start in range(0, len(windows.tokens), at_once):
        tokens, keep = windows.tokens[start : start + at_once], mask[start : start + at_once]
        theirs, ours = (model.states(tokens)[:, :-1][keep] for model in (original, reduced))
        parts.append(
            score_tokens(partial(reduced.logits, ours), tokens[:, 1:][keep], vocab, partial(original.logits, theirs))
        )
        if not all(nll is not None and all_finite(nll) for nll in (parts[-1].nll, parts[-1].reference_nll)):
            raise NonFiniteError(f"logits are NaN or Inf in windows {start} to {start + len(tokens) - 1}")
        if progress:
            progress(start + len(tokens), len(windows.tokens))
    after = join_scores(parts)
    assert after.reference_nll is not None
    return TokenScores(after.reference_nll), after


def _give(tap: Tap, module: nn.Module, arguments: Any) -> None:
    tap(arguments[0])


def _empty(module: nn.Module, arguments: Any, output: Any) -> None:
    module.to("meta")
    release_freed()  # or the heap grows with every layer
