"""What a step of decoding has to read, and how many operations it takes: from a loaded model, without a clock."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights in memory, each counted once; the indices of a query map are among them."""
    tensors = {id(tensor): tensor for _, _, tensor in _weights(model)}
    return sum(tensor.nbytes for tensor in tensors.values())


def bytes_read_per_step(model: nn.Module, batch: int, cached_tokens: float, kv_bytes: float) -> float:
    """Return the bytes that one step of decoding `batch` sequences reads at least.

    Every weight once for each time that it is used, the head's too where it is tied to the embedding; of an embedding
    one row a sequence; and `cached_tokens` keys and values of each sequence, of `kv_bytes` a token.
    """
    read = 0
    for module, _, tensor in _weights(model):
        read += batch * tensor[0].nbytes if isinstance(module, nn.Embedding) else tensor.nbytes
    return read + batch * cached_tokens * kv_bytes


def _weights(model: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Return (module, name, tensor) of every parameter and stored buffer, shared ones at each of their places."""
    found = []
    for _, module in model.named_modules(remove_duplicate=False):
        stored = [pair for pair in module._buffers.items() if pair[0] not in module._non_persistent_buffers_set]
        for name, tensor in [*module._parameters.items(), *stored]:
            if tensor is not None:
                found.append((module, name, tensor))
    return found


def kv_bytes_by_config(config: Any, dtype: torch.dtype) -> int:
    """Return the bytes of keys and values a token: 2 x layers x KV heads x d_head x bytes a number."""
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    return 2 * config.num_hidden_layers * n_kv_heads * d_head * dtype.itemsize


def kv_bytes_in_cache(cache: Any) -> float:
    """Return the bytes that a cache of transformers holds for each token of a sequence, over all layers."""
    total = 0.0
    for layer in cache.layers:
        batch, _, tokens, _ = layer.keys.shape
        total += (layer.keys.nbytes + layer.values.nbytes) / (batch * tokens)
    return total


def cached_tokens(config: Any, prompt: int, new: int) -> float:
    """Return how many tokens a step of decoding attends to, on average over `new` steps after a prompt."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    sliding = kinds.count("sliding_attention") / len(kinds) if kinds else 1.0  # share of the layers
    lengths = [prompt + step for step in range(1, new + 1)]
    seen = [sliding * min(length, window) + (1 - sliding) * length if window else length for length in lengths]
    return sum(seen) / new


class OperationCount(TorchDispatchMode):
    """Counts operations that compute or copy while the block runs; views cost nothing and are not counted.

    On a GPU each is at least one kernel to launch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.names.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not _is_view(func, out, tree_leaves((args, kwargs))):
            self.names[func.name()] = self.names.get(func.name(), 0) + 1
        return out


def _is_view(func: Any, out: Any, given: list[Any]) -> bool:
    """Whether an operation gave what it was given: other shapes of the same storage, or no tensor at all."""
    if func._schema.is_mutable:
        return False
    storages = {tensor.untyped_storage()._cdata for tensor in given if isinstance(tensor, torch.Tensor)}
    made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, torch.Tensor)]
    return all(tensor.untyped_storage()._cdata in storages for tensor in made)
