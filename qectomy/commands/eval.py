"""`qectomy eval`: its options, and nothing else."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qectomy.commands.convert import Device
from qectomy.commands.terminal import Field, Json, check_texts, command_line, note_old_code, print_json, progress_bar


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
    check_texts([text], field, 1 if protocol else context or 2)
    from qectomy.conversion.fitted import check_device
    from qectomy.eval.evaluate import Measure, evaluate_all, settle
    from qectomy.report.record import made
    from qectomy.report.saved import check_savable, save_result

    check_device(device)
    tasks = [task.strip() for task in lm_eval.split(",") if task.strip()] if lm_eval else []
    if not tasks and (lm_eval_path or lm_eval_limit):
        raise typer.BadParameter("names no task; add --lm-eval TASK,…", param_hint="--lm-eval-path")
    if text is None and protocol is None and not tasks:
        raise typer.BadParameter("nothing to measure: give --text FILE, a --protocol that has one, or --lm-eval TASK")
    if save:
        check_savable(save, "evaluation")
    alone = {"--context": context, "--stride": stride, "--tokens": tokens, "--reference": reference}
    if text is None and protocol is None and (useless := [name for name, given in alone.items() if given is not None]):
        raise typer.BadParameter("concerns a text, and none is given; add --text", param_hint=useless[0])
    if streamed and tasks:
        raise typer.BadParameter("the harness loads models whole; run --lm-eval without it", param_hint="--streamed")
    note_old_code(checkpoints)
    loaded = None
    if tasks:
        from qectomy.eval.harness_tasks import check_tasks

        loaded = check_tasks(tasks, lm_eval_path)
    result = {**made(command_line()), "kind": "evaluation"}
    if text is not None or protocol is not None:
        models = [*checkpoints, *([reference] if reference else [])]
        measure = Measure(
            protocol=settle(protocol, context, stride, tokens, models),
            dtype=dtype,
            device=device,
            reference=reference,
            streamed=streamed,
        )
        with progress_bar("evaluating") as progress:
            report = lambda name: lambda done, total, _: progress(done, total, name)  # noqa: E731
            result["results"] = evaluate_all(checkpoints, text, measure, report, field)
    if loaded is not None:
        if save and "results" in result:
            save_result(result, save)  # the harness may take hours more, and fail
        from qectomy.eval.harness import HarnessSettings, run_harness

        settings = HarnessSettings(limit=lm_eval_limit, dtype=dtype, device=device)
        with progress_bar("lm-eval") as progress:
            result["lm_eval"] = run_harness(checkpoints, loaded, settings, progress)
    if save:
        save_result(result, save)
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
