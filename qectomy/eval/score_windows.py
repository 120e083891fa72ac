"""Score windows with a model in memory: batches sized by tokens, only the logits that are scored, in chunks.

Dimensions: n windows, L positions, N scored tokens, V vocabulary, D d_model.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from qectomy.checkpoint.finite import all_finite
from qectomy.errors import CheckpointError, NonFiniteError
from qectomy.eval.protocol import ScoringWindows
from qectomy.eval.token_scores import TokenScores, empty_scores, score_rows, score_tokens
from qectomy.progress import Progress

TOKENS_A_BATCH = 4096
TOKENS_ON_DEVICE = 32_768  # a batch, on an accelerator
LOGITS_ON_DEVICE = 1 << 28  # of one model at a time there: 1 GiB in float32, and some times that in between
SLICED = ("cpu",)  # devices on which slices of the vocabulary are quicker than whole rows
MOST_PADDING = 1 / 16  # of a batch of windows of unequal lengths


@torch.no_grad()
def score_model(
    model: Any,
    windows: ScoringWindows,
    progress: Progress | None = None,
    reference: Any | None = None,
    label: str = "the model",
) -> TokenScores:
    """Score every window with a loaded model, in the order of the windows; log-softmax in float32.

    Raises NonFiniteError naming the model, the window and, if one is to blame, the layer.
    """
    device = next(model.parameters()).device
    mask, numbers = windows.scored_mask(), windows.score_numbers()
    probe = windows.tokens[:1, :16].to(device)
    readers = [LogitsReader(each, probe) for each in (model, reference) if each is not None]
    score = scorer(readers[0], readers[1] if reference is not None else None, device)
    found, done = empty_scores(int(mask.sum()), with_reference=reference is not None), 0
    at_once = TOKENS_A_BATCH if device.type == "cpu" else TOKENS_ON_DEVICE
    if not all(reader.plain for reader in readers):
        at_once = min(at_once, max(1, LOGITS_ON_DEVICE // vocab_size(model)))  # its logits come whole
    for rows, length in batches(windows, at_once):
        tokens, keep = windows.tokens[rows, :length].to(device), mask[rows, : length - 1]
        scores = score(tokens, keep.to(device))
        if not scores.finite():
            raise NonFiniteError(non_finite(model, reference, windows, rows, label))
        found.put(numbers[rows, : length - 1][keep], scores)
        done += len(rows)
        if progress:
            progress(done, len(windows.tokens), "")
    return found


def batches(windows: ScoringWindows, tokens: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield (numbers of the windows, tokens of the longest) of batches of about `tokens` tokens, hardly any padded.

    Windows of unequal lengths are taken longest first. A causal model reads nothing of what follows a token, so that
    padding on the right needs no mask.
    """
    n, length = windows.tokens.shape
    lengths = torch.full((n,), length) if windows.lengths is None else windows.lengths
    order = lengths.argsort(descending=True, stable=True)
    start = 0
    while start < n:
        longest = int(lengths[order[start]])
        stop = min(n, start + max(1, tokens // longest))
        held = lengths[order[start:stop]].cumsum(0)
        fits = held >= (1 - MOST_PADDING) * longest * torch.arange(1, stop - start + 1)
        stop = start + (int(fits.nonzero()[-1]) + 1)  # the first one always fits
        yield order[start:stop], longest
        start = stop


class KeptLogits:
    """The logits of kept positions, made when they are asked for: by slices of the vocabulary or by rows."""

    def __init__(self, states: torch.Tensor, weight: torch.Tensor | None):
        self.states, self.weight = states, weight  # (N, D) and (V, D); or (N, V) logits and None

    def slices(self, start: int, stop: int) -> torch.Tensor:
        """(N, stop - start)"""
        if self.weight is None:
            return self.states[:, start:stop]
        return nn.functional.linear(self.states, self.weight[start:stop])

    def rows(self, span: slice) -> torch.Tensor:
        """(rows, V)"""
        return self.states[span] if self.weight is None else nn.functional.linear(self.states[span], self.weight)


class LogitsReader:
    """Reads, from (tokens, kept positions), the logits that predict the kept next tokens.

    A head that is one matrix is multiplied slice by slice; one that does more is run whole.
    """

    def __init__(self, model: Any, probe: torch.Tensor):
        self.model, self.plain, self.head = model, is_plain(model, probe), model.get_output_embeddings()

    def __call__(self, tokens: torch.Tensor, keep: torch.Tensor) -> KeptLogits:
        tokens = tokens[:, :-1]  # nothing is scored that the last one predicts
        if not self.plain:
            return KeptLogits(self.model(input_ids=tokens, use_cache=False).logits[keep], None)
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return KeptLogits(hidden[keep], self.head.weight)


def scorer(
    ours: LogitsReader, theirs: LogitsReader | None, device: torch.device
) -> Callable[[torch.Tensor, torch.Tensor], TokenScores]:
    """Return a function from (tokens (n, L), kept (n, L - 1)) to the scores of the next tokens that are kept."""
    vocab = vocab_size(ours.model)

    def by_slices(tokens: torch.Tensor, keep: torch.Tensor) -> TokenScores:
        targets = tokens[:, 1:][keep]
        other = None if theirs is None else theirs(tokens, keep).slices
        return score_tokens(ours(tokens, keep).slices, targets, vocab, other)

    def by_rows(tokens: torch.Tensor, keep: torch.Tensor) -> TokenScores:
        targets = tokens[:, 1:][keep]
        mine, other = ours(tokens, keep), None if theirs is None else theirs(tokens, keep)
        found = empty_scores(len(targets), with_reference=other is not None)
        at_once = max(1, LOGITS_ON_DEVICE // vocab)
        for start in range(0, len(targets), at_once):
            span = slice(start, start + at_once)
            found.put(span, score_rows(mine.rows(span), targets[span], None if other is None else other.rows(span)))
        return found

    return by_slices if device.type in SLICED else by_rows


def vocab_size(model: Any) -> int:
    return model.config.get_text_config(decoder=True).vocab_size


def is_plain(model: Any, probe: torch.Tensor) -> bool:
    """Whether the head is one matrix and nothing else (a bias, scaling, a cap): seen by trying it on tokens (1, L)."""
    head, seen = model.get_output_embeddings(), list[torch.Tensor]()
    if head is None:
        raise CheckpointError(f"a {type(model).__name__} has no head that predicts tokens, so it has no perplexity")
    hook = model.base_model.register_forward_hook(lambda *call: seen.append(call[-1].last_hidden_state))
    try:
        with torch.no_grad():
            whole = model(input_ids=probe, use_cache=False).logits
    finally:
        hook.remove()
    sliced = nn.functional.linear(seen[-1], head.weight)
    near = {torch.float64: 1e-12, torch.float32: 1e-5}.get(whole.dtype, 1e-2)
    close = whole.shape == sliced.shape and bool((whole - sliced).abs().max() <= near * whole.abs().max())
    return close and not getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)


def non_finite(model: Any, reference: Any | None, windows: ScoringWindows, rows: torch.Tensor, label: str) -> str:
    """Say which model, window and layer first gives NaN or Inf, by running the batch's windows again one by one."""
    for name, each in ((label, model), *([("the reference", reference)] if reference is not None else [])):
        for row in rows.tolist():
            tokens = windows.tokens[row : row + 1, : windows.length(row) - 1].to(next(each.parameters()).device)
            where = first_bad_layer(each, tokens)
            if where is not None:
                return f"{name} gives NaN or Inf in window {row}, first in {where}; no number of it would mean anything"
    return f"{label} gives NaN or Inf in windows {rows.min()} to {rows.max()}"


def first_bad_layer(model: Any, tokens: torch.Tensor) -> str | None:
    """Return which layer's output, or the logits, first holds NaN or Inf on `tokens` (1, L); None if none does."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    layers: Any = max(lists, key=len, default=())
    bad: list[str] = []

    def look(where: str, module: nn.Module, arguments: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if not all_finite(tensor):
            bad.append(where)

    hooks = [layer.register_forward_hook(partial(look, f"layer {i}")) for i, layer in enumerate(layers)]
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return bad[0] if bad else None if all_finite(logits) else "the logits"
