#!/usr/bin/env bash
# PEFT 0.21.2: of two layers that share one linear module, LoRA adapts the first alone; merging changes both.
#
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0
# Expected: the shared module gets its adapter in both places, or get_peft_model says that it cannot; in any case the
#           merged model computes what the model with the adapter did.
# Seen:     the module is replaced under its first name only. Nothing is said, and the merged model is another one:
#             adapters: 1; second layer's module: Linear of torch; warnings: 0
#             largest difference that merging makes: 0.40 of the largest output
# Matters:  models whose layers share weights by holding the same modules (a common way to tie them) train as if their later
#           layers were frozen, and are something else once merged. Share the parent, not the child, or let both parents
#           hold one dictionary of modules: an exchange in one is then an exchange in both.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==2.4.0 numpy==2.4.6 accelerate==1.15.0 peft==0.21.2
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

"$env/bin/python" - <<'PY'
import sys
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


class Layer(nn.Module):
    def __init__(self, proj):
        super().__init__()
        self.proj = proj

    def forward(self, x):
        return x + self.proj(x).tanh()


torch.manual_seed(0)
shared = nn.Linear(16, 16)
model = nn.Sequential(Layer(shared), Layer(shared))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    adapted = get_peft_model(model, LoraConfig(target_modules=["proj"], r=4, init_lora_weights=False))
    count, second = sum("lora_B" in name for name, _ in adapted.named_parameters()), type(model[1].proj)
    x = torch.randn(8, 16)
    with torch.no_grad():
        before = adapted(x)
        after = adapted.merge_and_unload()(x)
moved = float((after - before).abs().max() / before.abs().max())
print(f"adapters: {count}; second layer's module: {second.__name__} of {second.__module__.partition('.')[0]}; ", end="")
print(f"warnings: {len(caught)}")
print(f"largest difference that merging makes: {moved:.2f} of the largest output")
if (count, second, len(caught)) != (1, nn.Linear, 0) or moved < 0.1:
    sys.exit("changed: modules that two layers share are adapted or merged otherwise than stated")
PY
