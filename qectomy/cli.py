"""The command line: parse, call one function, print. Heavy imports live inside the commands."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, NoReturn

import typer

from qectomy import __version__
from qectomy.commands.bench import bench
from qectomy.commands.convert import CONTEXT_HELP, NoProbe, convert
from qectomy.commands.eval import evaluate
from qectomy.commands.heal import heal
from qectomy.commands.renew import renew
from qectomy.commands.report import report
from qectomy.commands.rewrites import fold_norms, import_nanogpt, materialize
from qectomy.commands.terminal import Field, Json, command_to_go_on, print_json, resumed, usage_errors
from qectomy.distributed.launch import launch
from qectomy.errors import STOPPED_SAFELY, QectomyError, clean
from qectomy.versions import check_transformers

app = typer.Typer(
    name="qectomy",
    help="Remove the query projection W_Q from pretrained GPT-2, Llama and Mistral checkpoints, and say what it cost.",
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
    if "--help" not in sys.argv:
        check_transformers()


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
    field: Field = None,
    no_probe: NoProbe = False,
    as_json: Json = False,
) -> None:
    """Say what each query map would remove, from the config and the file headers alone unless audited."""
    from qectomy.api.inspect import inspect as run

    with usage_errors():
        result = run(
            checkpoint,
            tokens=tokens,
            eval_tokens=eval_tokens,
            context=context,
            audit=audit,
            text=text,
            field=field,
            no_probe=no_probe,
            progress=True,
        )
    if as_json:
        print_json(result)
    else:
        from qectomy.report.inspection_table import show_inspection

        show_inspection(result, checkpoint)


app.command("eval", epilog="Example: `qectomy eval ./original ./reduced --text heldout.txt --reference ./original`")(
    evaluate
)


@app.command(epilog="Example: `qectomy verify ./exact --against ./original --text heldout.txt`")
def verify(
    reduced: Annotated[str, typer.Argument(help="Folder of a reduced checkpoint.")],
    against: Annotated[str, typer.Option(help="Folder or hub id of the original.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text to measure on: a file or a dataset's name. Default: 256 random tokens."),
    ] = None,
    field: Field = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of the text to measure on.")] = 2048,
    context: Annotated[int | None, typer.Option(min=2, help=CONTEXT_HELP)] = None,
    as_json: Json = False,
) -> None:
    """Certify that a reduced checkpoint computes what its original does; exit code 1 if it is not exact."""
    from qectomy.api.verify import verify as run

    result = run(reduced, against, text=text, field=field, tokens=tokens, context=context, progress=True)
    if as_json:
        print_json(result)
    else:
        from qectomy.report.tables import show_certificate

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
app.command(epilog="Example: `qectomy bench ./original ./reduced --save ./reduced/bench.json`")(bench)
app.command(epilog="Example: `qectomy report ./reduced`")(report)
app.command(epilog="Example: `qectomy renew ./reduced`")(renew)
app.command(epilog="Example: `qectomy materialize ./reduced --out ./stock`")(materialize)
app.command("fold-norms", epilog="Example: `qectomy fold-norms ./original --out ./folded --only gain`")(fold_norms)
app.command(
    "import-nanogpt", epilog="Example: `qectomy import-nanogpt ckpt.pt --out ./gpt2 --tokenizer ./gpt2-tokenizer`"
)(import_nanogpt)


LONGEST = 4000  # characters of a message
INTERRUPTED = 130  # typer makes this of Ctrl-C, without a word; shells count so too


def complain(message: str) -> None:
    """Print an error on stderr, in red where colours are wanted; no file quoted in it gives orders to the terminal."""
    cut = message if len(message) <= LONGEST else f"{message[:LONGEST]} ... (cut)"
    typer.secho(f"error: {clean(cut)}", err=True, fg=None if os.environ.get("NO_COLOR") else typer.colors.RED)


def main() -> None:
    """Run the command line: errors a user can mend become one line on stderr and exit code 1, or STOPPED_SAFELY.

    A second line then says the command that goes on.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a thread that spins holds the core another one needs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what concerns a user is said by an error or a note
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries, which would fill a file
    try:
        with _signals_as_ctrl_c():
            app()
    except QectomyError as error:
        complain(str(error))
        if not error.resumable:
            sys.exit(1)
        _stopped_safely(error.go_on or command_to_go_on(), str(error))
    except SystemExit as stop:
        if stop.code != INTERRUPTED:
            raise
        if resumed():  # before it had entered the run's folder
            complain("interrupted; what there was to go on from is as it was")
            _stopped_safely(command_to_go_on())
        complain("interrupted; what was not finished is not kept")
        raise


def _stopped_safely(command: str, said: str = "") -> NoReturn:
    """Say how to go on, unless that was said, and end with the exit code that asks for it."""
    if command and command not in said:
        typer.echo(f"to go on: {clean(command)}", err=True)
    sys.exit(STOPPED_SAFELY)


def _signals_as_ctrl_c() -> AbstractContextManager[None]:
    """Let SIGTERM end a run that goes on with another as Ctrl-C does, also before it has entered that one's folder."""
    if not resumed() or launch().count > 1:
        return nullcontext()
    from qectomy.runs.output import interruptible

    return interruptible()


if __name__ == "__main__":
    main()
