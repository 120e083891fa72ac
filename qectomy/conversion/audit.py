"""Audit every layer's W_Q: `surgery/audit.py`'s numbers, the rank on states from a text where there is one.

The text goes through the original model once, in float32, one layer in memory at a time; its hidden states lie in a
scratch file. Dimensions: n windows, T positions, D d_model.
"""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qectomy.calibrate.hidden_states import WindowFile, batches, scratch_file
from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.finite import all_finite
from qectomy.conversion.at_once import TOKENS_A_BATCH
from qectomy.conversion.layerwise import BYTES_A_READ
from qectomy.conversion.settings import check_context
from qectomy.errors import NonFiniteError, TextError, UnsupportedArchitecture
from qectomy.models.linear_views import read_view
from qectomy.progress import Progress
from qectomy.surgery.audit import condition_number, distance_from_orthogonal, leading_rank
from qectomy.text.documents import Reading
from qectomy.text.text import load_tokenizer, read_source
from qectomy.text.windows import Windows, make_windows

Moments = Generator[torch.Tensor, None, None]
WHITE = "white states"


def audit_layers(
    source: Checkpoint,
    texts: Sequence[str],
    *,
    tokens: int,
    context: int,
    field: str | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Return one record a layer: condition of W_Q, its distance from orthogonal, and its rank at 99 % of the energy.

    The rank is under E[x̂ᵀx̂] of the texts, or of white states where there are none. A number that does not exist is
    None beside the reason. Raises TextError for a text or `tokens` too short for one window, NonFiniteError for
    weights or states that are not finite.
    """
    if texts:
        windows = _windows(source, texts, tokens, context, field)
        names = ", ".join(text["file"] for text in windows.sources)
        data, moments = f"{names}, {windows.tokens.numel():,} tokens", text_moments(source, windows.tokens)
    else:
        data, moments = WHITE, white_moments(source)
    records = []
    with closing(moments):
        for layer, C in enumerate(moments):
            records.append({**_numbers(source, layer, C), "rank_99_data": data, "d_model": source.dims.d_model})
            if progress:
                progress(layer + 1, source.dims.n_layers, "")
    return records


def white_moments(source: Checkpoint) -> Moments:
    """Yield diag(gamma²) (D, D) of each layer, float64: E[x̂ᵀx̂] if the norm gave white states to its gain."""
    for layer in range(source.dims.n_layers):
        gamma = _gain(source, layer)
        gamma = torch.ones(source.dims.d_model, dtype=torch.float64) if gamma is None else gamma
        yield gamma.square().diag()


def text_moments(source: Checkpoint, tokens: torch.Tensor) -> Moments:
    """Yield E[x̂ᵀx̂] (D, D) of each layer of the original model over windows of tokens (n, T); summed in float64."""
    (n, context), dims = tokens.shape, source.dims
    runner = LayerRunner(source, source.recipe, context, "cpu")
    size = max(1, TOKENS_A_BATCH // context)
    with TemporaryDirectory() as folder, scratch_file(Path(folder) / "states", n, context, dims.d_model) as states:
        _embed(source, tokens, states, size)
        for layer in range(dims.n_layers):
            module = runner.build(layer, source.read_layer(layer, torch.float32))
            total = torch.zeros(dims.d_model, dims.d_model, dtype=torch.float64)
            for start, stop in batches(0, n, size):
                x = states[start:stop]
                read = runner.read(module, x).flatten(0, 1).double()
                total += read.T @ read
                if layer + 1 < dims.n_layers:
                    states[start:stop] = _finite(runner.forward(module, x), layer, start, stop)
            yield total / tokens.numel()


def _windows(source: Checkpoint, texts: Sequence[str], tokens: int, context: int, field: str | None) -> Windows:
    """Cut the texts into windows. Raises TextError where they, or `tokens`, do not fill one."""
    if source.reduced:
        raise UnsupportedArchitecture(f"{source.folder} is no stock model: audit it without a text")
    check_context(source, context)
    if tokens < context:
        raise TextError(f"--tokens {tokens} is fewer than one window of {context}; give more, or a smaller --context")
    tokenizer, vocab_size = load_tokenizer(source.folder), source.dims.vocab_size
    sources = [read_source(name, Reading(field=field, tokenizer=lambda: tokenizer)) for name in texts]
    return make_windows(tokenizer, sources, context=context, tokens=tokens, vocab_size=vocab_size)


def _embed(source: Checkpoint, tokens: torch.Tensor, states: WindowFile, size: int) -> None:
    """Write what enters the first layer: embedding rows of the tokens that occur, and of positions if learned."""
    name, positions = source.family.embedding, source.family.positions
    rows, *width = source.tensors[name].shape
    wanted, where = tokens.unique(return_inverse=True)
    table = torch.empty(len(wanted), *width)
    for start, stop in batches(0, rows, max(1, BYTES_A_READ // (4 * math.prod(width)))):
        first, last = torch.searchsorted(wanted, torch.tensor([start, stop])).tolist()
        if first < last:
            table[first:last] = source.read_rows(name, start, stop, torch.float32)[wanted[first:last] - start]
    added = 0.0 if positions is None else source.read_rows(positions, 0, tokens.shape[1], torch.float32)
    for start, stop in batches(0, len(tokens), size):
        states[start:stop] = table[where[start:stop]] + added


def _finite(after: torch.Tensor, layer: int, start: int, stop: int) -> torch.Tensor:
    if not all_finite(after):
        raise NonFiniteError(f"the original model's layer {layer} gives NaN or Inf on windows {start} to {stop - 1}")
    return after


def _numbers(source: Checkpoint, layer: int, C: torch.Tensor) -> dict[str, Any]:
    """Return the numbers of one layer, fit for JSON, which knows no infinity."""
    family, view = source.family, source.family.roles.query
    W_Q, _ = read_view(_read(source, layer, view.module), view)
    cond = condition_number(W_Q)
    singular = math.isinf(cond)
    distance, why = distance_from_orthogonal(
        W_Q, _gain(source, layer), source.dims, centred=family.norm_name == "LayerNorm"
    )
    return {
        "cond": None if singular else cond,
        "cond_why_not": "W_Q is singular: its condition number is infinite" if singular else None,
        "distance_from_orthogonal": distance,
        "distance_why_not": why,
        "rank_99": leading_rank(W_Q, C),
    }


def _gain(source: Checkpoint, layer: int) -> torch.Tensor | None:
    """Return gamma (D,) of the norm before the attention, float64; None if it has no gain."""
    norm = source.family.roles.attention_norm
    return _read(source, layer, norm).get(f"{norm}.weight")


def _read(source: Checkpoint, layer: int, module: str) -> dict[str, torch.Tensor]:
    """Return a module's tensors in float64, by name inside the layer."""
    names = [name for name, _ in source.layer_tensors(layer) if name.startswith(f"{module}.")]
    return {name: source.read(source.prefix(layer) + name, torch.float64) for name in names}
