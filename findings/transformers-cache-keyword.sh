#!/usr/bin/env bash
# transformers 5.24 hands layers the cache as `cache=`: an attention written for 5.23 loses it in silence.
#
# Versions: transformers 5.23.0 and 5.24.0, torch 2.13.0
# Expected: a subclass of LlamaAttention that takes `past_key_values` (the keyword in 5.23) and `**kwargs`, as the
#           library's own layers did, goes on working or raises.
# Seen:     in 5.24 the cache arrives as `cache=`, falls into **kwargs, and `past_key_values` keeps its default None.
#           One pass over a text is right, so perplexity is too; generation with a cache is wrong: from the second
#           new token on, each token sees only itself. No error, no warning.
#             5.23.0: one pass as before; 16 of 16 tokens with a cache equal those without
#             5.24.0: one pass as before;  1 of 16 tokens with a cache equal those without
# Matters:  a modelling file that travels with a checkpoint pins no version. Whoever checks an edited model by one pass
#           (loss, logits, log-likelihoods) sees nothing; compare some cached steps with the uncached pass as well.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==2.4.0 numpy==2.4.6
"$env/bin/pip" install -qq --no-compile --no-deps --target older transformers==5.23.0
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

cat > probe.py <<'PY'
import sys

import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention


class PlainAttention(LlamaAttention):
    """Attention without rotary positions; its signature is the one that 5.23 calls."""

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        batch, length, _ = hidden_states.shape
        q, k, v = (
            project(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, -1)), None


torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)
model = LlamaForCausalLM(config).eval()
for layer in model.model.layers:
    layer.self_attn.__class__ = PlainAttention
prompt = torch.randint(1, 97, (1, 12))
cached, plain = (
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False, use_cache=use)
    for use in (True, False)
)
same = int((cached == plain)[0, 12:].sum())
whole = model(plain, use_cache=False).logits.argmax(-1)[0, 11:-1]  # one pass foretells what was generated
one_pass = bool((whole == plain[0, 12:]).all())
print(f"transformers {transformers.__version__}: one pass right: {one_pass}, cached tokens right: {same} of 16")
older = transformers.__version__ == "5.23.0"
if not one_pass or (same == 16) != older:
    sys.exit("changed: the cache reaches a forward that takes past_key_values otherwise than stated")
PY
PYTHONPATH=older "$env/bin/python" probe.py
"$env/bin/python" probe.py
