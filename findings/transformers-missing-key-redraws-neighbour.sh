#!/usr/bin/env bash
# transformers 5: one key missing from a file makes from_pretrained draw the same module's *loaded* weight anew.
#
# Versions: transformers 5.24.0 (against 4.57.6), torch 2.13.0
# Expected: a parameter that the file lacks is initialised by _init_weights and reported; those that the file has are
#           loaded. So it is in 4.57.6.
# Seen:     5.24 calls _init_weights on the whole module, and an _init_weights in the style of version 4
#           (`module.weight.data.normal_()`) overwrites the weight that was just loaded. The report names only the
#           missing key:
#             4.57.6: reported missing ['scaled.gain'], loaded weight kept: True
#             5.24.0: reported missing ['scaled.gain'], loaded weight kept: False
#           With torch.nn.init.normal_(module.weight) it is kept: the library guards those functions, not `.data`.
# Matters:  adding one parameter to a module (a scale, a gate) and loading the old checkpoint, to start training from
#           it, is a common edit. It silently starts from noise wherever the module also holds trained weights.
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
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class ScaledConfig(PretrainedConfig):
    model_type = "scaled"


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.gain = nn.Parameter(torch.ones(8))


class OldStyle(PreTrainedModel):
    config_class = ScaledConfig
    base_model_prefix = "inner"

    def __init__(self, config):
        super().__init__(config)
        self.scaled = Scaled()
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, Scaled):
            module.weight.data.normal_(0.0, 0.02)
            module.gain.data.fill_(1.0)


class Guarded(OldStyle):
    def _init_weights(self, module):
        if isinstance(module, Scaled):
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.ones_(module.gain)


version, kept = transformers.__version__, {}
for kind in (OldStyle, Guarded):
    model = kind(ScaledConfig())
    model.save_pretrained("folder")
    tensors = load_file("folder/model.safetensors")
    del tensors["scaled.gain"]
    save_file(tensors, "folder/model.safetensors", {"format": "pt"})
    loaded, report = kind.from_pretrained("folder", output_loading_info=True)
    kept[kind.__name__] = torch.equal(loaded.scaled.weight, model.scaled.weight)
    missing = sorted(report["missing_keys"])
    print(f"{version} {kind.__name__}: reported missing {missing}, loaded weight kept: {kept[kind.__name__]}")
    if missing != ["scaled.gain"]:
        sys.exit("changed: the report names other keys than the one that is missing")
if kept != {"OldStyle": version.startswith("4."), "Guarded": True}:
    sys.exit("changed: the loaded weight beside a missing one fares otherwise than stated")
PY
PYTHONPATH=older "$env/bin/python" probe.py
"$env/bin/python" probe.py
