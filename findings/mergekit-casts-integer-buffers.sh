#!/usr/bin/env bash
# mergekit 0.1.5: a recipe's `dtype` casts integer buffers to floats too, and takes its own guard out of action.
#
# Versions: mergekit 0.1.5, transformers 5.24.0, torch 2.13.0
# Expected: an index buffer (int64) that both models share is copied; one that differs is refused: without `dtype` in
#           the recipe mergekit does exactly that ("Non-floating buffer ... differs").
# Seen:     with `dtype: bfloat16` (nearly every recipe has a dtype) the buffer is cast first, and then is a float like
#           any weight: averaged if the models differ, rounded even if they agree. Exit status 0, no warning:
#             no dtype, equal buffers:   int64, 1000 different indices of 1000
#             no dtype, unequal buffers: refused
#             bfloat16, equal buffers:   bfloat16, 507 different indices of 1000 (257 became 256)
#             bfloat16, unequal buffers: bfloat16, averaged
#           A loader that copies this into the model's int64 buffer cuts it back to integers, also without a word.
# Matters:  permutations, selected channels, lookup tables: an index that is off by one computes something plausible.
#           Keep such tables in config.json or check a sum of them after loading.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==2.4.0 numpy==2.4.6 accelerate==1.15.0 peft==0.21.2 pydantic==2.14.4 mergekit==0.1.5
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1 PATH="$env/bin:$PATH"

"$env/bin/python" - <<'PY'
import json
import pathlib
import shutil
import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

CONFIG = """from transformers import PretrainedConfig


class ShuffleConfig(PretrainedConfig):
    model_type = "shuffle"
"""
order = torch.arange(1000)


def write(folder, index):
    folder = pathlib.Path(folder)
    folder.mkdir()
    (folder / "configuration_shuffle.py").write_text(CONFIG)
    fields = {
        "model_type": "shuffle",
        "architectures": ["ShuffleModel"],
        "auto_map": {"AutoConfig": "configuration_shuffle.ShuffleConfig"},
    }
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {"layers.0.weight": torch.randn(8, 8), "layers.0.order": index}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder.resolve()


def merge(one, two, dtype):
    recipe = f"merge_method: linear\n{dtype}models:\n"
    recipe += "".join(f"  - model: {folder}\n    parameters: {{weight: 0.5}}\n" for folder in (one, two))
    pathlib.Path("recipe.yml").write_text(recipe)
    shutil.rmtree("merged", ignore_errors=True)
    command = ["mergekit-yaml", "recipe.yml", "merged", "--no-copy-tokenizer", "--trust-remote-code"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "Non-floating buffer" not in done.stderr:
        sys.exit(f"changed: mergekit fails in another way\n{done.stderr[-800:]}")
    return None if done.returncode else load_file("merged/model.safetensors")["layers.0.order"]


one, same, other = write("one", order), write("same", order), write("other", order.flip(0))
kept, refused = merge(one, same, ""), merge(one, other, "")
rounded, averaged = merge(one, same, "dtype: bfloat16\n"), merge(one, other, "dtype: bfloat16\n")
if rounded is None or averaged is None:
    sys.exit("changed: a recipe with a dtype refuses or copies integer buffers")
print(f"no dtype, equal buffers: kept: {kept is not None and torch.equal(kept, order)}")
print(f"no dtype, unequal buffers: refused: {refused is None}")
print(f"bfloat16, equal buffers: {rounded.dtype}, {len(rounded.unique())} different indices, 257 is {rounded[257]:.0f}")
print(f"bfloat16, unequal buffers: {averaged.dtype}, first three {averaged[:3].tolist()}")
bfloat16 = rounded.dtype == averaged.dtype == torch.bfloat16
if kept is None or not torch.equal(kept, order) or refused is not None or not bfloat16 or rounded[257] != 256:
    sys.exit("changed: integer buffers are merged otherwise than stated")
PY
