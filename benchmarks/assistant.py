"""Let a reduced checkpoint draft what its original writes: how many drafted tokens the original accepts.

Greedy decoding, one prompt at a time, by transformers' `assistant_model`: the reduced model drafts a few tokens, the
original checks all of them in one pass and keeps those that it would have written. The text must be the one that the
original writes alone. On models this small nothing is won in time: a draft costs as much as what it saves.

    python benchmarks/assistant.py samples/llama REDUCED... --text samples/kjv_heldout.txt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from qectomy.errors import QectomyError
from qectomy.eval.loading import load_model
from qectomy.text.text import load_tokenizer, read_source
from qectomy.text.windows import make_windows


@dataclass
class Drafts:
    """What one assistant drafted: tokens, those of them that were accepted, and the passes that checked them."""

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    written: int = 0
    same_texts: int = 0


@contextmanager
def counted(drafts: Drafts) -> Iterator[None]:
    """Count what transformers drafts and accepts while the block runs."""
    get, update = AssistedCandidateGenerator.get_candidates, AssistedCandidateGenerator.update_candidate_strategy

    def get_candidates(self: Any, input_ids: torch.Tensor, **options: Any) -> Any:
        found = get(self, input_ids, **options)
        drafts.drafted += found[0].shape[1] - input_ids.shape[1]
        return found

    def update_candidate_strategy(self: Any, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> Any:
        drafts.accepted += int(num_matches)
        drafts.passes += 1
        return update(self, input_ids, scores, num_matches)

    with (
        patch.object(AssistedCandidateGenerator, "get_candidates", get_candidates),
        patch.object(AssistedCandidateGenerator, "update_candidate_strategy", update_candidate_strategy),
    ):
        yield


def greedy(model: Any, prompt: torch.Tensor, new_tokens: int, assistant: Any = None) -> torch.Tensor:
    """Return what a model writes after a prompt (1, T), as ids."""
    extra = {} if assistant is None else {"assistant_model": assistant}
    options = dict(max_new_tokens=new_tokens, do_sample=False, attention_mask=torch.ones_like(prompt), **extra)
    return model.generate(prompt, **options)[0, prompt.shape[1] :]


def measure(original: Any, name: str, prompts: list[torch.Tensor], alone: list[torch.Tensor], draft: int) -> Drafts:
    """Let the checkpoint `name` draft `draft` tokens at a time for each prompt."""
    assistant, drafts = load_model(name, "float32", "cpu")[0], Drafts()
    config = assistant.generation_config
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = draft, "constant"
    config.assistant_confidence_threshold = 0.0  # never fewer, however unsure it is
    with counted(drafts):
        for prompt, expected in zip(prompts, alone, strict=True):
            found = greedy(original, prompt, len(expected), assistant)
            drafts.written += len(found)
            drafts.same_texts += torch.equal(found, expected)
    return drafts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original")
    parser.add_argument("reduced", nargs="+")
    parser.add_argument("--text", required=True, help="file whose beginnings of windows are the prompts")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--draft", type=int, default=5, help="tokens that are drafted for one pass of the original")
    options = parser.parse_args()

    model, folder, _ = load_model(options.original, "float32", "cpu")
    window = options.prompt_tokens + options.new_tokens
    windows = make_windows(
        load_tokenizer(folder),
        [read_source(options.text)],
        context=window,
        tokens=options.prompts * window,
        vocab_size=model.config.vocab_size,
    )
    prompts = [row[None, : options.prompt_tokens] for row in windows.tokens]
    alone = [greedy(model, prompt, options.new_tokens) for prompt in prompts]
    rows = []
    for name in options.reduced:
        found = measure(model, name, prompts, alone, options.draft)
        share, per_pass = found.accepted / found.drafted, found.written / found.passes
        rows.append(f"| {name} | {share:.3f} | {per_pass:.2f} | {found.same_texts} of {len(prompts)} |")
        print(f"{name}: {found}", file=sys.stderr)
    print(
        f"{options.original}: {len(prompts)} prompts, {options.new_tokens} tokens each, {options.draft} drafted at once"
    )
    print("\n| assistant | drafted tokens accepted | tokens a pass of the original | texts as without it |")
    print("|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    try:
        main()
    except QectomyError as error:
        sys.exit(f"error: {error}")
