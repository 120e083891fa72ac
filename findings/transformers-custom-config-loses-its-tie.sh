#!/usr/bin/env bash
# transformers 5: a custom model that was tied by version 4's default comes back with a random output head.
#
# Versions: folder written by transformers 4.57.6, read by 5.24.0, torch 2.13.0
# Expected: a model that ties its head to its embedding, saved by 4.57.6, is tied when 5.24 loads it.
# Seen:     in version 4 every config has tie_word_embeddings=True unless it says otherwise, and config.json leaves
#           defaults out. In 5.24 the base class has no such field: nothing ties the head, which the file does not hold
#           (it was tied), so it is drawn at random. The load report calls it "newly initialized" and goes on:
#             4.57.6: tied: True,  missing []
#             5.24.0: tied: False, missing ['head.weight']
#           Writing _tied_weights_keys as version 5 wants it (a dict) changes nothing.
# Matters:  stock configs name the field, so only checkpoints with their own modelling file are hit. Write
#           "tie_word_embeddings": true into config.json, and treat missing keys as an error.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==2.4.0 numpy==2.4.6 requests==2.34.2
"$env/bin/pip" install -qq --no-compile --no-deps --target older transformers==4.57.6 tokenizers==0.22.2 \
    huggingface-hub==0.36.2
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

cat > probe.py <<'PY'
import json
import pathlib
import sys

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

OLDER = transformers.__version__.startswith("4.")


class BigramConfig(PretrainedConfig):
    model_type = "bigram"


class Bigram(PreTrainedModel):
    config_class = BigramConfig
    base_model_prefix = "bigram"
    _tied_weights_keys = ["head.weight"] if OLDER else {"head.weight": "embed.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(11, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def set_output_embeddings(self, head):
        self.head = head

    def forward(self, tokens):
        return self.head(self.embed(tokens))


def load():
    model, report = Bigram.from_pretrained("bigram", output_loading_info=True)
    tied = torch.equal(model.head.weight, model.embed.weight)
    print(f"{transformers.__version__}: tied: {tied}, missing {sorted(report['missing_keys'])}")
    return tied


if OLDER:
    Bigram(BigramConfig()).save_pretrained("bigram")
fields = json.loads(pathlib.Path("bigram/config.json").read_text())
if "tie_word_embeddings" in fields or load() != OLDER:
    sys.exit("changed: the head of a model that version 4 tied fares otherwise than stated")
if not OLDER:
    pathlib.Path("bigram/config.json").write_text(json.dumps(fields | {"tie_word_embeddings": True}))
    print("with tie_word_embeddings written into config.json:")
    if not load():
        sys.exit("changed: writing the field does not tie the head any more")
PY
PYTHONPATH=older "$env/bin/python" probe.py
"$env/bin/python" probe.py
