"""The command that measures checkpoints; `cli.py` registers it."""

from typing import Any

from qectomy.api.evaluate import evaluate as run
from qectomy.commands.terminal import command_line, note_old_code, print_json, takes_options_of, usage_errors


@takes_options_of(run)
def evaluate(as_json: bool, **given: Any) -> None:
    """Measure perplexity, bits per byte and the cost of a reduction, all by one recorded protocol."""
    note_old_code(given["checkpoints"])
    with usage_errors():
        result = run(**given, progress=True, command=command_line())
    if as_json:
        print_json(result)
        return
    from qectomy.report.evaluation_table import show_evaluations
    from qectomy.report.harness_table import show_harness

    if result.results:
        show_evaluations(result.results)
    if result.lm_eval:
        show_harness(result.lm_eval)
