"""`qectomy.evaluate`: checkpoints into numbers, by one recorded protocol."""

from pathlib import Path
from typing import Any

from qectomy.api.arguments import Name, Names, call_of, check_numbers, check_texts, name_or_none, names
from qectomy.errors import UsageError
from qectomy.progress import Progress, stage
from qectomy.versions import check_transformers


def evaluate(
    checkpoints: Names,
    *,
    text: Name | None = None,
    field: str | None = None,
    protocol: str | None = None,
    context: int | None = None,
    stride: int | None = None,
    tokens: int | None = None,
    reference: Name | None = None,
    lm_eval: Names | None = None,
    lm_eval_path: Name | None = None,
    lm_eval_limit: int | None = None,
    streamed: bool = False,
    dtype: str | None = None,
    device: str = "cpu",
    save: Name | None = None,
    progress: bool | Progress = False,
    command: str | None = None,
) -> dict[str, Any]:
    """Measure perplexity, bits per byte and the cost of a reduction; return what `qectomy eval --json` prints.

    `checkpoints`: one or several folders or hub ids, the original first. The options are those of `qectomy eval`;
    `lm_eval` is one task or several. `progress`: True for bars on stderr, or a function (done, total, note). `command`:
    what the result says made it; by default this call. Raises QectomyError.
    """
    command = command or call_of(evaluate, locals())
    check_transformers()
    check_numbers(1, stride=stride, tokens=tokens, lm_eval_limit=lm_eval_limit)
    check_numbers(2, context=context)
    given, held, original = names(checkpoints), name_or_none(text), name_or_none(reference)
    check_texts([held], field, 1 if protocol else context or 2)
    from qectomy.conversion.fitted import check_device
    from qectomy.eval.evaluate import Measure, evaluate_all, settle
    from qectomy.report.record import made
    from qectomy.report.saved import check_savable, save_result

    if not given:
        raise UsageError("there is no checkpoint to measure; give one or several")
    check_device(device)
    tasks = names(lm_eval)
    if not tasks and (lm_eval_path or lm_eval_limit):
        raise UsageError("names no task; add --lm-eval TASK,…", "--lm-eval-path")
    if held is None and protocol is None and not tasks:
        raise UsageError("nothing to measure: give --text FILE, a --protocol that has one, or --lm-eval TASK")
    where = Path(save) if save else None
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

        loaded = check_tasks(list(tasks), Path(lm_eval_path) if lm_eval_path else None)
    result = {**made(command), "kind": "evaluation"}
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
            result["results"] = evaluate_all(given, held, measure, named, field)
    if loaded is not None:
        if where and "results" in result:
            save_result(result, where)  # the harness may take hours more, and fail
        from qectomy.eval.harness import HarnessSettings, run_harness

        settings = HarnessSettings(limit=lm_eval_limit, dtype=dtype, device=device)
        with stage(progress, "lm-eval") as report:
            result["lm_eval"] = run_harness(given, loaded, settings, report)
    if where:
        save_result(result, where)
    return result
