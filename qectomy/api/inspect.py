"""`qectomy.inspect`: what can go from a checkpoint, and what that needs of this machine."""

import os
from typing import Annotated, Any

from qectomy.api.arguments import begin, names
from qectomy.api.options import Argument, Context, Field, Name, Names, NoProbe, Option
from qectomy.errors import UsageError
from qectomy.progress import Progress, stage


def inspect(
    checkpoint: Annotated[Name, Argument("Folder or hub id of an original checkpoint.")],
    *,
    tokens: Annotated[int, Option("Calibration tokens to plan for, or to audit on.", min=1)] = 32_768,
    eval_tokens: Annotated[int, Option("Evaluation tokens to plan for.", min=0)] = 32_768,
    context: Context = None,
    audit: Annotated[bool, Option("Read the weights too: how far each layer's W_Q is from going exactly.")] = False,
    text: Annotated[
        Names | None, Option("With --audit: text to take the ranks on, as for convert. Default: white states.")
    ] = None,
    field: Field = None,
    no_probe: NoProbe = False,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Return what `qectomy inspect --json` prints: what each query map would remove and need, layer by layer.

    The options are those of the command; without `audit` the config and the file headers alone are read, of a hub id
    too. `progress`: True for bars on stderr, or a function (done, total, note). Raises QectomyError.
    """
    begin(inspect, locals())
    texts, checkpoint = names(text), os.fspath(checkpoint)
    if texts and not audit:
        raise UsageError("only an audit reads a text; add --audit", "--text")
    from qectomy.checkpoint.checkpoint import open_checkpoint
    from qectomy.checkpoint.hub_headers import open_headers
    from qectomy.conversion.forecast.forecast import forecast
    from qectomy.conversion.settings import default_context
    from qectomy.surgery.inspect import inspect as run

    source, here = (open_checkpoint(checkpoint), True) if audit else open_headers(checkpoint)
    context = context or default_context(source)
    result = run(source)
    if audit:
        from qectomy.conversion.audit import audit_layers
        from qectomy.surgery.choice import choose_folds

        with stage(progress, "auditing") as report:
            records = audit_layers(source, texts, tokens=tokens, context=context, field=field, progress=report)
            verdicts = choose_folds(source).verdicts
        for layer, record in zip(result["layers"], records, strict=True):
            verdict = verdicts[source.dims.stored_layer(layer["index"])]
            layer |= {"how": verdict.how, "reason": verdict.reason, "audit": record}
    fitted = any(row["possible"] for row in result["query_maps"] if row["map"] != "exact")
    result["needs"] = {"tokens": tokens, "eval_tokens": eval_tokens, "context": context} | forecast(
        source, tokens=tokens, eval_tokens=eval_tokens, context=context, probe=fitted and here and not no_probe
    )
    return result
