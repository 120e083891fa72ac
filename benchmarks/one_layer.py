"""Fit single layers on the teacher's own stream and print the attention KL on fitted and on other text.

    python benchmarks/one_layer.py --checkpoint .cache/smollm2-135m-instruct --calibration foldoc.txt \\
        --validation other.txt --layers 1,12,24 --query key-shared --set steps=200 --set temperatures=1

The quickest way to try a change of the fit: no drift, no refit, no perplexity. `--set` overrides any field of
RefineSettings; a sequence is written 1,0.5. Text that results are reported on is not for choosing settings.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

import torch

from qectomy.calibrate.attention_kl import attention_kl
from qectomy.calibrate.hidden_states import Streams, WindowFile, batches
from qectomy.calibrate.layer_fit import fit_layer
from qectomy.calibrate.layer_runner import LayerRunner
from qectomy.calibrate.refine import RefineSettings
from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.models.query_maps import parse_recipe
from qectomy.surgery.stream_basis import StreamBasis, random_basis
from qectomy.text.text import load_tokenizer, read_source
from qectomy.text.windows import make_windows

BATCH = 2
KL_WINDOWS = 8


def main() -> None:
    args = arguments()
    source = open_checkpoint(args.checkpoint)
    tokenizer = load_tokenizer(source.folder)
    spans, windows = {}, []
    for name in (args.calibration, *args.validation):
        count = args.tokens if name == args.calibration else KL_WINDOWS * args.context
        made = make_windows(
            tokenizer, [read_source(name)], context=args.context, tokens=count, vocab_size=source.dims.vocab_size
        )
        first = sum(map(len, windows))
        spans[Path(name).name] = (first, first + min(KL_WINDOWS, len(made.tokens)))
        windows.append(made.tokens)
    recipe = tuple(parse_recipe(args.query, source.dims))
    runner = LayerRunner(source, recipe, args.context, "cpu")
    tokens = torch.cat(windows)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        shape = (len(tokens), args.context, source.dims.d_model)
        streams = Streams(Path(folder), shape, fitted=len(windows[0]), batch=BATCH)
        states = streams.student = streams.teacher
        states[:] = source.read(source.family.embedding, torch.float32)[tokens]
        basis = turn(source, states) if "identity" in args.query else None
        print("layer", *spans, "seconds", sep="\t")
        for layer in range(max(args.layers) + 1):
            tensors = source.read_layer(layer, torch.float32)
            tensors = tensors if basis is None else basis.layer(source.family, tensors)
            teacher = runner.build(layer, tensors)
            if layer in args.layers:
                begun = time.perf_counter()
                with torch.enable_grad():
                    fitted = fit_layer(
                        runner, layer, recipe[layer], tensors, tensors, teacher, streams, args.settings,
                        torch.Generator().manual_seed(0),
                    )  # fmt: skip
                seconds = time.perf_counter() - begun
                student = runner.build(layer, fitted, reduced=True)
                kls = [f"{mean_kl(runner, teacher, student, states, span):.4f}" for span in spans.values()]
                print(layer, *kls, f"{seconds:.1f}", sep="\t", flush=True)
            for start, stop in batches(0, len(tokens), BATCH):
                states[start:stop] = runner.forward(teacher, states[start:stop])


def turn(source: Checkpoint, states: WindowFile) -> StreamBasis:
    """Turn the embedded states to a random basis, as a conversion to `identity` does."""
    gain = source.read(f"{source.family.final_norm}.weight", torch.float64)
    basis = random_basis(gain, torch.ones_like(gain), source.dims.tied, torch.Generator().manual_seed(0))
    for start, stop in batches(0, states.shape[0], BATCH):
        states[start:stop] = basis.states(states[start:stop])
    return basis


def mean_kl(runner: LayerRunner, teacher, student, states: WindowFile, span: tuple[int, int]) -> float:
    """Mean attention KL over the windows of a span."""
    values = []
    for window in range(*span):
        x = states[window : window + 1]
        pair = [runner.queries_keys(module, runner.read(module, x)) for module in (teacher, student)]
        values.append(attention_kl(pair[0], pair[1], runner.causal()).mean())
    return float(torch.stack(values).mean())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=".cache/smollm2-135m-instruct")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--validation", action="append", default=[])
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")], default=[1, 12, 24])
    parser.add_argument("--query", default="key-shared")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override RefineSettings")
    args = parser.parse_args()
    kinds = {field.name: type(field.default) for field in dataclasses.fields(RefineSettings)} | {"steps": int}
    changes = {}
    for item in args.set:
        name, _, value = item.partition("=")
        if name not in kinds:
            parser.error(f"--set {name}: the fields are {', '.join(kinds)}")
        numbers = [float(part) for part in value.split(",")]
        changes[name] = tuple(numbers) if kinds[name] is tuple else kinds[name](numbers[0])
    args.settings = RefineSettings(**changes)
    return args


if __name__ == "__main__":
    main()
