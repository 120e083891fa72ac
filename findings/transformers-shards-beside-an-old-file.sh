#!/usr/bin/env bash
# transformers: a model saved in shards over an older one is ignored; the old model.safetensors stays and is read.
#
# Versions: transformers 5.24.0, torch 2.13.0 (4.57.6 does the same)
# Expected: after new.save_pretrained(folder), from_pretrained(folder) gives the new model. Saving cleans up: old
#           shards are deleted when a single file is written over them.
# Seen:     the other way round nothing is deleted. Shards and index are written beside the old model.safetensors,
#           and loading prefers that one:
#             folder: model-00001-of-0000N.safetensors ... model.safetensors model.safetensors.index.json
#             loaded: the old model: True, the new model: False
#           The first direction leaves a trace too: an index that names deleted shards stays beside the new file.
# Matters:  whoever edits a checkpoint in place and saves with a smaller max_shard_size (or grows it past the default)
#           tests the old weights and ships both. Tools that follow the index read the other model. Save into an empty
#           folder.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==2.4.0 numpy==2.4.6
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

"$env/bin/python" - <<'PY'
import os
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
old, new = LlamaForCausalLM(config), LlamaForCausalLM(config)


def same(a, b):
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


old.save_pretrained("folder")
new.save_pretrained("folder", max_shard_size="20KB")
print("folder:", *sorted(os.listdir("folder")))
loaded = LlamaForCausalLM.from_pretrained("folder")
is_old, is_new = same(loaded, old), same(loaded, new)
print(f"loaded: the old model: {is_old}, the new model: {is_new}")
if not is_old or is_new:
    sys.exit("changed: from_pretrained no longer reads the file that the second save left behind")

new.save_pretrained("shards", max_shard_size="20KB")
old.save_pretrained("shards")
left = sorted(name for name in os.listdir("shards") if name.startswith("model"))
print("a single file saved over shards leaves:", *left)
if left != ["model.safetensors", "model.safetensors.index.json"]:
    sys.exit("changed: the index of the deleted shards does not stay")
PY
