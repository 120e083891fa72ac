#!/usr/bin/env bash
# accelerate 1.15.0: two processes under torchrun on a machine without a GPU are two separate runs, each "the main".
#
# Versions: accelerate 1.15.0, torch 2.13.0, no GPU visible
# Expected: torchrun sets RANK and WORLD_SIZE=2, so Accelerator() is one of two processes, or raises.
# Seen:     without ACCELERATE_USE_CPU=true it ignores them: no error, no warning, no gradient is exchanged.
#             torchrun alone:                  processes 1, main process True and True,  batches each 4, wrapped: no
#             with ACCELERATE_USE_CPU=true:    processes 2, main process True and False, batches each 2, wrapped: DDP
#           (transformers' Trainer builds on it and does the same.)
# Matters:  both processes train on all the data and write to the same output folder at once; the logged loss looks
#           right. Check accelerator.num_processes against WORLD_SIZE.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 safetensors==0.8.0 huggingface-hub==2.4.0 numpy==2.4.6 \
    accelerate==1.15.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""
unset ACCELERATE_USE_CPU

cat > run.py <<'PY'
import json
import os

import torch
from accelerate import Accelerator

accelerator = Accelerator()
data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=2)
model, data = accelerator.prepare(torch.nn.Linear(4, 1), data)
seen = [accelerator.num_processes, accelerator.is_main_process, len(data), type(model).__name__]
with open(os.path.join(os.environ["RESULTS"], os.environ["RANK"]), "w") as file:
    json.dump(seen, file)
accelerator.end_training()
PY
cat > compare.py <<'PY'
import json
import sys

folder, *expected = sys.argv[1:]
seen = [json.load(open(f"{folder}/{rank}")) for rank in "01"]
print(f"{folder}: processes, is main, batches, model: {seen}")
if [[str(value) for value in one] for one in seen] != [word.split(",") for word in expected]:
    sys.exit("changed: accelerate counts the processes otherwise than stated")
PY
mkdir alone told
RESULTS=$work/alone "$env/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 run.py
RESULTS=$work/told ACCELERATE_USE_CPU=true "$env/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 \
    run.py
"$env/bin/python" compare.py alone 1,True,4,Linear 1,True,4,Linear
"$env/bin/python" compare.py told 2,True,2,DistributedDataParallel 2,False,2,DistributedDataParallel
