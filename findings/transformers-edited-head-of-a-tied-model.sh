#!/usr/bin/env bash
# transformers 4.57: an output head edited apart from its tied embedding is saved, then dropped when it is loaded.
#
# Versions: transformers 4.57.6 (against 5.24.0), torch 2.13.0
# Expected: folding GPT-2's last norm gain into lm_head (a new Parameter, so no longer the embedding's) leaves the
#           function as it was; save_pretrained and from_pretrained keep it, or complain that config.json still says
#           tie_word_embeddings.
# Seen:     both versions write lm_head.weight and transformer.wte.weight. 4.57.6 then ties them again when loading:
#           the edited head is thrown away without a word. 5.24 loads both and warns:
#             4.57.6: file has both: True, logits after reload off by 6
#             5.24.0: file has both: True, logits after reload off by 1e-6
# Matters:  the same folder is two models, depending on the version that reads it. Set tie_word_embeddings=False in the
#           config as soon as the head or the embedding is edited.
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
import sys

import torch
import transformers
from safetensors import safe_open
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
config = GPT2Config(
    vocab_size=97, n_embd=32, n_head=4, n_layer=2, n_positions=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0
)
model = GPT2LMHeadModel(config).eval()
torch.nn.init.uniform_(model.transformer.ln_f.weight, 1.0, 3.0)
text = torch.randint(0, 97, (1, 40))
before = model(text).logits
model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * model.transformer.ln_f.weight.detach())
torch.nn.init.ones_(model.transformer.ln_f.weight)
folded = (model(text).logits - before).abs().max().item()
model.save_pretrained("folded")
with safe_open("folded/model.safetensors", "pt") as file:
    both = {"lm_head.weight", "transformer.wte.weight"} <= set(file.keys())
reloaded = (GPT2LMHeadModel.from_pretrained("folded")(text).logits - before).abs().max().item()
version = transformers.__version__
print(f"{version}: folded, off by {folded:.1g}; file has both: {both}; reloaded, off by {reloaded:.2g}")
if folded > 1e-3 or not both or (reloaded > 0.1) != version.startswith("4."):
    sys.exit("changed: the edited head fares otherwise than stated")
PY
PYTHONPATH=older "$env/bin/python" probe.py
"$env/bin/python" probe.py
