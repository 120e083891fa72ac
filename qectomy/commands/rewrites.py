"""The commands that write a folder anew in another form and measure nothing; `cli.py` registers them."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.api.arguments import check_out, go_on
from qectomy.commands.terminal import (
    Clean,
    Json,
    Resume,
    ResumeOnly,
    one_process,
    print_json,
    usage_errors,
)
from qectomy.progress import progress_bar


def materialize(
    reduced: Annotated[str, typer.Argument(help="Folder of a reduced checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    resume: Resume = False,
    resume_only: ResumeOnly = False,
    clean: Clean = False,
    as_json: Json = False,
) -> None:
    """Write W_Q back: the stock model with the reduced one's logits, for engines that know nothing of Qectomy."""
    from qectomy.api.materialize import materialize as run

    one_process()
    with usage_errors():
        result = run(reduced, out, resume=resume, resume_only=resume_only, clean=clean, progress=True)
    if not _told(result, as_json):
        typer.echo(f"wrote {result['out']}: {result['parameters']['after']:,} parameters; {result['note']}")
        for dropped in result["warnings"]:
            typer.echo(
                f"warning: {dropped['engine']} {dropped['does']} (config.json: {dropped['field']} {dropped['value']}); "
                f"measured: {dropped['measured']}"
            )


def import_nanogpt(
    checkpoint: Annotated[Path, typer.Argument(help="A nanoGPT checkpoint, as in ckpt.pt.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub id whose tokenizer files go along: a nanoGPT checkpoint holds none."),
    ] = None,
    resume: Resume = False,
    resume_only: ResumeOnly = False,
    clean: Clean = False,
    as_json: Json = False,
) -> None:
    """Read a nanoGPT checkpoint, one of the paper's repository too, into a folder that transformers loads."""
    from qectomy.checkpoint.checkpoint import locate
    from qectomy.checkpoint.config_files import TOKENIZER_FILES
    from qectomy.surgery.nanogpt import import_nanogpt as run
    from qectomy.text.text import load_tokenizer

    one_process()
    with usage_errors():
        check_out(out, go_on(resume, resume_only), clean)
    folder = locate(tokenizer, TOKENIZER_FILES) if tokenizer else None
    if folder is not None:
        load_tokenizer(folder)  # one that does not load is refused before anything is written
    result = run(checkpoint, out, folder, resume=go_on(resume, resume_only), clean=clean)
    if not _told(result, as_json):
        typer.echo(
            f"wrote {result['out']}: {result['model_type']}, {result['parameters']:,} parameters, from queries of mode "
            f"{result['query_mode']!r}, softmax scale {result['softmax_scale']:.6g}"
        )
        if not result["tokenizer"]:
            typer.echo("it has no tokenizer: give --tokenizer FOLDER, or copy tokenizer files into it")


def fold_norms(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of an original checkpoint.")],
    out: Annotated[Path, typer.Option(help="Folder to write; it must not exist.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="gain, shift or mean; may be repeated. Default: all that the family's norms have."),
    ] = None,
    resume: Resume = False,
    resume_only: ResumeOnly = False,
    clean: Clean = False,
    as_json: Json = False,
) -> None:
    """Fold the norms' gains, shifts and means into the matrices around them: a stock model with the same logits."""
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.surgery.norm_fusion import fold_norms as run

    one_process()
    with usage_errors():
        check_out(out, go_on(resume, resume_only), clean)
    source = open_checkpoint(checkpoint)
    with progress_bar("folding norms") as progress:
        result = run(source, out, only, progress, resume=go_on(resume, resume_only), clean=clean)
    if not _told(result, as_json):
        left = f"; left as they are: {', '.join(result['left'])}" if result["left"] else ""
        typer.echo(f"wrote {result['out']}: folded {', '.join(result['folded']) or 'nothing'}{left}")


def _told(result: dict[str, Any], as_json: bool) -> bool:
    """Print a report as JSON, or that it is lost; return whether that was all there is to say."""
    if as_json:
        print_json(result)
    elif "lost" in result:
        typer.echo(f"{result['out']}: {result['lost']}")
    return as_json or "lost" in result
