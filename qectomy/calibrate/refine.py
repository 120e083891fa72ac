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
from qectomy.calibrate.preconditioning import Parameter, adam, key_parameter, mix_parameter, output_rms
from qectomy.calibrate.projections import Start
from qectomy.calibrate.rope import Rope
from qectomy.distributed.window_shard import Share, whole

Turn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (heads (B, *, R, K), positions (R,)) -> turned


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
    """What the fit sees: the student's x̂ (N, T, D), the teacher's turned and scaled queries (N, H, T, K) and keys.

    These are the windows of this process; without `share` it has all.
    """

    hidden: torch.Tensor | WindowFile
    teacher_query: torch.Tensor | WindowFile
    teacher_key: torch.Tensor | WindowFile
    allowed: torch.Tensor  # (T, T) bool, True where a query may look
    scaling: float
    turn: Turn
    share: Share | None = None

    @property
    def windows(self) -> Share:
        """Which of all fitted windows these are."""
        return self.share or whole(self.hidden.shape[0])


def refine(
    start: Start,
    query_module: nn.Module,
    data: FitData,
    C: torch.Tensor,
    W_Q: torch.Tensor,
    rope: Rope,
    settings: RefineSettings,
    generator: torch.Generator,
) -> Start:
    """Return the start moved to a lower mean KL(teacher || student) over heads and rows.

    `C` is E[x̂ᵀx̂] and `W_Q` the original projection: they set the units in which each tensor moves.
    """
    parameters = _parameters(start, C.float(), W_Q.float(), rope, settings)
    fixed = {name: tensor for name, tensor in start.query.items() if f"query.{name}" not in parameters}
    draws = _Batches(data, settings, generator)

    def loss(values: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        named = dict(zip(parameters, values, strict=True))
        for part in draws.draw():
            yield _loss(named, fixed, query_module, data, rope, *part)

    adam(
        list(parameters.values()),
        loss,
        steps=settings.steps_for(data.windows.n_fitted * data.hidden.shape[1]),
        warmup=settings.warmup,
        betas=(0.9, 0.98),
        together=data.windows.together,
    )
    with torch.no_grad():
        values = {name: parameter.value() for name, parameter in parameters.items()}
    query = {name: values.get(f"query.{name}", tensor) for name, tensor in start.query.items()}
    return Start(values["W_K"], query, values.get("b_K"), values.get("norm_gain"), values.get("norm_shift"))


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
    rope: Rope,
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
    query = data.turn(query.unflatten(-1, (-1, rope.d_head)).transpose(1, 2), rows) * (temperature * data.scaling)
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    key = data.turn(key.unflatten(-1, (-1, rope.d_head)).transpose(1, 2), positions)
    return MeanAttentionKL.apply(query, key, teacher, allowed, weight)


def _parameters(
    start: Start,
    C: torch.Tensor,
    W_Q: torch.Tensor,
    rope: Rope,
    settings: RefineSettings,
) -> dict[str, Parameter]:
    """Set up every free tensor with the units in which it moves."""
    lr, limit = settings.lr_query, math.log(settings.max_gain_change)
    fixed_channels = not {"mix", "down"} & start.query.keys()
    lr_key = settings.lr_key_fixed_channels if fixed_channels else settings.lr_key
    W_K = start.W_K.float()
    parameters = {"W_K": key_parameter(W_K, C, rope, power=0.125, lr=lr_key)}

    def scaled(origin: torch.Tensor, size: torch.Tensor, rate: float = lr) -> Parameter:
        return Parameter(origin.float(), lambda u: size * u, rate)

    if start.b_K is not None:
        parameters["b_K"] = scaled(start.b_K, output_rms(C, W_K), lr_key)
    if start.norm_gain is not None:
        gain = start.norm_gain.float()
        parameters["norm_gain"] = Parameter(
            gain, lambda u: gain * (torch.exp(u.clamp(-limit, limit)) - 1), settings.lr_gain
        )
    if start.norm_shift is not None:
        parameters["norm_shift"] = scaled(start.norm_shift, C.diagonal().sqrt())
    for name, tensor in start.query.items():
        if name == "mix":
            parameters["query.mix"] = mix_parameter(tensor.float(), W_Q, W_K, C, rope, lr=lr)
        elif name == "gain":
            typical = tensor.float().abs()
            parameters["query.gain"] = scaled(tensor, typical.clamp_min(0.1 * float(typical.mean())), settings.lr_gain)
        elif name == "down":
            parameters["query.down"] = scaled(tensor, tensor.float().square().mean().sqrt())
        elif name == "up":
            parameters["query.up"] = scaled(tensor, tensor.float().square().mean().sqrt())
        elif name == "bias":
            parameters["query.bias"] = scaled(tensor, _query_size(start.query, C, W_Q))
    return parameters


def _query_size(query: dict[str, torch.Tensor], C: torch.Tensor, W_Q: torch.Tensor) -> torch.Tensor:
    """Return the rms (H*K,) of each query channel at the start, whose coordinates need not be those of W_Q."""
    if "index" in query and "gain" not in query:  # chosen channels as they are
        return C.diagonal().sqrt()[query["index"].long()]
    if "down" in query:
        W = (query["up"] @ query["down"]).T.float()
        columns = torch.arange(W.shape[1], device=W.device)
        W[columns % len(W), columns] += query["gain"].float()
        return output_rms(C, W)
    return output_rms(C, W_Q)
