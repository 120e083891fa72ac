"""Per-token loss, KL to a reference and top-1 agreement, without ever holding a full row of logits.

The vocabulary is walked in slices with running log-sum-exps, so memory is tokens x slice, whatever the vocabulary. On a
processor that is also faster than whole rows, for a slice stays in its cache. An accelerator takes whole rows, some at
a time: each operation on a slice would cost a launch there.
Dimensions: N tokens, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from qectomy.checkpoint.finite import all_finite
from qectomy.eval.at_once import SLICE

Logits = Callable[[int, int], torch.Tensor]  # (start, stop) of the vocabulary -> (N, stop - start) logits


@dataclass(frozen=True)
class TokenScores:
    """One number a scored token, float64; natural logarithms."""

    nll: torch.Tensor
    kl: torch.Tensor | None = None  # KL(reference || model)
    agree: torch.Tensor | None = None  # 1 where the most likely token is the same
    reference_nll: torch.Tensor | None = None  # the reference's own

    def finite(self) -> bool:
        """Whether no score is NaN or Inf."""
        return all(part is None or all_finite(part) for part in (self.nll, self.kl, self.reference_nll))

    def put(self, places: torch.Tensor | slice, scores: "TokenScores") -> None:
        """Store scores of other tokens at `places` of these."""
        for ours, theirs in zip(self._columns(), scores._columns(), strict=True):
            if ours is not None and theirs is not None:
                ours[places] = theirs.to(ours.device)

    def of_reference(self) -> "TokenScores":
        """The reference's own scores."""
        assert self.reference_nll is not None
        return TokenScores(self.reference_nll)

    def _columns(self) -> tuple[torch.Tensor | None, ...]:
        return self.nll, self.kl, self.agree, self.reference_nll


def empty_scores(n: int, with_reference: bool) -> TokenScores:
    """Return room for the scores of n tokens."""
    columns = [torch.empty(n, dtype=torch.float64) for _ in range(4 if with_reference else 1)]
    return TokenScores(*columns)


class _RunningLogits:
    """Log-sum-exp, largest entry and target logit of logits that arrive slice by slice."""

    def __init__(self, n: int, device: torch.device, argmax: bool):
        self.best = torch.full((n,), -torch.inf, device=device)
        self.least = torch.zeros(n, device=device)
        self.total = torch.zeros(n, dtype=torch.float64, device=device)
        self.argmax = torch.zeros(n, dtype=torch.int64, device=device) if argmax else None
        self.target = torch.zeros(n, device=device)

    def update(self, logits: torch.Tensor, start: int, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take in one slice; return (exp(logits - new max), factor by which earlier sums shrink)."""
        if self.argmax is None:
            top = logits.amax(dim=-1)  # a seventh of the time of one that also says where
        else:
            top, where = logits.max(dim=-1)
            self.argmax = torch.where(top > self.best, where + start, self.argmax)
        self.least = torch.minimum(self.least, logits.amin(dim=-1))
        best = torch.maximum(self.best, top)
        shrink = (self.best - best).exp()
        self.best = best
        weights = (logits - best[:, None]).exp_()
        self.total = self.total * shrink + weights.sum(-1)
        inside = (targets >= start) & (targets < start + logits.shape[-1])
        local = (targets - start).clamp(0, logits.shape[-1] - 1)
        self.target = torch.where(inside, logits.gather(-1, local[:, None])[:, 0], self.target)
        return weights, shrink

    @property
    def nll(self) -> torch.Tensor:
        """NaN too where a logit is -Inf, which no sum shows."""
        return self.logsumexp - self.target + 0 * self.least

    @property
    def logsumexp(self) -> torch.Tensor:
        return self.best.double() + self.total.log()


def score_tokens(
    logits: Logits,
    targets: torch.Tensor,
    vocab_size: int,
    reference: Logits | None = None,
    slice_size: int | None = None,
) -> TokenScores:
    """Return the scores of `targets` (N,) under logits that come in vocabulary slices, taken to float32.

    With `reference`, the original model's logits, also KL(reference || model) and top-1 agreement.
    """
    n, device = targets.shape[0], targets.device
    compared = reference is not None
    model, teacher = (_RunningLogits(n, device, argmax=compared) for _ in range(2))
    gap = torch.zeros(n, dtype=torch.float64, device=device)  # sum of exp(t - max t) (t - s)
    size = slice_size or SLICE
    for start in range(0, vocab_size, size):
        stop = min(start + size, vocab_size)
        ours = logits(start, stop).float()
        model.update(ours, start, targets)
        if reference is not None:
            theirs = reference(start, stop).float()
            weights, shrink = teacher.update(theirs, start, targets)
            gap = gap * shrink + (weights * (theirs - ours)).sum(-1)
    if model.argmax is None or teacher.argmax is None:
        return TokenScores(model.nll)
    kl = gap / teacher.total - teacher.logsumexp + model.logsumexp
    return TokenScores(model.nll, kl, (model.argmax == teacher.argmax).double(), teacher.nll)


def score_rows(logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None = None) -> TokenScores:
    """Return the scores of `targets` (N,) under whole rows of logits (N, V), as `score_tokens` does."""
    ours = logits.log_softmax(-1, dtype=torch.float32)
    nll = _nll(ours, logits, targets)
    if reference is None:
        return TokenScores(nll)
    theirs = reference.log_softmax(-1, dtype=torch.float32)
    kl = (theirs.exp() * (theirs - ours)).sum(-1, dtype=torch.float64)
    agree = (ours.argmax(-1) == theirs.argmax(-1)).double()
    return TokenScores(nll, kl, agree, _nll(theirs, reference, targets))


def _nll(log_probabilities: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NaN too where a logit is -Inf, which no sum shows."""
    return -log_probabilities.gather(-1, targets[:, None])[:, 0].double() + 0 * logits.amin(-1).double()


def join_scores(parts: list[TokenScores]) -> TokenScores:
    """Concatenate the scores of several batches, on the processor."""

    def column(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values).cpu()

    return TokenScores(
        torch.cat([part.nll for part in parts]).cpu(), column("kl"), column("agree"), column("reference_nll")
    )
