#!/usr/bin/env bash
# mergekit 0.1.5: merging Llamas that have biases drops all biases; config.json goes on announcing them.
#
# Versions: mergekit 0.1.5, transformers 5.24.0, torch 2.13.0
# Expected: LlamaConfig(attention_bias=True, mlp_bias=True) is a stock architecture; a merge of two such models has the
#           averaged biases, or is refused.
# Seen:     mergekit's list of Llama's tensors has no biases. Those of the inputs are left out, the merge exits 0, and
#           the written config.json still has attention_bias and mlp_bias: true. Loading initialises them to zero, as
#           "missing" in a report:
#             inputs: 14 biases; merged file: 0; config says attention_bias True, mlp_bias True; exit status 0
#             merging a model with itself changes its logits by 7.6
# Matters:  compare the tensor names of what goes in and what comes out of any tool that works from a list of names.
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
import subprocess
import sys

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.3, attention_bias=True, mlp_bias=True,
)
model = LlamaForCausalLM(config).eval()
for name, tensor in model.named_parameters():
    if name.endswith(".bias"):
        torch.nn.init.normal_(tensor)
model.save_pretrained("one")
model.save_pretrained("two")
pathlib.Path("recipe.yml").write_text(
    "merge_method: linear\ndtype: float32\nmodels:\n"
    + "".join(f"  - model: {pathlib.Path(x).resolve()}\n    parameters: {{weight: 0.5}}\n" for x in ("one", "two"))
)
done = subprocess.run(
    ["mergekit-yaml", "recipe.yml", "merged", "--no-copy-tokenizer"], capture_output=True, text=True
)
if done.returncode:
    sys.exit(f"changed: mergekit refuses Llamas with biases\n{done.stderr[-800:]}")


def biases(folder):
    with safe_open(f"{folder}/model.safetensors", "pt") as file:
        return sum(name.endswith(".bias") for name in file.keys())


fields = json.loads(pathlib.Path("merged/config.json").read_text())
print(f"inputs: {biases('one')} biases; merged file: {biases('merged')}")
print(f"config says attention_bias {fields['attention_bias']}, mlp_bias {fields['mlp_bias']}")
print("said about biases:", [line for line in (done.stdout + done.stderr).splitlines() if "bias" in line.lower()])
text = torch.randint(0, 97, (1, 40))
away = (LlamaForCausalLM.from_pretrained("merged").eval()(text).logits - model(text).logits).abs().max().item()
print(f"merging a model with itself changes its logits by {away:.2g}")
if (biases("one"), biases("merged"), fields["attention_bias"], fields["mlp_bias"]) != (14, 0, True, True) or away < 0.1:
    sys.exit("changed: the biases fare otherwise than stated")
PY
