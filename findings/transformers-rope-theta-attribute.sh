#!/usr/bin/env bash
# transformers 5: setting config.rope_theta, or passing rope_theta to AutoConfig, changes nothing and says nothing.
#
# Versions: transformers 5.24.0 (against 4.57.6), torch 2.13.0
# Expected: `config.rope_theta = 100.0` before building the model changes RoPE's base, as in 4.57.6, or raises, as
#           LlamaForCausalLM.from_pretrained(folder, rope_theta=100.0) does in 5.24.
# Seen:     the config keeps the number as an attribute that no code reads, and even saves it; AutoConfig drops it.
#           The model goes on with rope_parameters. Largest change of logits:
#             4.57.6: attribute 10, AutoConfig's argument 10
#             5.24.0: attribute 0,  AutoConfig's argument 0
#           The folder that 5.24 saves then says rope_theta 100 for version 4 and 10000 for version 5.
# Matters:  scripts that lengthen a model's context by another base report "no effect" or, worse, measure the old model
#           under the new name. Assign to config.rope_parameters["rope_theta"] and compare logits.
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
import sys

import torch
import transformers
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    )
).eval()
base.save_pretrained("folder")
text = torch.randint(0, 97, (1, 64))


def change(config):
    return (LlamaForCausalLM.from_pretrained("folder", config=config)(text).logits - base(text).logits).abs().max()


by_attribute = AutoConfig.from_pretrained("folder")
by_attribute.rope_theta = 100.0
by_argument = AutoConfig.from_pretrained("folder", rope_theta=100.0)
attribute, argument = change(by_attribute).item(), change(by_argument).item()
version = transformers.__version__
print(f"{version}: logits change by {attribute:.2g} (attribute), {argument:.2g} (AutoConfig's argument)")
by_attribute.save_pretrained("saved")
saved = {name: value for name, value in json.load(open("saved/config.json")).items() if "rope" in name}
print(f"    saved: {saved}")
heard = attribute > 0.1, argument > 0.1
if heard != ((True, True) if version.startswith("4.") else (False, False)) or saved["rope_theta"] != 100.0:
    sys.exit("changed: rope_theta has another effect than stated")
PY
PYTHONPATH=older "$env/bin/python" probe.py
"$env/bin/python" probe.py
