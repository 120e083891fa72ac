"""Per-token loss, KL to a reference and top-1 agreement, without ever holding a full row of logits.

The vocabulary is walked in slices with running log-sum-exps, so memory is tokens x slice, whatever the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

SLICE = 512

Logits = Callable[[int, int], torch.Tensor]  # (start, stop) of the vocabulary -> (N, stop - start) logits


@dataclass(frozen=True)
class TokenScores:
    """One number a scored token, float64; natural logarithms."""

    nll: torch.Tensor
    kl: torch.Tensor | None = None  # KL(reference || model)
    agree: torch.Tensor | None = None  # 1 where the most likely token is the same
    reference_nll: torch.Tensor | None = None  # the reference's own


class _RunningLogits:
    """Log-sum-exp, largest entry and target logit of logits that arrive slice by slice."""

    def __init__(self, n: int, device: torch.device):
        self.max = torch.full((n,), -torch.inf, device=device)
        self.total = torch.zeros(n, dtype=torch.float64, device=device)
        self.best = torch.full((n,), -torch.inf, device=device)
        self.argmax = torch.zeros(n, dtype=torch.int64, device=device)
        self.target = torch.zeros(n, device=device)

    def update(self, logits: torch.Tensor, start: int, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in one slice; return (exp(logits - new max), factor by which earlier sums shrink)."""
        top, where = logits.max(dim=-1)
        self.argmax = torch.where(top > self.best, where + start, self.argmax)
        self.best = torch.maximum(self.best, top)
        shrink = (self.max - self.best).exp()
        self.max = self.best
        weights = (logits - self.max[:, None]).exp()
        self.total = self.total * shrink + weights.sum(-1)
        inside = (targets >= start) & (targets < start + logits.shape[-1])
        local = (targets - start).clamp(0, logits.shape[-1] - 1)
        self.target = torch.where(inside, logits.gather(-1, local[:, None])[:, 0], self.target)
        return weights, shrink

    @property
    def logsumexp(self) -> torch.Tensor:
        return self.max.double() + self.total.log()


def score_tokens(
    logits: Logits, targets: torch.Tensor, vocab_size: int, reference: Logits | None = None
) -> TokenScores:
    """Return the scores of `targets` (N,) under logits that come in vocabulary slices, taken to float32.

    With `reference`, the original model's logits, also KL(reference || model) and top-1 agreement.
    """
    n, device = targets.shape[0], targets.device
    model, teacher = _RunningLogits(n, device), _RunningLogits(n, device)
    gap = torch.zeros(n, dtype=torch.float64, device=device)  # sum of exp(t - max t) (t - s)
    for start in range(0, vocab_size, SLICE):
        stop = min(start + SLICE, vocab_size)
        ours = logits(start, stop).float()
        model.update(ours, start, targets)
        if reference is not None:
            theirs = reference(start, stop).float()
            weights, shrink = teacher.update(theirs, start, targets)
            gap = gap * shrink + (weights * (theirs - ours)).sum(-1)
    nll = model.logsumexp - model.target
    if reference is None:
        return TokenScores(nll)
    kl = gap / teacher.total - teacher.logsumexp + model.logsumexp
    agree = (model.argmax == teacher.argmax).double()
    return TokenScores(nll, kl, agree, teacher.logsumexp - teacher.target)


def join_scores(parts: list[TokenScores]) -> TokenScores:
    """Concatenate the scores of several batches."""

    def column(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return TokenScores(torch.cat([part.nll for part in parts]), column("kl"), column("agree"), column("reference_nll"))
