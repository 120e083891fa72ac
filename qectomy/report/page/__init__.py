"""`qectomy report`: reduced checkpoints as one self-contained HTML page."""
