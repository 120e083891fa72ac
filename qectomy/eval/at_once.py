"""How much of an evaluation is handled at a time. Torch is not loaded: what a command needs is counted from this."""

SLICE = 512  # of the vocabulary
RELOAD_TOKENS = 64  # whose logits are compared when a result is reloaded
STREAMED_TOKENS = 2048  # on which a layer runs, where a model is read a layer at a time ...
STREAMED_ON_DEVICE = 16_384  # ... on an accelerator
STATES_BYTES = 1 << 28  # of hidden states of one model held then; longer texts are run in groups
ROWS_A_HEAD = 8192  # tokens that are scored each time the head is read
SAMPLED, SAMPLED_WINDOWS = 64, 4  # positions at which a certificate compares the layers, and the windows they are in
