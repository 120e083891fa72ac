#!/usr/bin/env bash
# torchao 0.18.0: loading GPT-2 with an int8 config quantises nothing, and the model says that it is quantised.
#
# Versions: torchao 0.18.0, transformers 5.24.0, torch 2.13.0
# Expected: from_pretrained(..., quantization_config=TorchAoConfig(Int8WeightOnlyConfig())) stores GPT-2's matrices in
#           8 bits, as it does for Llama, or says that it cannot.
# Seen:     GPT-2's matrices are in transformers' Conv1D, which is no nn.Linear; all are passed by. No warning,
#           model.is_quantized is True and the config carries the quantisation:
#             Llama: 14 tensors in int8, is_quantized True
#             GPT-2:  0 tensors in int8, is_quantized True
# Matters:  a table "int8 costs GPT-2 no perplexity at all" is easily measured so. Count the quantised tensors.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==2.4.0 numpy==2.4.6 accelerate==1.15.0 torchao==0.18.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

"$env/bin/python" - <<'PY'
import sys
import warnings

from torch.nn import Parameter
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, TorchAoConfig

seen, told = {}, []
configs = {
    "Llama": LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
    "GPT-2": GPT2Config(
        vocab_size=97, n_embd=64, n_head=4, n_layer=2, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
}
for name, config in configs.items():
    AutoModelForCausalLM.from_config(config).save_pretrained(name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = AutoModelForCausalLM.from_pretrained(
            name, quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
        )
    told += [str(w.message) for w in caught if "Conv1D" in str(w.message) or "not quantized" in str(w.message)]
    count = sum(type(p) is not Parameter for p in loaded.parameters())
    seen[name] = count, loaded.is_quantized
    print(f"{name}: {count} tensors in int8, is_quantized {loaded.is_quantized}")
if seen != {"Llama": (14, True), "GPT-2": (0, True)} or told:
    sys.exit("changed: torchao treats GPT-2 otherwise than stated")
PY
