"""`select`: which channel of x̂ each query channel takes, its gain, and the W_K that goes with the choice.

Pairs that RoPE rotates fast keep their own meaning: the best shared rotation of the pair, then the channel that
correlates most. Slow channels hardly rotate, so the key may mix them freely, as it may mix all channels without RoPE:
there channels and key directions are chosen jointly, to lower the sum over the group's heads h of
|(C^½ W_Q^h W_Kᵀ - C^½ X[S_h] diag(g_h) K'ᵀ)|². One slot after another takes the channels that explain most of what is
left, and all solve again (orthogonal matching pursuit, Pati et al. 1993; for several heads at once, Tropp et al. 2006);
then coordinate sweeps. Weights are (D, out). H n_heads, G n_kv_heads, K d_head, r heads a group, n slow channels.
"""

import torch

from qectomy.calibrate.channels import biases_in_basis, channel_rms, correlations
from qectomy.calibrate.free_keys import per_head, regress_on_channels, roots
from qectomy.calibrate.moments import ridge
from qectomy.calibrate.preconditioning import Preconditioned, output_rms, precondition_gain, precondition_keys, scaled
from qectomy.calibrate.problem import LayerProblem, QueryKeyParams
from qectomy.calibrate.refine import RefineSettings
from qectomy.calibrate.rope import best_angles, pair_power, rotate_pairs
from qectomy.models.query_maps import QueryMapSpec

SWEEPS = 2
DIRECTIONS = 5  # leading directions of the residual from which a slot's search starts
RIDGE = 1e-4


def init(problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator) -> QueryKeyParams:
    index, gain, W_K = choose_channels(problem)
    wanted, b_K = biases_in_basis(problem, W_K)
    query = {"index": index.to(torch.int32), "gain": gain}
    if wanted is not None:
        query["bias"] = wanted - problem.moments.student_mean[index] * gain
    return QueryKeyParams(W_K, query, b_K)


def init_without_rope(problem: LayerProblem, spec: QueryMapSpec, generator: torch.Generator) -> QueryKeyParams:
    assert problem.key_moments is not None
    L = roots(problem.key_moments)
    index = choose_free(problem.spread.student, problem.carried[0], L)
    W_K, bias = regress_on_channels(problem, index, L)
    return QueryKeyParams(W_K, {"index": index.flatten().to(torch.int32), "bias": bias.flatten()})


def preconditioned(
    params: QueryKeyParams, problem: LayerProblem, settings: RefineSettings
) -> dict[str, Preconditioned]:
    query, C = params.query, problem.moments.student
    free = precondition_keys(params, problem, settings.lr_key_fixed_channels)
    if "gain" in query:
        free["query.gain"] = precondition_gain(query["gain"], settings.lr_gain)
    if "bias" in query:  # in units of what it is added to: W_Q's queries, or channels as they are
        size = output_rms(C, problem.teacher.W_Q) if "gain" in query else C.diagonal().sqrt()[query["index"].long()]
        free["query.bias"] = scaled(query["bias"], size, settings.lr_query)
    return free


def choose_channels(problem: LayerProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (index (H*K,), gain (H*K,), W_K' (D, G*K))."""
    C, covariance, rope, (W_Q, W_K) = problem.spread.student, problem.covariance(), problem.rope, problem.carried
    angle = best_angles(correlations(C, W_Q), pair_power(covariance, W_K, rope), rope)
    W_K = rotate_pairs(W_K, angle)
    W_Q = rotate_pairs(W_Q, angle.repeat_interleave(rope.per_group, 0))
    scores, rms = correlations(C, W_Q), channel_rms(C)
    index = scores.abs().argmax(0)
    gain = scores.gather(0, index[None])[0] / rms[index]
    slow = rope.slow_channels().to(C.device)
    for g in range(rope.n_kv_heads if len(slow) else 0):
        columns = g * rope.d_head + slow
        own = [(g * rope.per_group + i) * rope.d_head + slow for i in range(rope.per_group)]
        K = W_K[:, columns]
        values, vectors = torch.linalg.eigh(K.T @ covariance @ K)
        root = values.clamp_min(1e-6 * values.max()).clamp_min(1e-30).sqrt()
        choice = JointChoice(C, [C @ (W_Q[:, c] @ (vectors * root)) for c in own])
        channels, gains, directions = choice.run()
        W_K[:, columns] = K @ (vectors / root) @ directions.T
        for i, c in enumerate(own):
            index[c], gain[c] = channels[i], gains[i]
    return index, gain, W_K


def choose_free(C: torch.Tensor, W_Q: torch.Tensor, roots: torch.Tensor) -> torch.Tensor:
    """Return the channels (H, K) that together explain each head's logits best; C is centred."""
    queries = per_head(W_Q, len(roots))
    return torch.stack([JointChoice(C, [C @ (Q @ L)]).run()[0][0] for Q, L in zip(queries, roots, strict=True)])


class JointChoice:
    """n slots of one KV group: for each slot a channel and gain a head, and a key direction that all heads share."""

    def __init__(self, C: torch.Tensor, targets: list[torch.Tensor]):
        self.C, self.targets = C, targets  # targets: C W_Q^h in whitened key coordinates, (D, n) a head
        self.rms = channel_rms(C)
        heads, self.n = len(targets), targets[0].shape[1]
        self.channels = torch.zeros(heads, 0, dtype=torch.long, device=C.device)
        self.gains = C.new_zeros(heads, 0)
        self.directions = C.new_zeros(0, self.n)

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return channels (r, n), gains (r, n) and key directions (n, n), balanced in size."""
        for _ in range(self.n):
            channel, value, direction = self._best_slot(self.directions)
            self.channels = torch.cat([self.channels, channel[:, None]], 1)
            self.gains = torch.cat([self.gains, (value / self.rms[channel])[:, None]], 1)
            self.directions = torch.cat([self.directions, direction[None]])
            self._solve(2)
        for _ in range(SWEEPS):
            for slot in range(self.n):
                others = self.directions.clone()
                others[slot] = 0
                channel, value, direction = self._best_slot(others)
                self.channels[:, slot], self.gains[:, slot] = channel, value / self.rms[channel]
                self.directions[slot] = direction
            self._solve(3)
        sizes = (self.gains * self.rms[self.channels]).square().mean(0).sqrt()
        balance = (sizes / self.directions.norm(dim=1)).clamp(1e-4, 1e4).sqrt()
        return self.channels, self.gains / balance, self.directions * balance[:, None]

    def _solve(self, rounds: int) -> None:
        """Alternate least squares: key directions for the gains, gains for the key directions."""
        for _ in range(rounds):
            gram, right = self.C.new_zeros(()), self.C.new_zeros(())
            for channel, gain, target in zip(self.channels, self.gains, self.targets, strict=True):
                gram = gram + gain[:, None] * self.C[channel][:, channel] * gain
                right = right + gain[:, None] * target[channel]
            self.directions = ridge(gram, right, RIDGE)
            overlap = self.directions @ self.directions.T
            self.gains = torch.stack(
                [
                    ridge(
                        self.C[channel][:, channel] * overlap,
                        (target[channel] * self.directions).sum(1),
                        RIDGE,
                    )
                    for channel, target in zip(self.channels, self.targets, strict=True)
                ]
            )

    def _best_slot(self, directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the channel of each head, its value, and the unit key direction that explain most of what is left."""
        rest = [
            (target - self.C[:, channel] @ (gain[:, None] * directions)) / self.rms[:, None]
            for channel, gain, target in zip(self.channels, self.gains, self.targets, strict=True)
        ]
        leading = torch.linalg.eigh(sum(r.T @ r for r in rest))[1].flip(1).T[:DIRECTIONS]
        best: tuple[float, torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        for direction in leading:
            u = direction
            for _ in range(8):
                channel = torch.stack([(r @ u).abs().argmax() for r in rest])
                rows = torch.stack([r[c] for r, c in zip(rest, channel, strict=True)])
                u = torch.linalg.svd(rows, full_matrices=False)[2][0]
            value = rows @ u
            explained = float(value.square().sum())
            if best is None or explained > best[0]:
                best = (explained, channel, value, u)
        assert best is not None
        return best[1:]
