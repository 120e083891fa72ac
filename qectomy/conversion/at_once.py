"""How much of a conversion's pass is handled at a time. Torch is not loaded: what it needs is counted from this."""

TOKENS_A_BATCH = 512  # on which a layer runs
TOKENS_ON_DEVICE = 8192  # likewise, on an accelerator
SCORED_TOKENS = 1024  # the head is read anew for each batch
