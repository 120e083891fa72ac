"""`qectomy.inspect`: what can go from a checkpoint, and what that needs of this machine."""

import os
from typing import Any

from qectomy.api.arguments import Name, Names, check_numbers, names
from qectomy.errors import UsageError
from qectomy.progress import Progress, stage
from qectomy.versions import check_transformers


def inspect(
    checkpoint: Name,
    *,
    tokens: int = 32_768,
    eval_tokens: int = 32_768,
    context: int | None = None,
    audit: bool = False,
    text: Names | None = None,
    field: str | None = None,
    no_probe: bool = False,
    progress: bool | Progress = False,
) -> dict[str, Any]:
    """Return what `qectomy inspect --json` prints: what each query map would remove and need, layer by layer.

    The options are those of the command; without `audit` the config and the file headers alone are read, of a hub id
    too. `progress`: True for bars on stderr, or a function (done, total, note). Raises QectomyError.
    """
    check_transformers()
    check_numbers(1, tokens=tokens)
    check_numbers(0, eval_tokens=eval_tokens)
    check_numbers(16, context=context)
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
