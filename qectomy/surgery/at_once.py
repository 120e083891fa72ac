"""How much of a tensor is folded at a time. Torch is not loaded: what a command needs is counted from this."""

ROWS_AT_ONCE = 2048  # of the embedding
