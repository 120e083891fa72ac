"""`qectomy eval`: its options, and nothing else."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.commands.convert import Device
from qectomy.commands.terminal import Field, Json, command_line, note_old_code, print_json, usage_errors


def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Folders or hub ids; the original first.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text to measure on: a file (UTF-8, JSON, .parquet) or a dataset's name."),
    ] = None,
    field: Field = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="A published protocol by name: wikitext2-2048, wikitext2-1024 (as GPTQ, SliceGPT), lm-eval-wikitext, "
            "or rolling, the harness's windows on --text. --text stands in for the dataset."
        ),
    ] = None,
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
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="TASK,…", help="Also run these tasks of lm-evaluation-harness on each."),
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option("--lm-eval-path", help="Folder of your own lm-eval tasks, as YAML; needs no network.")
    ] = None,
    lm_eval_limit: Annotated[
        int | None, typer.Option("--lm-eval-limit", min=1, help="Run only the first documents of each task.")
    ] = None,
    streamed: Annotated[
        bool, typer.Option("--streamed", help="Hold one layer of one model at a time: for models larger than memory.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="Type to compute in: float32, bfloat16, float16. Default: the checkpoint's."),
    ] = None,
    device: Device = "cpu",
    save: Annotated[
        Path | None,
        typer.Option(help="Also write the result to this JSON file; REDUCED/evaluation.json is shown by its report."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity, bits per byte and the cost of a reduction, all by one recorded protocol."""
    from qectomy.api.evaluate import evaluate as run

    note_old_code(checkpoints)
    tasks = [task.strip() for task in lm_eval.split(",") if task.strip()] if lm_eval else []
    with usage_errors():
        result = run(
            checkpoints,
            text=text,
            field=field,
            protocol=protocol,
            context=context,
            stride=stride,
            tokens=tokens,
            reference=reference,
            lm_eval=tasks,
            lm_eval_path=lm_eval_path,
            lm_eval_limit=lm_eval_limit,
            streamed=streamed,
            dtype=dtype,
            device=device,
            save=save,
            progress=True,
            command=command_line(),
        )
    if as_json:
        print_json(result)
    else:
        show(result)


def show(result: dict[str, Any]) -> None:
    """Print what was measured."""
    from qectomy.report.evaluation_table import show_evaluations
    from qectomy.report.harness_table import show_harness

    if "results" in result:
        show_evaluations(result["results"])
    if "lm_eval" in result:
        show_harness(result["lm_eval"])
