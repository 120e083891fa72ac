"""The equations of every model that the reduced classes can be, written out head by head in float64.

Nothing of qectomy is used: only a config's fields, the tensors by name, and torch's elementary functions.
Dimensions: B batch, T positions, D d_model, H n_heads, G n_kv_heads, K d_head; weights (in, out), as in x W.
"""

import math
from typing import Any

import torch

State = dict[str, torch.Tensor]


def ungauge(pivots: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """W (D, n*K): for each head the identity at its `pivots` (n, K), `rest` (D - K, n*K) at its other channels."""
    heads, d_head = pivots.shape
    W = torch.zeros(len(rest) + d_head, heads * d_head, dtype=rest.dtype)
    for head in range(heads):
        others = [channel for channel in range(len(W)) if channel not in pivots[head].tolist()]
        for column in range(head * d_head, (head + 1) * d_head):
            W[pivots[head, column % d_head], column] = 1
            for row, channel in enumerate(others):
                W[channel, column] = rest[row, column]
    return W


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_head: int, scale: float, window: Any) -> torch.Tensor:
    """Causal attention, one head after another: q (B, T, H*K), k and v (B, T, G*K) -> (B, T, H*K)."""
    n_heads, n_kv_heads = q.shape[-1] // d_head, k.shape[-1] // d_head
    length, out = q.shape[1], torch.zeros_like(q)
    for h in range(n_heads):
        own, theirs = h * d_head, h // (n_heads // n_kv_heads) * d_head
        for i in range(length):
            first = max(0, i - window + 1) if window else 0
            keys, values = (x[:, first : i + 1, theirs : theirs + d_head] for x in (k, v))
            weights = (torch.einsum("bk,bjk->bj", q[:, i, own : own + d_head], keys) * scale).softmax(-1)
            out[:, i, own : own + d_head] = torch.einsum("bj,bjk->bk", weights, values)
    return out


def rotate(x: torch.Tensor, d_head: int, theta: float) -> torch.Tensor:
    """RoPE: channels i and i + K/2 of a head turn by position * theta^(-2i/K); the angles are float32, as in HF."""
    half = d_head // 2
    frequencies = 1.0 / theta ** (torch.arange(0, d_head, 2).float() / d_head)
    angles = torch.arange(x.shape[1]).float()[:, None] * frequencies
    cos, sin = angles.cos().double(), angles.sin().double()
    out = torch.zeros_like(x)
    for start in range(0, x.shape[-1], d_head):
        a, b = x[..., start : start + half], x[..., start + half : start + d_head]
        out[..., start : start + half] = a * cos - b * sin
        out[..., start + half : start + d_head] = b * cos + a * sin
    return out


def logits_of(config: Any, state: State, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits (B, T, V) of a model of ours from its config and tensors."""
    state = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    gpt2 = config.model_type == "qectomy_gpt2"
    return (gpt2_logits if gpt2 else llama_logits)(config, state, ids)


def layer_norm(state: State, name: str, x: torch.Tensor, config: Any) -> torch.Tensor:
    if not config.norms:
        return x
    centred = x - x.mean(-1, keepdim=True)
    unit = centred / (centred.square().mean(-1, keepdim=True) + config.layer_norm_epsilon).sqrt()
    return unit * state[f"{name}.weight"] + state[f"{name}.bias"]


def gpt2_logits(config: Any, state: State, ids: torch.Tensor) -> torch.Tensor:
    D, K = config.n_embd, config.n_embd // config.n_head
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][: ids.shape[1]]
    for layer in range(config.n_layer):
        at = f"transformer.h.{0 if config.shared_layers else layer}."
        read = layer_norm(state, at + "ln_1", x, config)
        q, k, v = gpt2_projections(config, state, f"{at}attn.c_attn.", layer, read)
        attended = attend(q, k, v, K, config.softmax_scale or K**-0.5, None)
        if config.output_maps[layer] == "dense":
            attended = attended @ state[at + "attn.c_proj.weight"] + state[at + "attn.c_proj.bias"]
        middle = x + attended if config.attention_skip else attended
        hidden = (
            layer_norm(state, at + "ln_2", middle, config) @ state[at + "mlp.c_fc.weight"] + state[at + "mlp.c_fc.bias"]
        )
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        thought = (0.5 * hidden * (1 + inner.tanh())) @ state[at + "mlp.c_proj.weight"] + state[at + "mlp.c_proj.bias"]
        x = middle + thought if config.mlp_skip else thought
    assert x.shape[-1] == D
    return layer_norm(state, "transformer.ln_f", x, config) @ state["lm_head.weight"].T


def gpt2_projections(config: Any, state: State, at: str, layer: int, x: torch.Tensor) -> list[torch.Tensor]:
    D, K = config.n_embd, config.n_embd // config.n_head
    query, value = config.query_maps[layer], config.value_maps[layer]
    W = state[at + "weight"]
    if query == "dense":
        b = state[at + "bias"]
        return [x @ W[:, i * D : (i + 1) * D] + b[i * D : (i + 1) * D] for i in range(3)]
    if value == "dense":
        k, v = x @ W[:, :D], x @ W[:, D:]
    else:
        pivots, rest = state[at + "gauge.pivots"], state[at + "gauge.weight"]
        k, v = x @ W, x @ ungauge(pivots[-D // K :], rest[:, -D:])
    if query == "gauge":
        return [x @ ungauge(pivots[: D // K], rest[:, :D]) + state[at + "gauge.bias"], k, v]
    return [x + state.get(at + "query.bias", 0), k, v]


def rms_norm(state: State, name: str, x: torch.Tensor, config: Any) -> torch.Tensor:
    if not config.norms:
        return x
    return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * state[f"{name}.weight"]


def llama_logits(config: Any, state: State, ids: torch.Tensor) -> torch.Tensor:
    K, n_query = config.head_dim, config.num_attention_heads * config.head_dim
    theta = config.rope_parameters["rope_theta"]
    window = config.sliding_window if config.model_type == "qectomy_mistral" else None

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    x = state["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{0 if config.shared_layers else layer}."
        read = rms_norm(state, at + "input_layernorm", x, config)
        if config.query_maps[layer] == "dense":
            q = linear(at + "self_attn.q_proj", read)
        else:
            q = torch.cat([read] * -(-n_query // read.shape[-1]), -1)[..., :n_query] + state.get(
                at + "self_attn.query.bias", 0
            )
        k = linear(at + "self_attn.k_proj", read)
        if config.value_maps[layer] == "gauge":
            v = read @ ungauge(state[at + "self_attn.v_proj.pivots"], state[at + "self_attn.v_proj.weight"].T)
        else:
            v = linear(at + "self_attn.v_proj", read)
        attended = attend(rotate(q, K, theta), rotate(k, K, theta), v, K, K**-0.5, window)
        if config.output_maps[layer] == "dense":
            attended = linear(at + "self_attn.o_proj", attended)
        middle = x + attended if config.attention_skip else attended
        hidden = rms_norm(state, at + "post_attention_layernorm", middle, config)
        gate, up = linear(at + "mlp.gate_proj", hidden), linear(at + "mlp.up_proj", hidden)
        thought = linear(at + "mlp.down_proj", gate * gate.sigmoid() * up)
        x = middle + thought if config.mlp_skip else thought
    return rms_norm(state, "model.norm", x, config) @ state["lm_head.weight"].T
