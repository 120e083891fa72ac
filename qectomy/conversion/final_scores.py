"""The end of the pass: final norm and head of both models, and the scores of the evaluation windows."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qectomy.calibrate.hidden_states import Streams, batches
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.conversion.at_once import SCORED_TOKENS
from qectomy.errors import NonFiniteError
from qectomy.eval.at_once import RELOAD_TOKENS, SLICE
from qectomy.eval.protocol import ScoringWindows
from qectomy.eval.token_scores import Logits, TokenScores, empty_scores, join_scores, score_tokens


class Head:
    """Final norm and head of a checkpoint, read from its files a slice of the vocabulary at a time."""

    def __init__(self, checkpoint: Checkpoint, config: Any, device: torch.device):
        family = checkpoint.family
        self.checkpoint, self.device = checkpoint, device
        self.vocab_size = checkpoint.dims.vocab_size
        self.name = family.embedding if checkpoint.dims.tied else family.head
        self.norm = family.norm(config)
        self.norm.load_state_dict(checkpoint.read_module(family.final_norm, torch.float32))
        self.norm = self.norm.to(device).requires_grad_(False)

    def logits(self, states: torch.Tensor) -> Logits:
        """Return the logits of the last layer's states (N, D), by slices of the vocabulary."""
        hidden = self.norm(states)
        read = self.checkpoint.read_rows
        return lambda start, stop: nn.functional.linear(
            hidden, read(self.name, start, stop, torch.float32).to(self.device)
        )


@dataclass(frozen=True)
class FinalScores:
    """Token scores of both models, the reduced one's logits for the reload check, and the seconds one head took."""

    before: TokenScores
    after: TokenScores
    # A whole window (1, T), the logits of its last positions (n, V); in the first process alone.
    expected: tuple[torch.Tensor, torch.Tensor] | None
    head_seconds: float


def final_scores(
    original: Head, reduced: Head, streams: Streams, held: ScoringWindows, basis: Any | None = None
) -> FinalScores:
    """Score the evaluation windows, of which `streams` has this process's after the fitted ones; all get all scores.

    `basis` is the one the streams are in, if not that of training. Raises NonFiniteError naming the windows.
    """
    mask, own = held.scored_mask(), streams.share.held
    parts, seconds = [empty_scores(0, with_reference=True)], 0.0
    first = streams.fitted - own.start  # where window 0 would lie here
    at_once = max(1, SCORED_TOKENS // held.tokens.shape[1])
    for start, stop in batches(own.start, own.stop, at_once):
        keep = mask[start:stop]
        targets = held.tokens[start:stop, 1:][keep].to(original.device)
        theirs, ours = (
            states[first + start : first + stop][:, :-1][keep].to(original.device)
            for states in (streams.teacher, streams.student)
        )
        theirs = theirs if basis is None else basis.original_states(theirs)
        begun = time.perf_counter()
        parts.append(score_tokens(reduced.logits(ours), targets, reduced.vocab_size, original.logits(theirs)))
        seconds += (time.perf_counter() - begun) / 2  # two heads
        if not parts[-1].finite():
            raise NonFiniteError(f"logits are NaN or Inf on evaluation windows {start} to {stop - 1}")
    everyone = streams.share.processes.all_gather(join_scores(parts))
    (seconds,) = streams.share.sum_numbers(seconds)
    after = join_scores(everyone)
    expected = _expected(reduced, streams, held) if streams.share.processes.is_main else None
    return FinalScores(after.of_reference(), after, expected, seconds)


def _expected(reduced: Head, streams: Streams, held: ScoringWindows) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first evaluation window (1, T), and the logits of its last positions (n, V)."""
    window = streams.student[streams.fitted : streams.fitted + 1][0]
    logits = reduced.logits(window[-RELOAD_TOKENS:].to(reduced.device))
    whole = torch.empty(len(window[-RELOAD_TOKENS:]), reduced.vocab_size)
    for a, b in batches(0, reduced.vocab_size, SLICE):
        whole[:, a:b] = logits(a, b).cpu()
    return held.tokens[:1].clone(), whole  # a whole window: some RoPE types depend on the length
