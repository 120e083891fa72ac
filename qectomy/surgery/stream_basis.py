"""Turn the residual stream: another orthonormal basis for the hidden states, the same function.

RMSNorm does not see an orthogonal Θ once its gain γ is folded into its readers, so a model is unchanged when every
reader W of the stream becomes Θᵀ diag(γ) W, every writer W becomes W Θ and the gains become 1 (`streams.py` says
which bases a stream lets pass). `identity` needs it: in the basis of training a head's slice of x̂ may hold no constant,
and without one its queries cannot all point at the key that takes the unwanted attention. In a random basis every
channel carries some of everything.

The final norm's gain γ_f does not commute with Θ. An untied head takes it in: H diag(γ_f) Θ. A tied head does too,
E' = E diag(γ_f / c) Θ with one c for all channels as the new final gain, and keeps every logit. The price is that the
embedding enters the stream scaled by s = γ_f / c, channel by channel. The first attention's readers divide by s; in
later layers the embedding is a small part of the stream, and the fit takes up what is left. Channels whose s is far
from 1 in size are not turned and keep their own gain.
Dimensions: D d_model, V vocabulary; a reader W is (D, out) and a writer (in, D), as `read_view` gives them in either
orientation; embedding E and head H are (V, D).
"""

from dataclasses import dataclass

import torch

from qectomy.models.family import Family, LinearView
from qectomy.models.linear_views import read_view, store_views

FAR = 4.0  # a channel whose final gain is this many times larger or smaller than the common one is not turned


@dataclass(frozen=True)
class StreamBasis:
    """x' = x Θ; Θ is (D, D) orthogonal, float64. `tied` models share one matrix between embedding and head."""

    theta: torch.Tensor
    final_gain: torch.Tensor  # γ_f (D,), float64
    common_gain: torch.Tensor  # c (D,), in the old basis; equal within each block that Θ turns
    tied: bool

    @property
    def new_final_gain(self) -> torch.Tensor:
        """The final norm's gain in the new basis, (D,)."""
        return self.theta.square().T @ self.common_gain

    @property
    def embedding_scale(self) -> torch.Tensor:
        """s = γ_f / c (D,); 1 where the final gain is 0, a channel that the head never sees."""
        return torch.where(self.final_gain == 0, 1.0, self.final_gain / self.common_gain)

    def embedding_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the stored rows of the embedding for the original's rows (n, D)."""
        return self.head_rows(rows) if self.tied else self.states(rows)

    def head_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the stored rows of the head, with which every logit stays as it was."""
        return (rows.double() * self.embedding_scale @ self.theta).to(rows.dtype)

    def states(self, x: torch.Tensor) -> torch.Tensor:
        """Return hidden states (..., D) in the new basis."""
        return (x.double() @ self.theta.to(x.device)).to(x.dtype)

    def original_states(self, x: torch.Tensor) -> torch.Tensor:
        """Return hidden states (..., D) back in the basis of training."""
        return (x.double() @ self.theta.T.to(x.device)).to(x.dtype)

    def layer(
        self, family: Family, tensors: dict[str, torch.Tensor], scaled_embedding: bool = False
    ) -> dict[str, torch.Tensor]:
        """Return a layer's tensors, by name inside the layer, in the new basis; norm gains are folded in and 1.

        With `scaled_embedding` the attention's readers divide by s: for the reduced model's first layer.
        """
        roles, out = family.roles, dict(tensors)
        readers = (
            (roles.attention_norm, (roles.query, roles.key, roles.value)),
            (roles.mlp_norm, roles.mlp_readers),
        )
        for norm, views in readers:
            gain = tensors[f"{norm}.weight"].double()
            if scaled_embedding and self.tied and norm == roles.attention_norm:
                gain = gain / self.embedding_scale
            for view in views:
                out |= self._read_from(tensors, view, gain[:, None] * self.theta)
            out[f"{norm}.weight"] = torch.ones_like(tensors[f"{norm}.weight"])
        for view in (roles.output, roles.mlp_out):
            out |= self._written_to(tensors, view)
        return out

    @staticmethod
    def _read_from(tensors: dict[str, torch.Tensor], view: LinearView, turn: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return a reader's tensors with turnᵀ W in the place of W (D, out); in float64."""
        W, bias = read_view(tensors, view)
        return store_views([(view, ((turn.T @ W.double()).to(W.dtype), bias))])

    def _written_to(self, tensors: dict[str, torch.Tensor], view: LinearView) -> dict[str, torch.Tensor]:
        """Return a writer's tensors with W Θ in the place of W (in, D), and its bias turned; in float64."""
        W, bias = read_view(tensors, view)
        turned = [None if part is None else (part.double() @ self.theta).to(part.dtype) for part in (W, bias)]
        assert turned[0] is not None
        return store_views([(view, (turned[0], turned[1]))])


def random_basis(
    final_gain: torch.Tensor, embedding_power: torch.Tensor, tied: bool, generator: torch.Generator
) -> StreamBasis:
    """Return a random basis. `embedding_power` (D,): mean square of the embedding's columns, which weighs s - 1.

    c = Σ p γ_f² / Σ p γ_f minimises Σ p (γ_f / c - 1)².
    """
    gain, power = final_gain.double(), embedding_power.double()
    d_model = len(gain)
    if not tied:
        return StreamBasis(random_orthogonal(d_model, generator), gain, torch.ones_like(gain), tied)
    c = (power * gain.square()).sum() / (power * gain).sum()
    size = (gain / c).abs()
    turned = ((size > 1 / FAR) & (size < FAR)).nonzero()[:, 0]
    theta = torch.eye(d_model, dtype=torch.float64)
    theta[turned[:, None], turned] = random_orthogonal(len(turned), generator)
    common = gain.clone()
    common[turned] = c
    return StreamBasis(theta, gain, common, tied)


def random_orthogonal(n: int, generator: torch.Generator) -> torch.Tensor:
    """Return an (n, n) orthogonal matrix drawn uniformly, float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)  # uniform only once R's diagonal is positive
