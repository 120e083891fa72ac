"""How many bytes a conversion takes on the disk at its worst moment. Torch is not loaded."""

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.config_files import companions
from qectomy.checkpoint.sizes import totals
from qectomy.conversion.forecast.work import Work

REPORT = 1_000_000  # the model code, qectomy.json, the card and the page, about


def scratch_files(work: Work) -> dict[str, int]:
    """Return {what files of the scratch folder are for: their bytes}."""
    dims, tokens = work.dims, work.windows * work.context
    fitted = work.fitted * work.context
    looks = any(spec.name != "dense" for spec in work.recipe) and not work.on_device
    seen = dims.d_model + work.n_query + work.n_key
    return {
        "both models' states, three layers'": 6 * 4 * tokens * dims.d_model,
        "the teacher's states after its attention": 4 * fitted * dims.d_model,
        "what a layer's fit looks at": work.fast_itemsize * fitted * seen if looks else 0,
        "both models' rows of the embedding": 2 * 4 * min(tokens, dims.vocab_size) * dims.d_model,  # at most
    }


def disk_bytes(source: Checkpoint, work: Work, dtype: str | None = None) -> int:
    """Return the bytes of scratch, of what is written, and of what is copied along.

    The embedding's rows are gone when the first layer's fit begins: the larger of the two counts.
    """
    *always, fit, rows = scratch_files(work).values()
    written = totals(source, work.recipe, dtype)["bytes"]["after"]
    return sum(always) + max(fit, rows) + written + companion_bytes(source)


def companion_bytes(source: Checkpoint) -> int:
    """Return the bytes of what lies beside the weights of a result."""
    return sum(path.stat().st_size for path in companions(source.folder)) + REPORT
