#!/usr/bin/env bash
# CTranslate2 4.8.5: converting GPT-2 ignores layer_norm_epsilon and both fields that scale its attention.
#
# Versions: ctranslate2 4.8.5, transformers 5.24.0, torch 2.13.0
# Expected: a field of GPT2Config that changes the function is converted (activation_function is) or refused.
# Seen:     three are ignored without a word: the converted model computes what the *default* would. Largest difference
#           of log-probabilities between engine and transformers, and between the engine and its own default:
#             default                                     5e-6
#             activation_function="relu"                  3e-6
#             layer_norm_epsilon=0.5                      5, to the default 0
#             scale_attn_weights=False                    4, to the default 0
#             scale_attn_by_inverse_layer_idx=True        2, to the default 0
# Matters:  checkpoints with these fields exist, and they load, convert and generate. Whoever edits one should fold the
#           scales into the query weights, and compare log-probabilities after converting.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==2.4.0 numpy==2.4.6 ctranslate2==4.8.5
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

"$env/bin/python" - <<'PY'
import sys

import ctranslate2
import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

END = "<|endoftext|>"
words = [f"w{i}" for i in range(97)] + [END]
text = torch.randint(0, 97, (1, 40), generator=torch.Generator().manual_seed(1))


def log_probabilities(name, fields):
    """Of the engine and of transformers; the weights are the same for all fields."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=98, n_embd=32, n_head=4, n_layer=3, n_positions=64, initializer_range=0.3, bos_token_id=97,
        eos_token_id=97, **fields,
    )
    model = GPT2LMHeadModel(config).eval()
    model.save_pretrained(name)
    vocabulary = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=END)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(vocabulary), unk_token=END, bos_token=END, eos_token=END
    ).save_pretrained(name)
    ctranslate2.converters.TransformersConverter(name).convert(f"{name}-converted")
    engine = ctranslate2.Generator(f"{name}-converted", intra_threads=1)
    scores = engine.forward_batch([[words[i] for i in text[0]]], return_log_probs=True)
    return torch.tensor(np.array(scores)), model(text).logits.log_softmax(-1).detach()


default, reference = log_probabilities("default", {})
changed = (default - reference).abs().max() > 1e-3
print(f"default: engine and transformers differ by {(default - reference).abs().max():.1g}")
cases = {
    "relu": {"activation_function": "relu"},
    "epsilon": {"layer_norm_epsilon": 0.5},
    "unscaled": {"scale_attn_weights": False},
    "by-layer": {"scale_attn_by_inverse_layer_idx": True},
}
for name, fields in cases.items():
    engine, reference = log_probabilities(name, fields)
    off, same = (engine - reference).abs().max().item(), torch.equal(engine, default)
    print(f"{fields}: differ by {off:.1g}; engine gives what the default gives: {same}")
    changed |= (off > 0.5, same) != ((False, False) if name == "relu" else (True, True))
if changed:
    sys.exit("changed: CTranslate2 reads GPT-2's config otherwise than stated")
PY
