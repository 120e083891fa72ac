"""The commands that write a folder anew in another form and measure nothing; `cli.py` registers them."""

from typing import Any

import typer

from qectomy.api.fold_norms import fold_norms as run_fold_norms
from qectomy.api.import_nanogpt import import_nanogpt as run_import_nanogpt
from qectomy.api.materialize import materialize as run_materialize
from qectomy.commands.terminal import one_process, print_json, takes_options_of, usage_errors


@takes_options_of(run_materialize)
def materialize(as_json: bool, **given: Any) -> None:
    """Write W_Q back: the stock model with the reduced one's logits, for engines that know nothing of Qectomy."""
    one_process()
    with usage_errors():
        result = run_materialize(**given, progress=True)
    if as_json:
        print_json(result)
    else:
        typer.echo(f"wrote {result['out']}: {result['parameters']['after']:,} parameters; {result['note']}")
        for dropped in result["warnings"]:
            typer.echo(
                f"warning: {dropped['engine']} {dropped['does']} (config.json: {dropped['field']} {dropped['value']}); "
                f"measured: {dropped['measured']}"
            )


@takes_options_of(run_import_nanogpt)
def import_nanogpt(as_json: bool, **given: Any) -> None:
    """Read a nanoGPT checkpoint, one of the paper's repository too, into a folder that transformers loads."""
    one_process()
    with usage_errors():
        result = run_import_nanogpt(**given)
    if as_json:
        print_json(result)
    else:
        typer.echo(
            f"wrote {result['out']}: {result['model_type']}, {result['parameters']:,} parameters, from queries of mode "
            f"{result['query_mode']!r}, softmax scale {result['softmax_scale']:.6g}"
        )
        if not result["tokenizer"]:
            typer.echo("it has no tokenizer: give --tokenizer FOLDER, or copy tokenizer files into it")


@takes_options_of(run_fold_norms)
def fold_norms(as_json: bool, **given: Any) -> None:
    """Fold the norms' gains, shifts and means into the matrices around them: a stock model with the same logits."""
    one_process()
    with usage_errors():
        result = run_fold_norms(**given, progress=True)
    if as_json:
        print_json(result)
    else:
        left = f"; left as they are: {', '.join(result['left'])}" if result["left"] else ""
        typer.echo(f"wrote {result['out']}: folded {', '.join(result['folded']) or 'nothing'}{left}")
