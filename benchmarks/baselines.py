"""Measure what a user would pick instead of a query map: as many parameters removed, the same protocol.

    SVD            W_Q of every layer by its truncated singular value decomposition
    weighted SVD   the rank-R W' that minimises E|x̂ W_Q - x̂ W'|² on the calibration text
    drop k layers  without the k decoder layers that turn the hidden states least: block influence, 1 - cos of
                   a layer's input and output on the calibration text (ShortGPT, arXiv 2403.03853)

Rank and k are chosen so that at least as many parameters go as with `--match` on all layers. The stock model
is edited in memory and nothing is trained. Folders that `qectomy convert` made are measured beside it.

    python benchmarks/baselines.py --calibration fitted.txt --evaluation heldout.txt --reduced out/key-shared
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from setting import add_setting, make_setting_windows, print_table
from torch import nn

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.checkpoint.sizes import totals
from qectomy.errors import QectomyError
from qectomy.eval.loading import load_model
from qectomy.eval.metrics import summarize
from qectomy.eval.protocol import ScoringWindows
from qectomy.eval.score_windows import score_model
from qectomy.models.family import Family
from qectomy.models.query_maps import parse_recipe

WINDOWS_A_BATCH = 4


@dataclass(frozen=True)
class LayerStatistics:
    """What one stock layer does on the calibration text. D is d_model."""

    second_moment: torch.Tensor  # (D, D) float64, E[x̂ᵀx̂] of what W_Q reads
    influence: float  # 1 - mean cosine between the layer's input and its output


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method's result."""

    method: str
    removed: int
    perplexity: float
    ratio: float
    kl: float | None
    top1_agreement: float | None


def layer_modules(model: Any, family: Family) -> list[nn.Module]:
    """Return the decoder layers, first to last."""
    return [model.get_submodule(family.prefix(i).rstrip(".")) for i in range(model.config.num_hidden_layers)]


@torch.no_grad()
def layer_statistics(model: Any, family: Family, tokens: torch.Tensor) -> list[LayerStatistics]:
    """Return one record a layer, gathered by forward hooks in one run over `tokens` (n, context)."""
    layers = layer_modules(model, family)
    d_model = model.config.hidden_size
    moments = [torch.zeros(d_model, d_model, dtype=torch.float64) for _ in layers]
    cosines = torch.zeros(len(layers), dtype=torch.float64)
    hooks = []

    def watch(index: int, layer: nn.Module) -> Iterator[Any]:
        def reads(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            moments[index] += (x.T @ x).double()

        def turns(_: nn.Module, arguments: tuple[torch.Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            cosines[index] += nn.functional.cosine_similarity(arguments[0], after, dim=-1).double().sum()

        yield layer.get_submodule(family.roles.query.module).register_forward_pre_hook(reads)
        yield layer.register_forward_hook(turns)

    for index, layer in enumerate(layers):
        hooks.extend(watch(index, layer))
    try:
        for batch in tokens.split(WINDOWS_A_BATCH):
            model.base_model(input_ids=batch, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    n = tokens.numel()
    pairs = zip(moments, cosines, strict=True)
    return [LayerStatistics(moment / n, 1 - float(cosine) / n) for moment, cosine in pairs]


def truncate(W: torch.Tensor, rank: int, second_moment: torch.Tensor | None = None) -> torch.Tensor:
    """Return argmin over rank-R W' of E|x̂ (W - W')ᵀ|², W (out, in) and E[x̂ᵀx̂] = C; C = I if none is given.

    U holds the first R left singular vectors of W C^½, which are eigenvectors of W C Wᵀ. The best W' is
    (W C^½)_R C^-½ = U Uᵀ W: nothing is inverted, so C may be singular.
    """
    W64 = W.double()
    C = torch.eye(W.shape[1], dtype=torch.float64) if second_moment is None else second_moment
    U = torch.linalg.eigh(W64 @ C @ W64.T).eigenvectors[:, -rank:]
    return (U @ (U.T @ W64)).to(W.dtype)


def truncate_queries_(model: Any, family: Family, rank: int, statistics: list[LayerStatistics] | None = None) -> None:
    """Cut W_Q of every layer to a rank, weighted by the calibration text where statistics are given."""
    for index, layer in enumerate(layer_modules(model, family)):
        projection = layer.get_submodule(family.roles.query.module)
        moment = None if statistics is None else statistics[index].second_moment
        projection.weight.data = truncate(projection.weight.data, rank, moment)


def drop_layers_(model: Any, family: Family, dropped: list[int]) -> None:
    """Take whole decoder layers out; what is left keeps its cache slots, so run it without a cache."""
    kept = [layer for index, layer in enumerate(layer_modules(model, family)) if index not in dropped]
    name, _, attribute = family.layer_prefix.removesuffix(".{}.").rpartition(".")
    setattr(model.get_submodule(name), attribute, nn.ModuleList(kept))
    model.config.num_hidden_layers = len(kept)


def least_influential(statistics: list[LayerStatistics], count: int) -> list[int]:
    return sorted(sorted(range(len(statistics)), key=lambda index: statistics[index].influence)[:count])


def plan_methods(
    source: Checkpoint, statistics: list[LayerStatistics], target: int
) -> Iterator[tuple[str, int, Callable[[Any], None]]]:
    """Yield (name, parameters removed, edit of a stock model in place), each removing at least `target`.

    Dropping one layer fewer than that takes is shown too, the nearest below.
    """
    family, dims = source.family, source.dims
    n_query = dims.n_heads * dims.d_head
    rank = (n_query * dims.d_model - -(-target // dims.n_layers)) // (n_query + dims.d_model)
    if rank > 0:
        removed = dims.n_layers * (n_query * dims.d_model - rank * (n_query + dims.d_model))
        yield f"SVD, rank {rank}", removed, lambda m: truncate_queries_(m, family, rank)
        yield f"weighted SVD, rank {rank}", removed, lambda m: truncate_queries_(m, family, rank, statistics)
    layer_parameters = sum(info.numel for _, info in source.layer_tensors(0))
    enough = -(-target // layer_parameters)
    for count in range(max(1, enough - 1), min(enough, dims.n_layers - 1) + 1):
        dropped = least_influential(statistics, count)
        name = f"drop {count} layer{'s' * (count > 1)} ({', '.join(map(str, dropped))})"
        yield name, count * layer_parameters, lambda m, dropped=dropped: drop_layers_(m, family, dropped)


def measure(name: str, removed: int, model: Any, original: Any, windows: ScoringWindows, before: float | None) -> Row:
    """Score a model on `windows`, with KL and top-1 agreement against the original's predictions."""
    print(f"measuring {name}", file=sys.stderr, flush=True)
    reference = None if model is original else original
    result = summarize(score_model(model, windows, reference=reference, label=name), windows)
    return Row(
        method=name,
        removed=removed,
        perplexity=result.perplexity,
        ratio=result.perplexity / (before or result.perplexity),
        kl=result.kl,
        top1_agreement=result.top1_agreement,
    )


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the original, the reduced folders and every baseline; return all that was found."""
    source = open_checkpoint(options.checkpoint)
    sizes = totals(source, tuple(parse_recipe(options.match, source.dims)))["parameters"]
    target = sizes["before"] - sizes["after"]
    fitted, held = make_setting_windows(options)
    original, _, dtype = load_model(options.checkpoint, "float32", "cpu")
    rows = [measure("original", 0, original, original, held, None)]
    before = rows[0].perplexity
    for folder in options.reduced:
        reduced = open_checkpoint(folder, reduced=True)
        name = f"qectomy {', '.join(dict.fromkeys(map(str, reduced.recipe)))}"
        model, _, _ = load_model(folder, "float32", "cpu")
        rows.append(measure(name, source.parameters - reduced.parameters, model, original, held, before))
    statistics = layer_statistics(original, source.family, fitted.tokens)
    for name, removed, edit_ in plan_methods(source, statistics, target):
        model = copy.deepcopy(original)
        edit_(model)
        rows.append(measure(name, removed, model, original, held, before))
    return {
        "match": {"query": options.match, "removed": target},
        "protocol": held.report.as_dict() | {"dtype": dtype},
        "calibration": fitted.sources,
        "influence": [one.influence for one in statistics],
        "methods": [asdict(row) for row in rows],
    }


def show(result: dict[str, Any]) -> None:
    """Print the table of methods."""
    header = ("method", "parameters removed", "perplexity", "ratio", "KL (nats)", "top-1")
    rows = []
    for row in result["methods"]:
        kl = "-" if row["kl"] is None else f"{row['kl']:.4f}"
        top1 = "-" if row["top1_agreement"] is None else f"{row['top1_agreement']:.1%}"
        ratio = f"{row['ratio']:.4f}"
        rows.append((row["method"], f"{row['removed']:,}", f"{row['perplexity']:.3f}", ratio, kl, top1))
    protocol = result["protocol"]
    print(f"{protocol['tokens']:,} tokens of {protocol['text']} in windows of {protocol['context']}")
    print(f"{result['match']['query']} on all layers removes {result['match']['removed']:,} parameters\n")
    print_table(header, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_setting(parser)
    parser.add_argument("--match", default="key-shared", metavar="MAP", help="whose size; default: key-shared")
    parser.add_argument("--reduced", nargs="*", default=[], metavar="DIR", help="measured beside")
    options = parser.parse_args()
    try:
        result = compare(options)
    except QectomyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
