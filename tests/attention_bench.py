"""One layer's attention on random x̂: a teacher's W_Q and W_K, and the KL of what stands in for them, in float64.

The KL is written out head by head here; nothing of qectomy computes it. Dimensions: N windows, T positions,
D d_model, H n_heads, G n_kv_heads, K d_head.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from qectomy.calibrate.layer_fit import attended_moments
from qectomy.calibrate.maps import fitted_map
from qectomy.calibrate.moments import Moments, MomentSums
from qectomy.calibrate.problem import LayerProblem, Projections, QueryKeyParams
from qectomy.calibrate.refine import FitData, RefineSettings, refine
from qectomy.calibrate.rope import Rope
from qectomy.modeling import modeling_qectomy_gpt2, modeling_qectomy_llama
from qectomy.modeling.modeling_qectomy_gpt2 import QectomyGPT2Config
from qectomy.modeling.modeling_qectomy_llama import QectomyLlamaConfig
from qectomy.models.family import Dimensions
from qectomy.models.query_maps import QueryMapSpec, parse_query_map


def reference_kl(teacher: Any, student: Any, allowed: torch.Tensor) -> torch.Tensor:
    """KL(softmax t || softmax s) of each row, (N, H, R), one head at a time; each argument is (query, key)."""
    (n, heads, _, _), groups = teacher[0].shape, teacher[1].shape[1]
    rows = []
    for b in range(n):
        for h in range(heads):
            logs = []
            for query, key in (teacher, student):
                logits = query[b, h].double() @ key[b, h * groups // heads].double().T
                logs.append(logits.masked_fill(~allowed, -torch.inf).log_softmax(-1))
            terms = torch.where(allowed, logs[0].exp() * (logs[0] - logs[1]), 0.0)
            rows.append(terms.sum(-1))
    return torch.stack(rows).view(n, heads, -1)


@dataclass(kw_only=True)
class AttentionBench:
    n_heads: int = 4
    n_kv_heads: int = 2
    d_head: int = 8
    d_model: int = 32
    bias: bool = False
    gpt2: bool = False  # every head its own key, no RoPE, biases, and a norm that has a shift
    window: int | None = None  # sliding
    theta: float = 500.0
    context: int = 24
    n_windows: int = 6
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        if self.gpt2:
            self.n_kv_heads, self.bias, self.d_model = self.n_heads, True, self.n_heads * self.d_head
        n_query, n_key = self.n_heads * self.d_head, self.n_kv_heads * self.d_head
        spread = self.normal(self.d_model, self.d_model) * self.d_model**-0.5 + torch.eye(self.d_model)
        self.hidden = (
            self.normal(self.n_windows, self.context, self.d_model) @ spread + 0.5 * self.normal(self.d_model)
        ).float()
        self.W_Q = self.normal(self.d_model, n_query) * self.d_model**-0.5
        self.W_K = self.normal(self.d_model, n_key) * self.d_model**-0.5
        self.b_Q = 0.5 * self.normal(n_query) if self.bias else None
        self.b_K = 0.5 * self.normal(n_key) if self.bias else None
        self._set_family()
        self.rope = Rope(self.cos[0].double(), self.sin[0].double(), self.n_kv_heads, self.n_heads // self.n_kv_heads)
        self.dims = Dimensions(
            n_layers=1,
            d_model=self.d_model,
            d_mlp=8,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            d_head=self.d_head,
            vocab_size=8,
            n_positions=self.context,
            tied=False,
            attention_bias=self.bias,
            output_bias=self.bias,
            mlp_bias=False,
            rope=not self.gpt2,
            norm_shift=self.gpt2,
        )
        distance = torch.arange(self.context)[:, None] - torch.arange(self.context)
        self.allowed = (distance >= 0) & (distance < (self.window or self.context))

    def _set_family(self) -> None:
        """Choose the query modules and their config, and the angles of RoPE; without it they turn nothing."""
        if self.gpt2:
            self.modules = modeling_qectomy_gpt2.QUERY_MODULES
            self.config = QectomyGPT2Config(n_embd=self.d_model, n_head=self.n_heads, n_layer=1)
            self.cos, self.sin = torch.ones(1, self.context, self.d_head), torch.zeros(1, self.context, self.d_head)
            return
        options = dict(
            hidden_size=self.d_model,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            head_dim=self.d_head,
            attention_bias=self.bias,
            output_bias=self.bias,
            num_hidden_layers=1,
            rope_parameters=dict(rope_type="default", rope_theta=self.theta),
        )
        self.modules = modeling_qectomy_llama.QUERY_MODULES
        self.config = QectomyLlamaConfig(**options)
        rotary = LlamaRotaryEmbedding(LlamaConfig(**options))
        self.cos, self.sin = rotary(torch.zeros(1), torch.arange(self.context)[None])

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.cos[:, positions].to(heads.dtype), self.sin[:, positions].to(heads.dtype)
        return apply_rotary_pos_emb(heads, heads, cos, sin)[0]

    def heads(self, rows: torch.Tensor) -> torch.Tensor:
        """Split (N, T, n * K) into rotated heads (N, n, T, K)."""
        return self.rotate(rows.unflatten(-1, (-1, self.d_head)).transpose(1, 2), torch.arange(self.context))

    @property
    def scaling(self) -> float:
        return self.d_head**-0.5

    @property
    def teacher(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scaled, rotated queries and rotated keys, float64."""
        x = self.hidden.double()
        query, key = x @ self.W_Q, x @ self.W_K
        if self.bias:
            query, key = query + self.b_Q, key + self.b_K
        return self.heads(query) * self.scaling, self.heads(key)

    @property
    def projections(self) -> Projections:
        b_K = None if self.gpt2 else self.b_K  # one vector added to every key: softmax ignores it
        return Projections(self.W_Q, self.b_Q, self.W_K, b_K)

    @property
    def moments(self) -> Moments:
        sums = MomentSums(self.d_model, torch.device("cpu"))
        sums.add(self.hidden, self.hidden)
        return sums.moments()

    @property
    def data(self) -> FitData:
        query, key = self.teacher
        return FitData(self.hidden, query.float(), key.float(), self.allowed, self.scaling, self.rotate)

    def module(self, spec: QueryMapSpec) -> torch.nn.Module:
        return self.modules[spec.name](self.config, spec.rank or 0)

    def problem(self, name: str) -> LayerProblem:
        moments = self.moments
        spread = moments.student - torch.outer(moments.student_mean, moments.student_mean)
        attended = spread.float().repeat(self.n_kv_heads, 1, 1) if name == "key-shared" else None
        if self.gpt2:
            W_K = None if name == "key-shared" else self.W_K
            attended = attended_moments(self.data, self.n_kv_heads, W_K)
        return LayerProblem(
            dims=self.dims, rope=self.rope, teacher=self.projections, moments=moments, key_moments=attended
        )

    def start(self, name: str, seed: int = 0) -> QueryKeyParams:
        spec = parse_query_map(name)
        init = fitted_map(spec).init_without_rope if self.gpt2 else fitted_map(spec).init
        return init(self.problem(name), spec, torch.Generator().manual_seed(seed))

    def refined(
        self, name: str, start: QueryKeyParams, seed: int = 0, steps: int = 60, **options: Any
    ) -> QueryKeyParams:
        """The start after a short refinement."""
        spec, settings = parse_query_map(name), RefineSettings(steps=steps, **options)
        parameters = fitted_map(spec).preconditioned(start, self.problem(name), settings)
        return refine(start, parameters, self.module(spec), self.data, settings, torch.Generator().manual_seed(seed))

    def kl(self, name: str, start: QueryKeyParams) -> float:
        """Mean KL of the attention that a fitted layer gives."""
        key = self.hidden.double() @ start.W_K.double()
        if start.b_K is not None:
            key = key + start.b_K.double()
        seen = self.hidden.double() * (1.0 if start.norm_gain is None else start.norm_gain.double())
        if start.norm_shift is not None:
            seen = seen + start.norm_shift.double()
        tensors = {n: t.double() if t.is_floating_point() else t for n, t in start.query.items()}
        module = self.module(parse_query_map(name)).double()
        query = torch.func.functional_call(module, tensors, (seen, key), strict=True)
        student = self.heads(query) * self.scaling, self.heads(key)
        return float(reference_kl(self.teacher, student, self.allowed).mean())
