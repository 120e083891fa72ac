"""A layer of a checkpoint's family with random weights, at its own sizes or at smaller ones, and what its fit looks at.

Time depends on shapes alone. Dimensions: n windows, T positions, D d_model, H n_heads, G n_kv_heads, K d_head.
"""

import math
from dataclasses import replace

import torch
from torch import nn

from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.calibrate.moments import Moments
from qectomy.calibrate.precision import fast_dtype
from qectomy.calibrate.projections import Projections, Start
from qectomy.calibrate.refine import FitData
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.models.family import Dimensions
from qectomy.models.query_maps import QueryMapSpec, refusal

BLOCK = 1 << 20  # random numbers that are drawn, and then repeated: drawing takes longer than what is timed


def at_most(dims: Dimensions, d_model: int) -> Dimensions:
    """Return the sizes with widths and heads halved until D is at most `d_model`, as far as they can be halved."""
    while dims.d_model > d_model and not (dims.d_model % 2 or dims.d_mlp % 2 or dims.n_heads % 2):
        heads, groups = dims.n_heads // 2, dims.n_kv_heads // 2 if dims.n_kv_heads % 2 == 0 else dims.n_kv_heads
        if heads % groups:
            break
        dims = replace(dims, d_model=dims.d_model // 2, d_mlp=dims.d_mlp // 2, n_heads=heads, n_kv_heads=groups)
    return dims


class RandomLayer:
    """One layer of the original model and its runner."""

    def __init__(
        self, source: Checkpoint, dims: Dimensions, context: int, device: torch.device, generator: torch.Generator
    ):
        family, dense = source.family, QueryMapSpec("dense")
        sized = replace(source, dims=dims, config=family.resized(source.config, dims))
        self.sized, self.context, self.generator = sized, context, generator
        self.runner = LayerRunner(sized, (dense,) * dims.n_layers, context, str(device))
        self._block = torch.randn(BLOCK, generator=generator)
        shapes = family.layer_shapes(dims, dense)
        tensors = {name: self._noise(*shape) / math.sqrt(dims.d_model) for name, shape in shapes.items()}
        for norm in (family.roles.attention_norm, family.roles.mlp_norm):
            tensors[f"{norm}.weight"] = torch.ones(dims.d_model)
        self.teacher: nn.Module = self.runner.build(0, tensors)

    def states(self, windows: int) -> torch.Tensor:
        """Return hidden states (n, T, D)."""
        return self._noise(windows, self.context, self.runner.dims.d_model).to(self.runner.device)

    def fit_data(self, windows: int) -> FitData:
        """Return what the fit sees of so many windows, in memory."""
        dims, device = self.runner.dims, self.runner.device
        made = (
            (windows, self.context, dims.d_model),
            (windows, dims.n_heads, self.context, dims.d_head),
            (windows, dims.n_kv_heads, self.context, dims.d_head),
        )
        hidden, query, key = (self._noise(*shape).to(device, fast_dtype(device)) for shape in made)
        return FitData(
            hidden=hidden,
            teacher_query=query,
            teacher_key=key,
            allowed=self.runner.causal(),
            scaling=self.runner.scaling(self.teacher),
            turn=self.runner.turn,
        )

    def moments(self) -> Moments:
        """Return moments of full rank."""
        d_model, device = self.runner.dims.d_model, self.runner.device
        draw = torch.randn(2 * d_model, d_model, generator=self.generator).to(device)
        student = (draw.T @ draw).double() / len(draw)
        mean = torch.zeros(d_model, dtype=torch.float64, device=device)
        return Moments(student, student.clone(), mean, mean)

    def projections(self) -> Projections:
        """Return a query and a key, float64, with the biases that the family's have."""
        dims, device = self.runner.dims, self.runner.device
        query, key = dims.n_heads * dims.d_head, dims.n_kv_heads * dims.d_head

        def made(*shape: int) -> torch.Tensor:
            return (self._noise(*shape) / math.sqrt(dims.d_model)).to(device).double()

        b_Q = made(query) if dims.attention_bias else None
        b_K = made(key) if dims.attention_bias and dims.rope else None
        return Projections(made(dims.d_model, query), b_Q, made(dims.d_model, key), b_K)

    def fitting(self, spec: QueryMapSpec) -> QueryMapSpec:
        """Return the map, its rank made smaller where it would not be smaller than W_Q."""
        while spec.rank and spec.rank > 1 and refusal(spec, self.runner.dims) is not None:
            spec = replace(spec, rank=spec.rank // 2)
        return spec

    def start(self, spec: QueryMapSpec) -> Start:
        """Return a start of a map with random numbers, from which `refine` goes on."""
        dims, device, own = self.runner.dims, self.runner.device, self.projections()
        query = {}
        for name, (kind, shape) in spec.stored(dims).items():
            if kind == "index":
                query[name] = torch.randint(dims.d_model, shape, generator=self.generator, dtype=torch.int32).to(device)
            else:
                query[name] = self._noise(*shape).to(device).double()
        plain = spec.name == "identity"
        gain = torch.ones(dims.d_model, dtype=torch.float64, device=device) if plain and dims.rope else None
        shift = torch.zeros(dims.d_model, dtype=torch.float64, device=device) if plain and not dims.rope else None
        return Start(own.W_K, query, own.b_K, gain, shift)

    def query_module(self, spec: QueryMapSpec) -> nn.Module:
        """Return the module that stands in W_Q's place, without its tensors."""
        dims, family = self.runner.dims, self.sized.family
        runner = LayerRunner(self.sized, (spec,) * dims.n_layers, self.context, str(self.runner.device))
        with torch.device("meta"):
            reduced = family.reduced_layer(runner.reduced_config, 0)
        module: nn.Module = reduced.get_submodule(family.roles.query_map)
        return module

    def _noise(self, *shape: int) -> torch.Tensor:
        count = math.prod(shape)
        return self._block.repeat(-(-count // BLOCK))[:count].view(shape)
