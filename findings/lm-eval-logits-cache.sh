#!/usr/bin/env bash
# lm-eval 0.4.13: the same text split at two places scores wrongly when both requests are in one run.
#
# Versions: lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0
# Expected: log P("d" | "a b c") and log P("c d" | "a b") do not depend on which other requests are there.
# Seen:     HFLM's logits_cache (on by default) groups requests whose tokens without the last are equal, computes one
#           forward and scores all of the group with logits cut for the one it ran. Continuations of other lengths are
#           scored at the wrong positions, with no error:
#             request           alone      together   together, logits_cache=False
#             "a b c" + " d"    -6.1573    -6.1654    -6.1573
#             "a b" + " c d"   -11.8713   -11.6058   -11.8713
#             "a" + " b c d"   -16.9667   -16.9667   -16.9667
# Matters:  a task that scores a text's tail at several lengths (or two tasks over one text, in one run) reports wrong
#           numbers for original and edited model alike, and the error need not cancel. Pass logits_cache=False.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
env=${FINDINGS_ENV:-$work/env} # name a folder to keep the installed packages for scripts with the same pins
[ -d "$env" ] || "${PYTHON:-python3.11}" -m venv "$env"
"$env/bin/pip" install -qq --no-compile torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 safetensors==0.8.0 \
    huggingface-hub==2.4.0 numpy==2.4.6 accelerate==1.15.0 datasets==5.2.0 lm-eval==0.4.13
export HF_HUB_OFFLINE=1 HF_HOME="$work/home" OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=""

"$env/bin/python" - <<'PY'
import logging
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logging.disable(logging.WARNING)
END = "</s>"
letters = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(26)} | {END: 26}, unk_token=END))
letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=END, pad_token=END, unk_token=END)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=27, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.3, bos_token_id=None, eos_token_id=26,
)
model = LlamaForCausalLM(config).eval()
requests = [("a b c", " d"), ("a b", " c d"), ("a", " b c d")]


def score(some, **options):
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=32, **options)
    instances = [Instance("loglikelihood", {}, request, i) for i, request in enumerate(some)]
    return [value for value, _ in lm.loglikelihood(instances, disable_tqdm=True)]


def by_hand(context, continuation):
    tokens = tokenizer(context + continuation, return_tensors="pt").input_ids
    ahead = model(tokens).logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])
    return ahead[-len(continuation.split()) :].sum().item()


def equal(some, others):
    return [abs(a - b) < 1e-3 for a, b in zip(some, others)]


right = [by_hand(*request) for request in requests]
alone = [score([request])[0] for request in requests]
together, uncached = score(requests), score(requests, logits_cache=False)
for row in zip(requests, right, alone, together, uncached):
    print("{}: by hand {:.4f}, alone {:.4f}, together {:.4f}, together without cache {:.4f}".format(*row))
if not all(equal(alone, right) + equal(uncached, right)) or all(equal(together, right)):
    sys.exit("changed: requests over one text are scored otherwise than stated")
PY
