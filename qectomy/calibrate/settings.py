"""What a conversion is told: texts, budgets, types and seed."""

from dataclasses import dataclass

from qectomy.errors import QectomyError
from qectomy.surgery.headers import TORCH_NAMES

DTYPES = {TORCH_NAMES[kind]: kind for kind in ("F32", "BF16", "F16")}


@dataclass(frozen=True, kw_only=True)
class ConvertSettings:
    """Settings of one conversion. `texts` and `eval_text` are files or dataset names; token counts are totals."""

    texts: tuple[str, ...] = ()
    tokens: int = 32_768
    context: int = 512
    eval_text: str | None = None
    eval_tokens: int = 32_768
    dtype: str | None = None
    device: str = "cpu"
    seed: int = 0
    command: str = ""

    @property
    def stored_dtype(self) -> str | None:
        """Safetensors' name of the type to write; None: each tensor's own. Raises QectomyError for an unknown one."""
        if self.dtype is None:
            return None
        if self.dtype not in DTYPES:
            raise QectomyError(f"unknown --dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        return DTYPES[self.dtype]
