#!/usr/bin/env bash
# transformers 5: save_pretrained(state_dict=...) empties the dict; a second save writes a folder without weights.
#
# Versions: transformers 5.24.0 (against 4.57.6), torch 2.13.0
# Expected: an argument that is saved is left as it was, as in 4.57.6; saving nothing is an error.
# Seen:     the dict has no entries left after the first call. The second call with it returns without an error and
#           leaves config.json and generation_config.json, no weights:
#             4.57.6: entries before 21, after 21; second folder has weights: True
#             5.24.0: entries before 21, after 0;  second folder has weights: False
# Matters:  edited weights are often kept in a dict that is saved twice (a checkpoint and a variant of it, or a retry).
#           In 5 the edit is gone from memory after the first save. Pass dict(state_dict).
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
import os
import sys

import transformers
from transformers import LlamaConfig, LlamaForCausalLM

version = transformers.__version__
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
)
edited = {name: tensor * 0.5 for name, tensor in model.state_dict().items()}
before = len(edited)
model.save_pretrained(f"{version}-first", state_dict=edited)
after = len(edited)
model.save_pretrained(f"{version}-second", state_dict=edited)
whole = [os.path.exists(f"{version}-{which}/model.safetensors") for which in ("first", "second")]
print(f"{version}: entries before {before}, after {after}; weights in the first, second folder: {whole}")
older = version.startswith("4.")
if (after, whole) != (before if older else 0, [True, older]):
    sys.exit("changed: the dict and the second folder fare otherwise than stated")
PY
PYTHONPATH=older "$env/bin/python" probe.py
"$env/bin/python" probe.py
