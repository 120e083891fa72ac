"""The setting of a measurement: its arguments, the token windows they stand for, and tables of what came out.

Importing this loads no torch: the measuring process stays small (see `run_measured` in reference.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qectomy.eval.protocol import ScoringWindows
    from qectomy.text.windows import Windows

CHECKPOINT = ".cache/smollm2-135m-instruct"  # where fetch_smollm2.py puts it
TOKENS = 32_768
CONTEXT = 512


def add_setting(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that every benchmark of the reference setting takes."""
    parser.add_argument("--checkpoint", default=CHECKPOINT, help=f"original folder; default: {CHECKPOINT}")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="text that is fitted on")
    parser.add_argument("--evaluation", required=True, metavar="FILE", help="text that is measured on")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of calibration; default: {TOKENS}")
    parser.add_argument("--eval-tokens", type=int, default=TOKENS, help=f"of evaluation; default: {TOKENS}")
    parser.add_argument("--context", type=int, default=CONTEXT, help=f"tokens a window; default: {CONTEXT}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured")


def setting_arguments(options: argparse.Namespace) -> list[str]:
    """Return the command-line arguments that give another benchmark the same setting."""
    names = ("checkpoint", "calibration", "evaluation", "tokens", "eval_tokens", "context")
    return [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]


def make_setting_windows(options: argparse.Namespace) -> tuple[Windows, ScoringWindows]:
    """Return the calibration and the evaluation windows that `qectomy convert` makes in this setting."""
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.eval.protocol import Protocol, scoring_windows
    from qectomy.text.text import load_tokenizer, read_source
    from qectomy.text.windows import make_windows

    source = open_checkpoint(options.checkpoint)
    tokenizer, vocab_size = load_tokenizer(source.folder), source.dims.vocab_size
    calibration, evaluation = read_source(options.calibration), read_source(options.evaluation)
    protocol = Protocol(context=options.context, tokens=options.eval_tokens)
    held = scoring_windows(tokenizer, evaluation, protocol, vocab_size)
    fitted = make_windows(
        tokenizer,
        [calibration],
        context=options.context,
        tokens=options.tokens,
        vocab_size=vocab_size,
        skip={evaluation.sha256: options.eval_tokens},
    )
    return fitted, held


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table, columns aligned, every cell but a row's first to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    for row in (cells[0], ruler, *cells[1:]):
        first, *rest = zip(row, widths, strict=True)
        print("|", " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]), "|")
    print(flush=True)
