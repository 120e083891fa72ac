#!/usr/bin/env bash
# llm-compressor 0.14.0: a model whose config was changed in memory is saved with the config of the folder it came from.
#
# Versions: llmcompressor 0.14.0, compressed-tensors 0.19.0, transformers 5.17.0, torch 2.13.0
# Expected: model.save_pretrained(out) after oneshot(model=...) writes model.config, as transformers does.
# Seen:     config.json is taken from the folder named in config._name_or_path; a few fields are patched (ties, dtype,
#           numbers of experts), all other changes are lost. One INFO line says that the original config was saved
#           again; no warning. Reloaded, the quantised model is another function:
#             RoPE's base: in memory 100, in config.json 10000
#             logits: quantising changed them by 0.3, reloading changes them by 9
# Matters:  changing the base of RoPE, an activation or an epsilon (or anything of a custom architecture) and quantising
#           in the same script is enough. Save the edited model first, load it from there, then quantise.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.17.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==1.33.0 numpy==2.4.6 compressed-tensors==0.19.0 llmcompressor==0.14.0
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""

"$env/bin/python" - <<'PY'
import json
import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.15,
)
LlamaForCausalLM(config).save_pretrained("source")

changed = AutoConfig.from_pretrained("source")
changed.rope_parameters["rope_theta"] = 100.0
model = LlamaForCausalLM.from_pretrained("source", config=changed).eval()
text = torch.randint(0, 97, (1, 40))
before = model(text).logits
oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W8A16", ignore=["lm_head"]))
quantised = model(text).logits
model.save_pretrained("out", save_compressed=True)
written = json.load(open("out/config.json"))["rope_parameters"]["rope_theta"]
reloaded = LlamaForCausalLM.from_pretrained("out").eval()(text).logits
loss, jump = (quantised - before).abs().max().item(), (reloaded - quantised).abs().max().item()
in_memory = model.config.rope_parameters["rope_theta"]
print(f"RoPE's base: in memory {in_memory:g}, in config.json {written:g}")
print(f"logits: quantising changed them by {loss:.1g}, reloading changes them by {jump:.1g}")
if (in_memory, written) != (100.0, 10000.0) or jump < 5 * loss:
    sys.exit("changed: config.json is written otherwise than stated")
PY
