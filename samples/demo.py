"""Convert a checkpoint with several query maps and print what each cost.

    python samples/demo.py samples/gpt2 --out .cache/demo \\
        --text samples/kjv_train.txt --eval-text samples/kjv_heldout.txt

Each map's folder under --out is a whole checkpoint, with its report in qectomy.json and a model card in README.md.
"""

import argparse
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.conversion.exact import convert_exact
from qectomy.conversion.fitted import convert
from qectomy.conversion.layerwise import Progress
from qectomy.conversion.settings import ConvertSettings, default_context
from qectomy.errors import QectomyError
from qectomy.models.query_maps import parse_exact, parse_recipe
from qectomy.record.reduced import Exact, Fitted
from qectomy.report.query_share import query_share
from qectomy.runs.output import check_absent
from qectomy.text.text import read_source


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or hub id of a GPT-2, Llama or Mistral checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to make; one folder a map goes into it")
    parser.add_argument("--query", nargs="+", default=["key-shared", "identity"], metavar="MAP")
    parser.add_argument("--text", required=True, help="calibration text")
    parser.add_argument("--eval-text", help="text to measure on; default: the start of --text, which is not fitted on")
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--eval-tokens", type=int, default=16_384)
    parser.add_argument("--context", type=int)
    parser.add_argument("--replace", action="store_true", help="remove --out first, once everything else is in order")
    options = parser.parse_args()
    try:
        run(options)
    except (QectomyError, KeyboardInterrupt) as error:
        print(f"error: {error}" if str(error) else "error: interrupted", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Convert with each map in turn; print the table of those that were done, also when a later one fails."""
    source = open_checkpoint(options.checkpoint)
    kept = {name: parse_exact(name, source.dims) for name in options.query}
    recipes = {name: tuple(parse_recipe(name, source.dims)) for name in options.query if kept[name] is None}
    for text in filter(None, (options.text, options.eval_text)):
        read_source(text)
    if options.replace:
        shutil.rmtree(options.out, ignore_errors=True)
    check_absent(options.out)
    reports: dict[str, Fitted | Exact] = {}
    try:
        for name, whole in kept.items():
            settings = ConvertSettings(
                texts=(options.text,),
                tokens=options.tokens,
                context=options.context or default_context(source),
                eval_text=options.eval_text or None,
                eval_tokens=options.eval_tokens,
                command=shlex.join(["python", *sys.argv]),
            )
            out = options.out / name.replace(":", "-")
            if whole is None:
                fitted = convert(source, out, recipes[name], settings, progress(name))
                assert fitted is not None, "one process"
                reports[name] = fitted
            else:
                reports[name] = convert_exact(source, out, settings, whole, progress(name))
    finally:
        if reports:
            show(source, reports, options.out)


def show(source: Checkpoint, reports: dict[str, Fitted | Exact], out: Path) -> None:
    """Print the table, what was measured and where everything lies."""
    table = Table("query map", "parameters", "W_Q removed", "perplexity", "ratio", "seconds")
    first = next(iter(reports.values()))
    measured = first.perplexity
    assert measured is not None, "each is given a text"
    table.add_row("(original)", f"{first.parameters.before:,}", "", f"{measured.before:.3f}", "1", "")
    for name, report in reports.items():
        queries = query_share(report)
        table.add_row(
            name,
            f"{report.parameters.after:,}",
            f"{queries.removed:.1%}" if queries else "",
            f"{report.perplexity.after:.3f}" if report.perplexity else "",
            f"{report.perplexity.ratio:.3f}" if report.perplexity else "",
            f"{report.seconds['total']:.0f}",
        )
    protocol, console = measured.protocol, Console(highlight=False)
    console.print(table)
    console.print(
        f"{source.family.model_type}, {source.dims.n_layers} layers; perplexity on {protocol.scored_tokens:,} "
        f"tokens of {protocol.text},\nwhich is not fitted on, in windows of {protocol.context}.",
        f"Each reduced checkpoint, its report (qectomy.json) and its model card (README.md):\n{out}/MAP",
        sep="\n",
        markup=False,
        soft_wrap=True,
    )


def progress(name: str) -> Progress:
    """Return what prints a line a layer on stderr."""
    return lambda done, total, note: print(f"{name} {done}/{total} {note}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
