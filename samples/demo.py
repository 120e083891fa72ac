"""Convert a checkpoint with several query maps and print what each cost.

    python samples/demo.py samples/gpt2 --out .cache/demo \\
        --text samples/kjv_train.txt --eval-text samples/kjv_heldout.txt

Each map's folder under --out is a whole checkpoint, with its report in qectomy.json and a model card in README.md.
"""

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from qectomy.calibrate.convert import convert
from qectomy.calibrate.settings import ConvertSettings, default_context
from qectomy.errors import QectomyError
from qectomy.surgery.checkpoint import open_checkpoint
from qectomy.surgery.output import check_absent
from qectomy.surgery.query_maps import parse_recipe


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
    options = parser.parse_args()
    try:
        run(options)
    except QectomyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(options: argparse.Namespace) -> None:
    """Convert with each map in turn; print the table."""
    source = open_checkpoint(options.checkpoint)
    check_absent(options.out)
    recipes = [(name, tuple(parse_recipe(name, source.dims))) for name in options.query]
    table = Table("query map", "parameters", "W_Q removed", "perplexity", "ratio", "seconds")
    for name, recipe in recipes:
        out = options.out / name.replace(":", "-")
        settings = ConvertSettings(
            texts=(options.text,),
            tokens=options.tokens,
            context=options.context or default_context(source),
            eval_text=options.eval_text or None,
            eval_tokens=options.eval_tokens,
            command=shlex.join(["python", *sys.argv]),
        )
        report = convert(source, out, recipe, settings, progress(name))
        perplexity, queries = report["perplexity"], report["query_parameters"]
        sizes = report["parameters"]
        if not table.rows:
            table.add_row("(original)", f"{sizes['before']:,}", "", f"{perplexity['before']:.3f}", "1", "")
        table.add_row(
            name,
            f"{sizes['after']:,}",
            f"{1 - queries['after'] / queries['before']:.1%}",
            f"{perplexity['after']:.3f}",
            f"{perplexity['ratio']:.3f}",
            f"{report['seconds']['total']:.0f}",
        )
    protocol = report["perplexity"]["protocol"]
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{source.family.model_type}, {source.dims.n_layers} layers; perplexity on {protocol['scored_tokens']:,} "
        f"tokens of {protocol['text']},\nwhich is not fitted on, in windows of {protocol['context']}.",
        f"Each reduced checkpoint, its report (qectomy.json) and its model card (README.md):\n{options.out}/MAP",
        sep="\n",
        markup=False,
        soft_wrap=True,
    )


def progress(name: str):  # type: ignore[no-untyped-def]
    """Return what prints a line a layer on stderr."""
    return lambda done, total, note: print(f"{name} {done}/{total} {note}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
