"""The command line: parse, call one function, print. Heavy imports live inside the functions."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, NoReturn

import typer

from qectomy import __version__
from qectomy.commands.bench import bench
from qectomy.commands.convert import convert
from qectomy.commands.eval import evaluate
from qectomy.commands.heal import heal
from qectomy.commands.inspect import inspect
from qectomy.commands.renew import renew
from qectomy.commands.report import report
from qectomy.commands.rewrites import fold_norms, import_nanogpt, materialize
from qectomy.commands.terminal import command_to_go_on, resumed
from qectomy.commands.verify import verify
from qectomy.distributed.launch import launch
from qectomy.errors import STOPPED_SAFELY, QectomyError, clean
from qectomy.versions import check_transformers

app = typer.Typer(
    name="qectomy",
    help="Remove the query projection W_Q from GPT-2, Llama, Mistral and Qwen 2 checkpoints, and say what it cost.",
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


EXAMPLES = {
    inspect: "inspect ./smollm2-135m-instruct",
    evaluate: "eval ./original ./reduced --text heldout.txt --reference ./original",
    verify: "verify ./exact --against ./original --text heldout.txt",
    convert: "convert ./smollm2-135m-instruct --out ./reduced --query key-shared --text calibration.txt "
    "--eval-text heldout.txt",
    heal: "heal ./reduced --teacher ./original --out ./healed --text mine.txt --minutes 10",
    bench: "bench ./original ./reduced --save ./reduced/bench.json",
    report: "report ./reduced",
    renew: "renew ./reduced",
    materialize: "materialize ./reduced --out ./stock",
    fold_norms: "fold-norms ./original --out ./folded --only gain",
    import_nanogpt: "import-nanogpt ckpt.pt --out ./gpt2 --tokenizer ./gpt2-tokenizer",
}
for command, example in EXAMPLES.items():
    app.command(example.split()[0], epilog=f"Example: `qectomy {example}`")(command)

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
