"""How much of a layer's fit is handled at a time. Torch is not loaded: what a conversion needs is counted from this."""

TOKENS_A_PART = 2048  # of a step's windows, on a processor
ROWS_A_STEP = 1024  # query rows over all windows of a step ...
ROWS_STRIDE = 4  # ... every so many of a window
EIGEN_CHANNELS = 4096  # over all KV heads: up to so many, small eigenvalues are raised; beyond, the diagonal
BLOCK_LOGITS = 1_000_000  # entries of the logits of a block, at most, on a processor
COLUMNS = 256  # of a wide matrix
