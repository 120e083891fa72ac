"""Prefill and decoding in a plain loop: one forward of the prompt, then one token at a time from the cache.

What a library's `generate` does around the model is not in it. The tokens are given, not chosen: both models of a
comparison read the same ones. Dimensions: B batch, P prompt, N new tokens.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qectomy.errors import QectomyError
from qectomy.eval.inference_bytes import OperationCount
from qectomy.eval.layerwise_model import cache_keyword


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The seconds of one prefill, and of all steps of decoding after it."""

    prefill: float
    decode: float


class InferenceLoop:
    """One loaded model, ready to be timed."""

    def __init__(self, name: str, model: Any, compiled: bool = False, clock: Callable[[], float] | None = None):
        self.name, self.model = name, model
        self.device = next(model.parameters()).device
        self._cache_name = cache_keyword(model)
        self._clock = clock or time.perf_counter
        self._compiled = compiled
        self._static: dict[tuple[int, int], Any] = {}  # a compiled step goes on with the cache it was compiled for
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self._step = torch.compile(model, mode=mode, dynamic=False) if compiled else model

    def now(self) -> float:
        """The time when everything asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self._clock()

    def run(self, prompt: torch.Tensor, new: torch.Tensor) -> Timing:
        """Time one prefill of (B, P) tokens and decoding of (B, N) more. Raises QectomyError when memory is short."""
        with torch.inference_mode(), short_memory(self.name, self.device, len(prompt), prompt.shape[1] + new.shape[1]):
            prompt, new = prompt.to(self.device), new.to(self.device)
            cache = self._cache(len(prompt), prompt.shape[1] + new.shape[1])
            begun = self.now()
            cache = self._forward(self.model, prompt, cache, 0)
            filled = self.now()
            for place in range(new.shape[1]):
                cache = self._forward(self._step, new[:, place : place + 1], cache, prompt.shape[1] + place)
            return Timing(prefill=filled - begun, decode=self.now() - filled)

    def look(self, prompt: torch.Tensor, new: torch.Tensor) -> tuple[Any, int]:
        """Return (cache after the prompt and one token, operations of that one step of decoding)."""
        with torch.no_grad(), short_memory(self.name, self.device, len(prompt), prompt.shape[1] + 1):
            cache = self._forward(self.model, prompt.to(self.device), None, 0)
            with OperationCount() as operations:
                cache = self._forward(self.model, new[:, :1].to(self.device), cache, prompt.shape[1])
            return cache, operations.total

    def _cache(self, batch: int, length: int) -> Any:
        """An empty cache: a growing one, or where the step is compiled one of fixed size."""
        from transformers import StaticCache

        if not self._compiled:
            return None
        if (batch, length) not in self._static:
            self._static.clear()
            self._static[batch, length] = StaticCache(config=self.model.config, max_cache_len=length)
        self._static[batch, length].reset()
        return self._static[batch, length]

    def _forward(self, model: Any, tokens: torch.Tensor, cache: Any, start: int) -> Any:
        more = {}
        if self._compiled:  # a graph must not ask the cache how full it is
            more["position_ids"] = torch.arange(start, start + tokens.shape[1], device=self.device)[None]
        out = model(input_ids=tokens, **{self._cache_name: cache}, use_cache=True, logits_to_keep=1, **more)
        return out.past_key_values


@contextmanager
def short_memory(name: str, device: Any, batch: int, tokens: int) -> Iterator[None]:
    """Turn the many ways to run out of memory into one error that names the batch and its size."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error).lower()
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not (
            "out of memory" in words or "can't allocate memory" in words or "not enough memory" in words
        ):
            raise
        raise QectomyError(
            f"{name}: out of memory on {device} at batch {batch} of {tokens} tokens each; give a smaller --batch, "
            "fewer --prompt-tokens, or --dtype bfloat16"
        ) from error


def random_tokens(vocab_size: int, batch: int, prompt: int, new: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random ids (B, P) and (B, N), the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (batch, prompt + new), generator=generator)
    return ids[:, :prompt], ids[:, prompt:]
