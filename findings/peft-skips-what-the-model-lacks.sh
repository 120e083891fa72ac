#!/usr/bin/env bash
# PEFT 0.21.0: PeftModel.from_pretrained drops an adapter's weights for modules that the model lacks, without a word.
#
# Versions: peft 0.21.0, transformers 5.24.0, torch 2.13.0
# Expected: loading a LoRA for [q_proj, v_proj] on a model without q_proj raises, or at least warns: half the adapter
#           cannot be applied. The other way round it does warn (an adapter that lacks keys of the model).
# Seen:     it loads. Nothing is printed about the weights of q_proj; the adapter's config still lists q_proj:
#             adapter file: 8 tensors, 4 of them for q_proj; on the model: 4 tensors; warnings about it: 0
#           model.load_adapter(...) of the PeftModel is as quiet, but *returns* unexpected_keys; from_pretrained
#           drops that result.
# Matters:  an adapter trained before a checkpoint was edited (projections fused, renamed or removed) goes on "working"
#           with a part of what it learnt. Load with load_adapter and look at unexpected_keys, or merge before editing.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==2.4.0 numpy==2.4.6 accelerate==1.15.0 peft==0.21.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

"$env/bin/python" - <<'PY'
import copy
import sys
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class Queries(nn.Module):
    """The same projection as q_proj under another name and type."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x):
        return x @ self.weight.T


config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config)
edited = copy.deepcopy(model)
for layer in edited.model.layers:
    queries = Queries(layer.self_attn.q_proj.weight)
    del layer.self_attn.q_proj
    layer.self_attn.queries = queries
get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)).save_pretrained("lora")
stored = load_file("lora/adapter_model.safetensors")
of_queries = sum("q_proj" in name for name in stored)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    adapted = PeftModel.from_pretrained(edited, "lora")
told = [str(w.message) for w in caught if "q_proj" in str(w.message) or "unexpected" in str(w.message).lower()]
applied = sum("lora_" in name for name, _ in adapted.named_parameters())
returned = adapted.load_adapter("lora", "again").unexpected_keys
print(f"adapter file: {len(stored)} tensors, {of_queries} of them for q_proj; on the model: {applied} tensors")
print(f"warnings about it: {len(told)}; load_adapter returns {len(returned)} unexpected keys")
if (len(stored), of_queries, applied, len(told), len(returned)) != (8, 4, 4, 0, 4):
    sys.exit("changed: an adapter for modules that the model lacks loads otherwise than stated")
PY
