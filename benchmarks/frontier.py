"""Draw what each query map of a model removes against what it costs, by the chart of `qectomy report`.

    python benchmarks/frontier.py samples/llama --text samples/kjv_train.txt --eval-text samples/kjv_heldout.txt \\
        --tokens 8192 --eval-tokens 8192 --context 256 --svg docs/frontier.svg
"""

import argparse
import tempfile
from importlib.resources import files
from pathlib import Path

import qectomy
from qectomy.report.page.blocks import Chart
from qectomy.report.page.compare import compare_section, summary
from qectomy.report.page.reading import read_folders
from qectomy.report.page.table import show_summary

MAPS = ("key-shared", "low-rank:8", "select", "identity")


def alone(picture: str) -> str:
    """Return a picture of the page as a file of its own: with its namespace, and the page's light colours."""
    style = files("qectomy.report.page").joinpath("templates/page.css").read_text(encoding="utf-8")
    colours = style[style.index("--paper") : style.index("}", style.index("--paper"))]
    told = f"<style>svg {{ {colours} background: var(--paper); font-family: sans-serif }}</style>"
    head, rest = picture.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg">{told}{rest}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--eval-text", required=True)
    for name, number in (("--tokens", 32_768), ("--eval-tokens", 32_768), ("--context", 512)):
        parser.add_argument(name, type=int, default=number)
    parser.add_argument("--query", nargs="+", default=MAPS)
    parser.add_argument("--svg", type=Path, required=True, help="File to write.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / query.replace(":", "-") for query in options.query]
        for query, folder in zip(options.query, folders, strict=True):
            qectomy.convert(
                options.model,
                folder,
                query=query,
                text=options.text,
                eval_text=options.eval_text,
                tokens=options.tokens,
                eval_tokens=options.eval_tokens,
                context=options.context,
                progress=True,
            )
        found = read_folders(folders)
        picture = next(block.picture for block in compare_section(found, ()).blocks if isinstance(block, Chart))
        options.svg.write_text(alone(str(picture)), encoding="utf-8")
        show_summary({"out": str(options.svg), **summary(found, ())})


if __name__ == "__main__":
    main()
