"""Refine a layer's query map and W_K on the attention KL, by minibatch Adam.

Each step takes a few windows and every s-th query row of them, all keys. Half the windows are compared at a lower
temperature (both sides' logits halved): keys that this text hardly attends to then count too, and the fit carries
over better to other text. Heavy products run in bfloat16 where the processor has it; parameters stay float32.
Weights are (D, out). Dimensions: N windows, B windows a step, T positions, R query rows, D d_model, H n_heads,
G n_kv_heads, K d_head.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from qectomy.calibrate.at_once import ROWS_A_STEP, ROWS_STRIDE, TOKENS_A_PART
from qectomy.calibrate.attention_kl import MeanAttentionKL
from qectomy.calibrate.hidden_states import WindowFile, batches
from qectomy.calibrate.preconditioning import Preconditioned, adam
from qectomy.calibrate.problem import QueryKeyParams
from qectomy.distributed.window_shard import WindowShard, whole

Rotate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (heads (B, *, R, K), positions (R,)) -> rotated


@dataclass(frozen=True, kw_only=True)
class RefineSettings:
    """Budget and step sizes; measured choices, see docs/LOG.md."""

    steps: int | None = None  # None: 400 at 32,768 tokens, growing with the square root of their number
    rows_a_step: int = ROWS_A_STEP  # query rows over all windows of a step
    row_share: float = 1 / ROWS_STRIDE  # of a window's rows used at a time
    temperatures: tuple[float, ...] = (1.0, 0.5)  # of a step's windows in turn; multiplies the logits
    weights: tuple[float, ...] = (1.0, 2.0)  # of their losses
    warmup: int = 20
    lr_key: float = 2e-3
    lr_query: float = 8e-3
    lr_key_fixed_channels: float = 4e-3  # identity and select: only gains move beside W_K
    lr_gain: float = 2e-2
    max_gain_change: float = 10.0

    def steps_for(self, tokens: int) -> int:
        """Return how many steps to take on so many tokens: more text is worth, and needs, a longer fit."""
        return self.steps or round(min(1600.0, max(100.0, 400 * math.sqrt(tokens / 32_768))))


@dataclass(frozen=True)
class FitData:
    """What the fit sees: the student's x̂ (N, T, D), the teacher's rotated and scaled queries (N, H, T, K) and keys.

    These are the windows of this process; without `share` it has all.
    """

    hidden: torch.Tensor | WindowFile
    teacher_query: torch.Tensor | WindowFile
    teacher_key: torch.Tensor | WindowFile
    allowed: torch.Tensor  # (T, T) bool, True where a query may look
    scaling: float
    rotate: Rotate
    share: WindowShard | None = None

    @property
    def windows(self) -> WindowShard:
        """Which of all fitted windows these are."""
        return self.share or whole(self.hidden.shape[0])


def refine(
    params: QueryKeyParams,
    parameters: dict[str, Preconditioned],
    query_module: nn.Module,
    data: FitData,
    settings: RefineSettings,
    generator: torch.Generator,
) -> QueryKeyParams:
    """Return the params moved to a lower mean KL(teacher || student) over heads and rows.

    `parameters` are those of their tensors that move, by field, the query map's as `query.NAME`.
    """
    fixed = {name: tensor for name, tensor in params.query.items() if f"query.{name}" not in parameters}
    draws = _Batches(data, settings, generator)

    def loss(values: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        named = dict(zip(parameters, values, strict=True))
        for part in draws.draw():
            yield _loss(named, fixed, query_module, data, *part)

    adam(
        list(parameters.values()),
        loss,
        steps=settings.steps_for(data.windows.n_fitted * data.hidden.shape[1]),
        warmup=settings.warmup,
        betas=(0.9, 0.98),
        processes=data.windows.processes,
    )
    with torch.no_grad():
        values = {name: parameter.value() for name, parameter in parameters.items()}
    query = {name: values.get(f"query.{name}", tensor) for name, tensor in params.query.items()}
    return QueryKeyParams(values["W_K"], query, values.get("b_K"), values.get("norm_gain"), values.get("norm_shift"))


class _Batches:
    """Draws, for each step, windows (each once an epoch), every s-th row of them, and their temperatures.

    All processes draw the same ones of all windows, and each takes those that it has.
    """

    def __init__(self, data: FitData, settings: RefineSettings, generator: torch.Generator):
        self.share, self.context = data.windows, data.hidden.shape[1]
        self.n = self.share.n_fitted
        self.device, self.generator = data.allowed.device, generator
        self.stride = max(1, round(1 / settings.row_share))
        self.size = max(1, min(self.n, settings.rows_a_step * self.stride // self.context))
        self.part = max(1, TOKENS_A_PART // self.context) if self.device.type == "cpu" else self.size
        self.kinds = list(zip(settings.temperatures, settings.weights, strict=True))
        self.drawn = 0
        self.order: list[int] = []

    def draw(self) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield a step's windows, rows, temperatures and weights, a few windows at a time to save memory.

        Windows are numbered as this process has them, and all processes together yield the step.
        """
        if len(self.order) < self.size:
            self.order = torch.randperm(self.n, generator=self.generator).tolist()
        chosen, self.order = self.order[: self.size], self.order[self.size :]
        first = int(torch.randint(self.stride, (1,), generator=self.generator))
        rows = torch.arange(first, self.context, self.stride, device=self.device)
        kinds = [self.kinds[(self.drawn + i) % len(self.kinds)] for i in range(len(chosen))]
        self.drawn += len(chosen)
        here = self.share.fitted_here(chosen)
        own = torch.tensor([kinds[place] for place, _ in here], device=self.device)
        temperature, weight = own.T.reshape(2, -1, 1, 1, 1)
        for start, stop in batches(0, len(here), self.part):
            share = (stop - start) / len(chosen)  # of the step's mean
            windows = [window for _, window in here[start:stop]]
            yield windows, rows, temperature[start:stop], weight[start:stop] * share


def _loss(
    values: dict[str, torch.Tensor],
    fixed: dict[str, torch.Tensor],
    query_module: nn.Module,
    data: FitData,
    chosen: list[int],
    rows: torch.Tensor,
    temperature: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Weighted mean attention KL of the chosen windows' rows (its gradient; see MeanAttentionKL)."""
    hidden = data.hidden[chosen]
    dtype = hidden.dtype
    values = {name: value.to(dtype) for name, value in values.items()}
    temperature, weight, allowed = temperature.to(dtype), weight.to(dtype), data.allowed[rows]
    teacher = data.teacher_query[chosen][:, :, rows] * temperature, data.teacher_key[chosen]
    key = hidden @ values["W_K"]  # (B, T, G*K)
    if "b_K" in values:
        key = key + values["b_K"]
    seen = hidden[:, rows]
    if "norm_gain" in values:
        seen = seen * values["norm_gain"]
    if "norm_shift" in values:
        seen = seen + values["norm_shift"]
    stored = {name.removeprefix("query."): value for name, value in values.items() if name.startswith("query.")}
    query = torch.func.functional_call(query_module, {**fixed, **stored}, (seen, key[:, rows]))  # (B, R, H*K)
    query, key = (heads.unflatten(-1, (-1, teacher[1].shape[-1])).transpose(1, 2) for heads in (query, key))
    query = data.rotate(query, rows) * (temperature * data.scaling)
    key = data.rotate(key, torch.arange(hidden.shape[1], device=hidden.device))
    return MeanAttentionKL.apply(query, key, teacher, allowed, weight)
