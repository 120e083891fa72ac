"""What people look at beside the numbers: which words got worse, and what both models write.

Dimensions: n windows, L positions, N scored tokens.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qectomy.eval.loading import load_model
from qectomy.eval.protocol import ScoringWindows
from qectomy.eval.token_scores import TokenScores
from qectomy.record.reduced import Generation, TokenLoss, TokenSample, Writing
from qectomy.text.text import load_tokenizer

SAMPLE_TOKENS = 256  # shown, from the start of one window
NEW_TOKENS = 40
MOST_BYTES = 1_000_000_000  # of weights that are loaded whole to write a few words
PROMPTS = (
    "In the beginning",
    "The most important thing to know about a computer is that",
    "Question: Why does bread rise in the oven?\nAnswer:",
)
CHAT_PROMPTS = (  # as a user's message, where the tokenizer has a chat template
    "Why does bread rise in the oven?",
    "What is the most important thing to know about a computer?",
    "Tell me the beginning of a fairy tale.",
)
TEMPLATE_SECONDS = 10.0  # for a template, which is a program that came with the folder


def token_sample(folder: Path, windows: ScoringWindows, before: TokenScores, after: TokenScores) -> TokenSample:
    """Return the tokens of the window that got worse most like the average one, and both models' loss of each, in nats.

    So that it is neither the best nor the worst that is shown. `folder`: of the tokenizer. It is to be looked at:
    what goes wrong in it must not undo a conversion, and is told in `skipped`.
    """
    try:
        return _token_sample(folder, windows, before, after)
    except Exception as error:
        return TokenSample(text=windows.report.text, skipped=f"{type(error).__name__}: {str(error)[:200]}")


def _token_sample(folder: Path, windows: ScoringWindows, before: TokenScores, after: TokenScores) -> TokenSample:
    within, positions = windows.places()
    change = torch.zeros(len(windows.tokens), dtype=torch.float64).index_add_(0, within, after.nll - before.nll)
    count = torch.zeros(len(windows.tokens), dtype=torch.float64).index_add_(0, within, torch.ones_like(before.nll))
    typical = (change / count.clamp(min=1) - float((after.nll - before.nll).mean())).abs()
    window = int(typical.masked_fill(count == 0, torch.inf).argmin())
    here = (within == window) & (positions < SAMPLE_TOKENS)
    losses = {
        int(at): (float(one), float(other))
        for at, one, other in zip(positions[here], before.nll[here], after.nll[here], strict=True)
    }
    pieces = _pieces(
        load_tokenizer(folder), windows.tokens[window, : min(windows.length(window), SAMPLE_TOKENS)].tolist()
    )
    tokens = []
    for at, piece in enumerate(pieces):
        one, other = losses.get(at, (None, None))
        tokens.append(TokenLoss(text=piece, before=one, after=other))
    return TokenSample(text=windows.report.text, window=window, tokens=tokens)


def _pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Return what each token adds to the text; a character of several tokens comes with the last."""
    pieces, done = [], ""
    for stop in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False)
        text = text if not text.endswith("\ufffd") or stop == len(ids) else done
        pieces.append(text[len(done) :])
        done = text
    return pieces


def generation_of(original: Path, reduced: Path, most_bytes: int | None = MOST_BYTES) -> Generation:
    """Return what both models write after each prompt, the most likely token each time, one in memory at a time.

    Models larger than `most_bytes` are left out, and so is what cannot be run: this is to be looked at, not relied on.
    """
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (original, reduced)]
    if most_bytes is not None and max(sizes) > most_bytes:
        return Generation(
            skipped=f"over {most_bytes / 1e9:.0f} GB of weights; run `qectomy report DIR --original ORIGINAL`"
        )
    try:
        tokenizer = load_tokenizer(reduced)
        prompts, ids, how = _prompts(tokenizer)
        texts = []
        for folder in (original, reduced):
            model, _, _ = load_model(str(folder), None, "cpu")
            texts.append([write(model, tokenizer, each, ends_turn=prompts is CHAT_PROMPTS) for each in ids])
            del model
    except Exception as error:  # a tokenizer or a config may be one that generates nothing
        return Generation(skipped=f"the models did not write ({type(error).__name__}: {str(error).strip()[:200]})")
    samples = [
        Writing(prompt=prompt, original=ours, reduced=theirs)
        for prompt, ours, theirs in zip(prompts, *texts, strict=True)
    ]
    return Generation(max_new_tokens=NEW_TOKENS, decoding="greedy", prompt_format=how, samples=samples)


def _prompts(tokenizer: Any) -> tuple[tuple[str, ...], list[torch.Tensor], str | None]:
    """Return the prompts, their tokens (1, L), and what a report says of how one became the other; None: as it is.

    A model that was taught to chat gets messages, in its own template; if that fails, it continues texts as others do.
    """
    plain = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
    if not getattr(tokenizer, "chat_template", None):
        return PROMPTS, plain, None
    try:
        with _time_limit(TEMPLATE_SECONDS):
            messages = [[{"role": "user", "content": prompt}] for prompt in CHAT_PROMPTS]
            options: dict[str, Any] = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
            ids = [tokenizer.apply_chat_template(message, **options)["input_ids"] for message in messages]
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).strip()[:200]}"
        return PROMPTS, plain, f"plain text, since the tokenizer's chat template failed ({why})"
    return CHAT_PROMPTS, ids, "a user's message in the tokenizer's chat template"


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in what takes longer, where the system has such an alarm and this is the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(number: int, frame: Any) -> None:
        raise TimeoutError(f"it took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompt: torch.Tensor, ends_turn: bool = False) -> str:
    """Return the continuation of a prompt (1, L), without it; with `ends_turn` the tokenizer's own end ends it, too."""
    from transformers import GenerationConfig

    ids = prompt.to(next(model.parameters()).device)
    ends = model.config.eos_token_id
    if ends_turn and tokenizer.eos_token_id is not None:
        ends = [tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])]
    most = getattr(model.config, "max_position_embeddings", None) or ids.shape[1] + NEW_TOKENS
    model.generation_config = GenerationConfig(  # the folder's own may ask for penalties, beams or sampling
        max_new_tokens=max(1, min(NEW_TOKENS, most - ids.shape[1])),
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0,
    )
    written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
