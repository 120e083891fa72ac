"""The command line: parse, call one function, print. Heavy imports live inside the commands."""

import sys
from typing import Annotated

import typer

from qectomy import __version__
from qectomy.cli_bench import bench
from qectomy.cli_convert import CONTEXT_HELP, Device, convert
from qectomy.cli_heal import heal
from qectomy.cli_report import report
from qectomy.cli_rewrites import fold_norms, import_nanogpt, materialize
from qectomy.errors import QectomyError
from qectomy.terminal import Json, print_json, progress_bar

app = typer.Typer(
    name="qectomy",
    help="Remove the query projection W_Q from pretrained GPT-2 and Llama checkpoints, and say what it cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"qectomy {__version__}")
        raise typer.Exit


@app.command(epilog="Example: `qectomy inspect ./smollm2-135m-instruct`")
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an original checkpoint.")],
    tokens: Annotated[int, typer.Option(min=1, help="Calibration tokens to plan for, or to audit on.")] = 32_768,
    eval_tokens: Annotated[int, typer.Option(min=0, help="Evaluation tokens to plan for.")] = 32_768,
    context: Annotated[int | None, typer.Option(min=16, help=CONTEXT_HELP)] = None,
    audit: Annotated[
        bool, typer.Option("--audit", help="Read the weights too: how far each layer's W_Q is from going exactly.")
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(help="With --audit: text to take the ranks on, as for convert. Default: white states."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what each query map would remove, from the config and the file headers alone unless audited."""
    from qectomy.calibrate.settings import default_context
    from qectomy.surgery.checkpoint import open_checkpoint
    from qectomy.surgery.plan import inspect as inspect_checkpoint

    if text and not audit:
        raise typer.BadParameter("only an audit reads a text; add --audit", param_hint="--text")
    source = open_checkpoint(checkpoint)
    context = context or default_context(source)
    result = inspect_checkpoint(source, tokens=tokens, eval_tokens=eval_tokens, context=context)
    if audit:
        from qectomy.calibrate.audit_pass import audit_layers
        from qectomy.surgery.fold_choice import choose_folds

        with progress_bar("auditing") as progress:
            records = audit_layers(source, text or (), tokens=tokens, context=context, progress=progress)
            verdicts = choose_folds(source).verdicts
        for layer, record in zip(result["layers"], records, strict=True):
            verdict = verdicts[source.dims.stored_layer(layer["index"])]
            layer |= {"how": verdict.how, "reason": verdict.reason, "audit": record}
    if as_json:
        print_json(result)
    else:
        from qectomy.eval.tables import show_inspection

        show_inspection(result)


@app.command("eval", epilog="Example: `qectomy eval ./original ./reduced --text heldout.txt --reference ./original`")
def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Folders or hub ids, original or reduced.")],
    text: Annotated[str, typer.Option(help="Text to measure on: a UTF-8 file, a .jsonl file or a dataset's name.")],
    context: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens a window. Default: 512, or what every model given was made for."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens between window starts; each scores its last STRIDE. Default: context."),
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Read only the first tokens of the text.")] = None,
    reference: Annotated[
        str | None, typer.Option(help="Original checkpoint: also report mean KL to it and top-1 agreement.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type to compute in: float32, bfloat16, float16. Default: the checkpoint's."),
    ] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure token perplexity and bits per byte of checkpoints, all by one recorded protocol."""
    from qectomy.calibrate.convert import check_device
    from qectomy.calibrate.text import read_source
    from qectomy.eval.perplexity import Protocol, common_context
    from qectomy.eval.perplexity import evaluate as run

    check_device(device)
    source = read_source(text)
    protocol = Protocol(
        context=context or common_context([*checkpoints, *([reference] if reference else [])]),
        stride=stride,
        tokens=tokens,
    )
    results = []
    for checkpoint in checkpoints:
        with progress_bar(f"evaluating {checkpoint}") as progress:
            results.append(
                run(
                    checkpoint,
                    source,
                    protocol,
                    dtype=dtype,
                    device=device,
                    reference=reference,
                    progress=lambda done, total: progress(done, total, ""),
                )
            )
    if as_json:
        print_json(results)
    else:
        from qectomy.eval.tables import show_evaluations

        show_evaluations(results)


@app.command(epilog="Example: `qectomy verify ./exact --against ./original --text heldout.txt`")
def verify(
    reduced: Annotated[str, typer.Argument(help="Folder of a reduced checkpoint.")],
    against: Annotated[str, typer.Option(help="Folder or hub id of the original.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text to measure on: a file, .jsonl file or dataset's name. Default: 256 random tokens."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to measure on.")] = 2048,
    context: Annotated[int | None, typer.Option(min=2, help=CONTEXT_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Certify that a reduced checkpoint computes what its original does; exit code 1 if it is not exact."""
    from qectomy.calibrate.settings import default_context
    from qectomy.calibrate.text import load_tokenizer, read_source
    from qectomy.eval.perplexity import Protocol, check_positions, scoring_windows
    from qectomy.eval.tables import show_certificate
    from qectomy.eval.verify import verify as run
    from qectomy.surgery.checkpoint import open_checkpoint
    from qectomy.surgery.config_files import load_config

    ours, theirs = open_checkpoint(reduced, reduced=True), open_checkpoint(against)
    held = None
    if text:
        protocol = Protocol(context=context or min(tokens, default_context(theirs)), tokens=tokens)
        check_positions(against, load_config(theirs.family, theirs.config, theirs.reduced), protocol.context)
        held = scoring_windows(load_tokenizer(theirs.folder), read_source(text), protocol, theirs.dims.vocab_size)
    with progress_bar("verifying") as progress:
        result = run(ours, theirs, held, progress)
    if as_json:
        print_json(result)
    else:
        show_certificate(result)
    if result["verdict"] != "exact":
        raise typer.Exit(1)


app.command(
    epilog="Example: `qectomy convert ./smollm2-135m-instruct --out ./reduced --query key-shared "
    "--text calibration.txt --eval-text heldout.txt`"
)(convert)
app.command(
    epilog="Example: `qectomy heal ./reduced --teacher ./original --out ./healed --text mine.txt --minutes 10`"
)(heal)
app.command(epilog="Example: `qectomy report ./reduced`")(report)
app.command(epilog="Example: `qectomy materialize ./reduced --out ./stock`")(materialize)
app.command("fold-norms", epilog="Example: `qectomy fold-norms ./original --out ./folded --only gain`")(fold_norms)
app.command(
    "import-nanogpt", epilog="Example: `qectomy import-nanogpt ckpt.pt --out ./gpt2 --tokenizer ./gpt2-tokenizer`"
)(import_nanogpt)


def main() -> None:
    """Run the command line: errors a user can mend become one line on stderr and exit code 1."""
    try:
        app()
    except QectomyError as error:
        typer.secho(f"error: {error}", err=True, fg=typer.colors.RED)
        sys.exit(1)
    except SystemExit as stop:
        if stop.code == 130:  # typer makes this of Ctrl-C, without a word
            typer.secho("error: interrupted; nothing was left behind", err=True, fg=typer.colors.RED)
            sys.exit(1)
        raise


if __name__ == "__main__":
    main()
