#!/usr/bin/env bash
# transformers 5: from_pretrained leaves a custom model's non-persistent buffers as uninitialised memory.
#
# Versions: transformers 5.24.0 (against 4.57.6), torch 2.13.0
# Expected: a buffer with persistent=False holds after from_pretrained what __init__ put there, as in a model made
#           from its config, and as in 4.57.6: that is what such a buffer is for.
# Seen:     __init__ runs on the meta device, the buffer is then allocated but never filled. The load report has no
#           missing keys, nothing is printed, and the values are whatever the memory held:
#             4.57.6: missing keys: none, frequencies as __init__ made them: True
#             5.24.0: missing keys: none, frequencies as __init__ made them: False
#           Only an _init_weights that fills the buffer again helps. Others have reported it to the developers.
# Matters:  modelling files that came with checkpoints before version 5 (rotary tables, masks, index tables) load
#           without a word and compute nonsense, or something plausible where the memory held zeros. Store such a
#           table as a persistent buffer, make it in forward, or fill it in _init_weights.
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
from transformers import PretrainedConfig, PreTrainedModel


class WavesConfig(PretrainedConfig):
    model_type = "waves"


class Waves(PreTrainedModel):
    config_class = WavesConfig
    base_model_prefix = "waves"

    def __init__(self, config):
        super().__init__(config)
        self.proj = torch.nn.Linear(8, 8)
        self.register_buffer("frequencies", torch.linspace(1, 2, 8), persistent=False)
        self.post_init()

    def forward(self, x):
        return self.proj(x * self.frequencies)


model = Waves(WavesConfig())
model.save_pretrained("waves")
loaded, report = Waves.from_pretrained("waves", output_loading_info=True)
version = transformers.__version__
missing = sorted(report["missing_keys"])
right = torch.equal(loaded.frequencies, model.frequencies)
print(f"transformers {version}: missing keys: {missing or 'none'}, frequencies as __init__ made them: {right}")
print(f"    {loaded.frequencies.tolist()}")
if missing or not torch.equal(loaded.proj.weight, model.proj.weight) or right != version.startswith("4."):
    sys.exit("changed: the buffer comes out of from_pretrained otherwise than stated")
PY
PYTHONPATH=older "$env/bin/python" probe.py
"$env/bin/python" probe.py
