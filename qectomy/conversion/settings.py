"""What a conversion is told: texts, budgets, types and seed."""

from dataclasses import dataclass

from qectomy.checkpoint.checkpoint import Checkpoint
from qectomy.checkpoint.headers import TORCH_NAMES
from qectomy.errors import QectomyError, QueryMapError, TextError, note
from qectomy.models.query_maps import QueryMapSpec, any_of, turns_stream
from qectomy.text.documents import CONTEXT, MIN_CONTEXT

DTYPES = {TORCH_NAMES[kind]: kind for kind in ("F32", "BF16", "F16")}


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Settings of one conversion. `texts` and `eval_text` are files or dataset names; token counts are totals."""

    texts: tuple[str, ...] = ()
    field: str | None = None  # of records, the one with the text; None: found
    tokens: int = 32_768
    context: int = CONTEXT
    eval_text: str | None = None
    eval_tokens: int = 32_768
    dtype: str | None = None
    device: str = "cpu"
    seed: int = 0
    refit: bool = True  # W_O and W_down, to the stream that a reduced layer leaves
    command: str = ""

    @property
    def stored_dtype(self) -> str | None:
        """Safetensors' name of the type to write; None: each tensor's own. Raises QectomyError for an unknown one."""
        if self.dtype is None:
            return None
        if self.dtype not in DTYPES:
            raise QectomyError(f"unknown --dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        return DTYPES[self.dtype]

    def check_refit(self, source: Checkpoint, recipe: tuple[QueryMapSpec, ...]) -> None:
        """Raise QueryMapError where nothing is to be refitted and a map changes every matrix all the same."""
        if not self.refit and turns_stream(recipe, source.dims):
            plain = next(spec for spec in recipe if spec.query_map.plain)
            raise QueryMapError(
                f"--no-refit leaves all but the query map and W_K as it was, and {plain} in a "
                f"{source.family.model_type} turns the whole residual stream to another basis, which every matrix "
                f"follows; leave --no-refit out, or use {any_of(lambda query_map: not query_map.plain)}"
            )


def check_context(source: Checkpoint, context: int) -> None:
    """Raise TextError if windows of `context` tokens are too short to fit or heal on, or too long for the model.

    A table of positions ends; RoPE goes on, beyond what the model was made for with a note.
    """
    positions, ends = source.dims.n_positions, source.family.positions is not None
    if ends and positions < MIN_CONTEXT:
        raise TextError(f"the model has {positions} positions; a fit needs {MIN_CONTEXT} or more")
    if context < MIN_CONTEXT:
        raise TextError(f"--context {context} leaves too little to attend to; use {MIN_CONTEXT} or more")
    if context <= positions:
        return
    if ends:
        raise TextError(
            f"--context {context} is longer than the model's {positions} positions; use {positions} or less"
        )
    note(
        f"--context {context} is longer than the {positions} positions that the model was made for: RoPE goes on, but "
        "models tend to predict badly there, and what comes out is made for that. Use as many or fewer, unless meant"
    )


def default_context(source: Checkpoint) -> int:
    """Return the tokens a window that suit a model: CONTEXT, or as many as it was made for if those are fewer."""
    return max(MIN_CONTEXT, min(CONTEXT, source.dims.n_positions))
