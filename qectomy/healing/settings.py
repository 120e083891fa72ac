"""What healing is told: data, budgets, what is trained and how."""

from dataclasses import dataclass, replace

from qectomy.errors import QectomyError

TRAINED = ("all", "attention", "query-key")
LOSSES = ("kl", "ce", "mixed")
DTYPES = ("float32", "bfloat16")
TOKENS = 10_000_000  # where neither tokens nor minutes are given: one reading of the text, at most this much
GENERATED, VALIDATION = 1_000_000, 16_384  # tokens
WEIGHT_DECAY = 2.0**-5  # Karbevski & Mijoski, arXiv 2510.23912: what suits models without W_Q
RATE_TIMES_WIDTH = 0.04  # of the default learning rate and d_model (measured, docs/LOG.md) ...
RATED_TOKENS = 4096  # ... with so many tokens a step, or more


@dataclass(frozen=True, kw_only=True)
class HealSettings:
    """Settings of one healing run. `texts` and `eval_text` are files or dataset names; token counts are totals.

    Raises QectomyError for values that no run can use.
    """

    texts: tuple[str, ...] = ()
    field: str | None = None  # of records, the one with the text
    self_generated: bool = False
    generated_tokens: int = GENERATED  # at most, that the original writes
    tokens: int | None = None  # to train on; the text is read again when it is shorter
    minutes: float | None = None  # of training, validation included
    train: str = "all"
    loss: str = "kl"
    ce_weight: float = 0.5  # of the cross-entropy in the mixed loss
    hidden_weight: float = 0.0  # of the relative error of each layer's hidden states
    lr: float | None = None
    weight_decay: float = WEIGHT_DECAY
    warmup: float = 0.05  # of all steps
    clip: float = 1.0  # largest norm of the gradient
    batch_tokens: int | None = None  # a step, over all devices
    micro_batch: int | None = None  # windows a device runs at a time
    context: int
    eval_text: str | None = None
    eval_tokens: int = 16_384
    validation_tokens: int = VALIDATION
    evaluations: int = 10  # of the validation windows, over the run
    patience: int = 5  # evaluations without a better one before it stops; 0: never
    dtype: str | None = None  # to compute in
    activation_checkpointing: bool = False
    compile: bool = False
    report_to: str = "none"
    device: str = "cpu"
    seed: int = 0
    command: str = ""

    def __post_init__(self) -> None:
        for name, known in (("train", TRAINED), ("loss", LOSSES), ("dtype", (*DTYPES, None))):
            if getattr(self, name) not in known:
                listed = ", ".join(str(value) for value in known if value)
                raise QectomyError(f"unknown --{name} {getattr(self, name)!r}; known: {listed}")
        if self.texts and self.self_generated:
            raise QectomyError("--self-generated takes the place of a text; give one or the other")
        if not self.texts and not self.self_generated:
            raise QectomyError(
                "no text to heal on: give --text FILE or --dataset NAME of the kind the model is used on, or "
                "--self-generated to let the original write it"
            )
        for name, least in (("lr", 0.0), ("minutes", 0.0), ("clip", 0.0)):
            value = getattr(self, name)
            if value is not None and not value > least:
                raise QectomyError(f"--{name} {value} must be above {least:g}")
        if not 0 <= self.ce_weight <= 1:
            raise QectomyError(f"--ce-weight {self.ce_weight} must lie between 0 and 1")

    def resolved(self) -> "HealSettings":
        """Return the settings with the type filled in that was left to the device."""
        return replace(self, dtype=self.compute_dtype)

    def learning_rate(self, d_model: int, tokens_a_step: int) -> float:
        """Return the largest rate: given, or 0.04 / d_model, less for steps of few tokens, whose gradient is noise."""
        if self.lr is not None:
            return self.lr
        return RATE_TIMES_WIDTH / d_model * min(1.0, (tokens_a_step / RATED_TOKENS) ** 0.5)

    @property
    def cross_entropy(self) -> float:
        """The weight of the cross-entropy beside the KL."""
        return {"kl": 0.0, "ce": 1.0, "mixed": self.ce_weight}[self.loss]

    @property
    def compute_dtype(self) -> str:
        """The type of products: given, or bfloat16 where the device has instructions for it."""
        from qectomy.healing.devices import multiplies_bfloat16

        return self.dtype or ("bfloat16" if multiplies_bfloat16(self.device) else "float32")
