"""`qectomy.evaluate`: checkpoints into numbers, by one recorded protocol."""

from typing import TYPE_CHECKING, Annotated

from qectomy.api.arguments import begin, check_texts, name_or_none, names, path_or_none
from qectomy.api.options import Argument, Device, Field, Name, Names, Option
from qectomy.errors import UsageError
from qectomy.progress import Progress, stage

if TYPE_CHECKING:
    from qectomy.record.evaluation import Evaluation


def evaluate(
    checkpoints: Annotated[Names, Argument("Folders or hub ids; the original first.")],
    *,
    text: Annotated[
        Name | None, Option("Text to measure on: a file (UTF-8, JSON, .parquet) or a dataset's name.")
    ] = None,
    field: Field = None,
    protocol: Annotated[
        str | None,
        Option(
            "A published protocol by name: wikitext2-2048, wikitext2-1024 (as GPTQ, SliceGPT), lm-eval-wikitext, "
            "or rolling, the harness's windows on --text. --text stands in for the dataset."
        ),
    ] = None,
    context: Annotated[
        int | None, Option("Tokens a window. Default: 512, or what every model given was made for.", min=2)
    ] = None,
    stride: Annotated[
        int | None, Option("Tokens between window starts; each scores its last STRIDE. Default: context.", min=1)
    ] = None,
    tokens: Annotated[int | None, Option("Read only the first tokens of the text.", min=1)] = None,
    reference: Annotated[
        Name | None, Option("Original checkpoint: also report mean KL to it and top-1 agreement.")
    ] = None,
    lm_eval: Annotated[
        Names | None,
        Option("Also run these tasks of lm-evaluation-harness on each. May be repeated.", metavar="TASK,…"),
    ] = None,
    lm_eval_path: Annotated[
        Name | None, Option("Folder of your own lm-eval tasks, as YAML; needs no network.", path=True)
    ] = None,
    lm_eval_limit: Annotated[int | None, Option("Run only the first documents of each task.", min=1)] = None,
    streamed: Annotated[bool, Option("Hold one layer of one model at a time: for models larger than memory.")] = False,
    dtype: Annotated[
        str | None, Option("Type to compute in: float32, bfloat16, float16. Default: the checkpoint's.")
    ] = None,
    device: Device = "cpu",
    save: Annotated[
        Name | None,
        Option(
            "Also write the result to this JSON file; REDUCED/evaluation.json is shown by its report.",
            path=True,
        ),
    ] = None,
    progress: bool | Progress = False,
    command: str | None = None,
) -> "Evaluation":
    """Measure perplexity, bits per byte and the cost of a reduction; return what `qectomy eval --json` prints.

    `checkpoints`: one or several folders or hub ids, the original first. The options are those of `qectomy eval`;
    `lm_eval` is one task or several, with commas or as a list. `progress`: True for bars on stderr, or a function
    (done, total, note). `command`: what the result says made it; by default this call. Raises QectomyError.
    """
    command = begin(evaluate, locals())
    given, held, original = names(checkpoints), name_or_none(text), name_or_none(reference)
    check_texts([held], field, 1 if protocol else context or 2)
    from qectomy.conversion.fitted import check_device
    from qectomy.eval.evaluate import Measure, evaluate_all, settle
    from qectomy.record.base import made
    from qectomy.record.evaluation import Evaluation
    from qectomy.report.saved import check_savable, save_result

    if not given:
        raise UsageError("there is no checkpoint to measure; give one or several")
    check_device(device)
    tasks = [task.strip() for listed in names(lm_eval) for task in listed.split(",") if task.strip()]
    if not tasks and (lm_eval_path or lm_eval_limit):
        raise UsageError("names no task; add --lm-eval TASK,…", "--lm-eval-path")
    if held is None and protocol is None and not tasks:
        raise UsageError("nothing to measure: give --text FILE, a --protocol that has one, or --lm-eval TASK")
    where = path_or_none(save)
    if where:
        check_savable(where, "evaluation")
    alone = {"--context": context, "--stride": stride, "--tokens": tokens, "--reference": original}
    if held is None and protocol is None and (useless := [name for name, it in alone.items() if it is not None]):
        raise UsageError("concerns a text, and none is given; add --text", useless[0])
    if streamed and tasks:
        raise UsageError("the harness loads models whole; run --lm-eval without it", "--streamed")
    loaded = None
    if tasks:
        from qectomy.eval.harness_tasks import check_tasks

        loaded = check_tasks(tasks, path_or_none(lm_eval_path))
    result = Evaluation(**made(command))
    if held is not None or protocol is not None:
        measure = Measure(
            protocol=settle(protocol, context, stride, tokens, [*given, *([original] if original else [])]),
            dtype=dtype,
            device=device,
            reference=original,
            streamed=streamed,
        )
        with stage(progress, "evaluating") as report:
            named = (lambda name: lambda done, total, _: report(done, total, name)) if report else None
            result.results = evaluate_all(given, held, measure, named, field)
    if loaded is not None:
        if where and result.results:
            save_result(result, where)  # the harness may take hours more, and fail
        from qectomy.eval.harness import HarnessSettings, run_harness

        settings = HarnessSettings(limit=lm_eval_limit, dtype=dtype, device=device)
        with stage(progress, "lm-eval") as report:
            result.lm_eval = run_harness(given, loaded, settings, report)
    if where:
        save_result(result, where)
    return result
