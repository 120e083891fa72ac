"""Run one decoder layer, teacher's or student's, in the two halves that the pass needs.

    x ──► norm ──► attention ──► + ──► x_mid ──► norm ──► MLP ──► + ──► x_out
           x̂        └ heads (input of W_O)           └ acts (input of W_down)

The modules are those that ship: transformers' own for the teacher, `modeling_qectomy_*` for the student.
Dimensions: B windows, T positions, D d_model, H n_heads, G n_kv_heads, K d_head.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qectomy.calibrate.rope import Rope
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.config_files import load_config
from qectomy.models.family import Dimensions, Family, LinearView
from qectomy.models.query_maps import QueryMapSpec


class LayerRunner:
    """Builds and runs single layers of one model on windows of one length."""

    def __init__(self, source: Checkpoint, recipe: tuple[QueryMapSpec, ...], context: int, device: str):
        self.family: Family = source.family
        self.dims: Dimensions = source.dims
        self.device = torch.device(device)
        self.context = context
        self.config = load_config(source.family, source.config)
        self.config._attn_implementation = "sdpa"
        self.reduced_config = load_config(
            source.family, {**source.config, "query_maps": [str(spec) for spec in recipe]}, reduced=True
        )
        self.reduced_config._attn_implementation = "sdpa"
        positions = torch.arange(context, device=self.device)[None]
        with torch.no_grad():
            rotary = self.family.rotary(self.config)
            self.rotary = rotary and rotary.to(self.device)(torch.zeros(1, device=self.device), positions)

    def mask(self, module: nn.Module) -> torch.Tensor | None:
        """(1, 1, T, T) bool, True where a layer's query may look, if it is more than plain causal; else None."""
        attention: Any = module.get_submodule(self.family.roles.attention)
        window = self.family.sliding_window(self.config, attention.layer_idx)
        if window is None or window >= self.context:
            return None
        distance = torch.arange(self.context)[:, None] - torch.arange(self.context)[None, :]
        return ((distance >= 0) & (distance < window))[None, None].to(self.device)

    def causal(self, module: nn.Module) -> torch.Tensor:
        """(T, T) bool, True where a layer's query may look."""
        if (mask := self.mask(module)) is not None:
            return mask[0, 0]
        return torch.ones(self.context, self.context, dtype=torch.bool, device=self.device).tril()

    def build(self, layer: int, tensors: dict[str, torch.Tensor], reduced: bool = False) -> nn.Module:
        """Return a layer's module holding `tensors` (by name inside the layer), in float32 on the device."""
        make = self.family.reduced_layer if reduced else self.family.stock_layer
        with torch.device("meta"):
            module = make(self.reduced_config if reduced else self.config, layer)
        placed = {name: tensor.to(self.device) for name, tensor in tensors.items()}
        module.load_state_dict(placed, strict=True, assign=True)
        return module.requires_grad_(False).eval()

    def read(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return x̂ (B, T, D): the hidden state as the projections read it."""
        return module.get_submodule(self.family.roles.attention_norm)(x)

    def rotate(self, heads: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Return heads (B, *, R, K) rotated by RoPE, if there is any, at `positions` (R,); the family's own formula."""
        if self.rotary is None:
            return heads
        cos, sin = (angles[:, positions].to(heads.dtype) for angles in self.rotary)
        return self.family.apply_rotary(heads, cos, sin)

    def rope(self) -> Rope:
        """The angles of RoPE at positions 0 .. T-1 in float64, all 0 without it, and how the heads are grouped."""
        dims = self.dims
        cos, sin = self.rotary or (torch.ones(1, 2, dims.d_head), torch.zeros(1, 2, dims.d_head))
        cos, sin = (angles[0].to(self.device).double() for angles in (cos, sin))
        return Rope(cos, sin, dims.n_kv_heads, dims.n_heads // dims.n_kv_heads)

    def queries_keys(self, module: nn.Module, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scaled, rotated queries (B, H, T, K) and rotated keys (B, G, T, K) of x̂ (B, T, D)."""
        roles, dims = self.family.roles, self.dims
        attention: Any = module.get_submodule(roles.attention)
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        if hasattr(attention, "project_heads"):
            query, key, _ = attention.project_heads(hidden)
            return self.rotate(query.float(), positions) * self.scaling(module), self.rotate(key.float(), positions)
        out = module.get_submodule(roles.key.module)(hidden)
        key = _part(out, roles.key)
        if roles.query.module == roles.key.module:
            query = _part(out, roles.query)
        elif hasattr(attention, "project_query"):
            query = attention.project_query(hidden, key)
        else:
            query = module.get_submodule(roles.query.module)(hidden)
        query = query.float().unflatten(-1, (dims.n_heads, dims.d_head)).transpose(1, 2)
        key = key.float().unflatten(-1, (dims.n_kv_heads, dims.d_head)).transpose(1, 2)
        return self.rotate(query, positions) * self.scaling(module), self.rotate(key, positions)

    def scaling(self, module: nn.Module) -> float:
        """The factor on the logits before the softmax, 1 / sqrt(K) in most models."""
        attention: Any = module.get_submodule(self.family.roles.attention)
        return float(attention.scaling)

    def attend(self, module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x_mid (B, T, D), heads (B, T, H*K)): the stream after attention and what W_O read."""
        roles = self.family.roles
        attention = module.get_submodule(roles.attention)
        with captured_input(module.get_submodule(roles.output.module)) as heads:
            angles = {} if self.rotary is None else {"position_embeddings": self.rotary}
            out, _ = attention(self.read(module, x), attention_mask=self.mask(module), **angles)
        return x + out, heads[0]

    def think(self, module: nn.Module, x_mid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (x_out (B, T, D), acts (B, T, d_mlp)): the stream after the MLP and what W_down read."""
        roles = self.family.roles
        with captured_input(module.get_submodule(roles.mlp_out.module)) as acts:
            out = module.get_submodule(roles.mlp)(module.get_submodule(roles.mlp_norm)(x_mid))
        return x_mid + out, acts[0]

    def forward(self, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """Return the stream after the whole layer, (B, T, D)."""
        x_mid, _ = self.attend(module, x)
        return self.think(module, x_mid)[0]


def _part(out: torch.Tensor, view: LinearView) -> torch.Tensor:
    """Return one projection's share of what a fused module gives, (..., out)."""
    index, parts = view.part
    return out.chunk(parts, -1)[index]


@contextmanager
def captured_input(module: nn.Module) -> Iterator[list[Any]]:
    """Collect the first argument of each call of `module` while the block runs."""
    seen: list[Any] = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        yield seen
    finally:
        hook.remove()
