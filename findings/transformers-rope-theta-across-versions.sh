#!/usr/bin/env bash
# transformers 5 writes RoPE's base where 4.57 does not look: 4.57 loads the folder and takes 10000 in silence.
#
# Versions: folder written by transformers 5.24.0, read by 4.57.6, torch 2.13.0
# Expected: 4.57.6 computes what 5.24 computed, or refuses a config that a newer version has written.
# Seen:     5.24 writes {"rope_parameters": {"rope_theta": 500000.0, ...}} and no top-level rope_theta. 4.57.6 ignores
#           the field, uses its default, and says nothing:
#             5.24.0: theta 500000
#             4.57.6: theta 10000, largest difference of logits 8.1
#           With "rope_theta": 500000.0 written beside it both versions agree.
# Matters:  re-saving a Llama 3 style checkpoint is enough to break it for everybody on version 4, including the tools
#           that pin it. A tool that edits checkpoints should write both fields.
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

"$env/bin/python" - <<'PY'
import json
import pathlib
import shutil
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.3, rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)
model = LlamaForCausalLM(config).eval()
model.save_pretrained("written")
text = torch.randint(0, 97, (1, 64))
torch.save((text, model(text).logits.detach()), "reference.pt")
fields = json.loads(pathlib.Path("written/config.json").read_text())
print("5.24.0 writes:", {name: value for name, value in fields.items() if "rope" in name})
if "rope_theta" in fields:
    sys.exit("changed: 5.24.0 writes the top-level field that version 4 reads")
shutil.copytree("written", "both")
pathlib.Path("both/config.json").write_text(json.dumps(fields | {"rope_theta": 500000.0}))
PY
cat > read.py <<'PY'
import sys

import torch
import transformers
from transformers import LlamaForCausalLM

text, reference = torch.load("reference.pt")
away = {}
for folder in ("written", "both"):
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    away[folder] = (model(text).logits - reference).abs().max().item()
    print(f"{transformers.__version__} reads '{folder}': largest difference of logits {away[folder]:.2g}")
wrong = away["written"] > 0.1
if wrong != transformers.__version__.startswith("4.") or away["both"] > 1e-4:
    sys.exit("changed: the versions read RoPE's base otherwise than stated")
PY
"$env/bin/python" read.py
PYTHONPATH=older "$env/bin/python" read.py
