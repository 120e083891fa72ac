"""Token perplexity and bits per byte of a whole checkpoint, original or reduced, by one recorded protocol."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qectomy.calibrate.settings import CONTEXT
from qectomy.calibrate.text import Source, adds_bos, first_tokens, load_tokenizer
from qectomy.errors import CheckpointError, NonFiniteError, QectomyError, TextError
from qectomy.eval.scores import Logits, TokenScores, join_scores, score_tokens
from qectomy.surgery.architectures import FAMILIES
from qectomy.surgery.checkpoint import locate
from qectomy.surgery.finite import all_finite
from qectomy.surgery.headers import TORCH_NAMES, read_json

Progress = Callable[[int, int], None]  # (windows done, windows in all)
TOKENS_A_BATCH = 4096
PIECE = 24  # tokens decoded together when their bytes are counted
DTYPES = [TORCH_NAMES[kind] for kind in ("F32", "BF16", "F16", "F64")]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How text becomes scored tokens. Two perplexities compare only under equal protocols."""

    context: int = CONTEXT
    stride: int | None = None  # None: context, windows do not overlap
    tokens: int | None = None  # read only the first tokens of the text; None: all of it


@dataclass(frozen=True)
class ScoringWindows:
    """Overlapping or adjacent windows and where in each the scored tokens begin."""

    tokens: torch.Tensor  # (n, context)
    first_scored: torch.Tensor  # (n,) position of the first token that counts in each window
    n_bytes: int  # UTF-8 bytes of the scored tokens
    report: dict[str, Any]

    def scored_mask(self) -> torch.Tensor:
        """(n, context - 1): True where the next token, at position t + 1, is scored."""
        positions = torch.arange(1, self.tokens.shape[1])
        return positions[None, :] >= self.first_scored[:, None]


def scoring_windows(tokenizer: Any, source: Source, protocol: Protocol, vocab_size: int) -> ScoringWindows:
    """Cut a text into the windows of a protocol. Raises TextError when it is shorter than one window."""
    context, stride = protocol.context, protocol.stride or protocol.context
    if not 0 < stride <= context:
        raise TextError(f"--stride {stride} must lie between 1 and the context, {context}")
    bos = adds_bos(tokenizer)
    width = context - bos
    step = min(stride, width)
    ids = torch.tensor(first_tokens(tokenizer, source, protocol.tokens), dtype=torch.int64)
    if protocol.tokens is not None and protocol.tokens < width:
        raise TextError(
            f"{protocol.tokens} evaluation tokens are fewer than one window of {width}; ask for more of them"
        )
    if len(ids) < width or width < 2:
        raise TextError(
            f"{source.name} has {len(ids)} tokens, fewer than one window of {width}; give more text or a smaller "
            "--context"
        )
    if int(ids.max()) >= vocab_size:
        raise CheckpointError(
            f"the tokenizer makes token id {int(ids.max())}, but the model's embedding has {vocab_size} rows"
        )
    windows = ids.unfold(0, width, step).clone()
    first = torch.full((windows.shape[0],), width - step)
    first[0] = 0
    if bos:
        windows = torch.cat([torch.full((windows.shape[0], 1), tokenizer.bos_token_id), windows], dim=1)
        first += 1
    first.clamp_(min=1)  # the first position of a window has nothing before it
    starts = [index * step for index in range(windows.shape[0])]
    scored = [(start + int(skip) - bos, start + width) for start, skip in zip(starts, first, strict=True)]
    n_bytes = _scored_bytes(tokenizer, ids.tolist(), scored)
    report = {
        "text": source.name,
        "text_sha256": source.sha256,
        "tokenizer": type(tokenizer).__name__,
        "context": context,
        "stride": step,
        "bos": "every window starts with BOS" if bos else "none",
        "windows": windows.shape[0],
        "tokens": (windows.shape[0] - 1) * step + width,
        "scored_tokens": sum(stop - start for start, stop in scored),
        "scored_bytes": n_bytes,
        "tail": "tokens after the last whole window are left out",
    }
    return ScoringWindows(windows, first, n_bytes, report)


def _scored_bytes(tokenizer: Any, ids: list[int], spans: list[tuple[int, int]]) -> int:
    """Return the UTF-8 bytes of the text that the tokens in `spans` stand for.

    Each token counts what it adds to the decoded text before it, so that a character of several tokens, or one cut
    by a window's edge, is counted once. Long texts are decoded in pieces that begin at a whole character.
    """
    ends = [0]
    piece: list[int] = []
    done = 0
    for token in ids:
        piece.append(token)
        text = tokenizer.decode(piece, clean_up_tokenization_spaces=False)
        whole = not text.endswith("\ufffd")
        ends.append(done + len(text.encode()) if whole else ends[-1])
        if whole and len(piece) >= PIECE:
            piece = [token]  # kept, as some tokenizers drop the space before a text's first token
            done = ends[-1] - len(tokenizer.decode(piece, clean_up_tokenization_spaces=False).encode())
    return sum(ends[stop] - ends[start] for start, stop in spans)


def summarize(scores: TokenScores, n_bytes: int) -> dict[str, float]:
    """Return perplexity, nats a token and bits a byte, and mean KL and top-1 agreement where there are any."""
    nll = float(scores.nll.mean())
    bits = float(scores.nll.sum()) / float(torch.log(torch.tensor(2.0, dtype=torch.float64)))
    result = {
        "perplexity": float(scores.nll.mean().exp()),
        "nll": nll,
        "bits_per_byte": bits / max(1, n_bytes),
    }
    if scores.kl is not None and scores.agree is not None:
        result["kl"] = float(scores.kl.mean())
        result["top1_agreement"] = float(scores.agree.mean())
    return result


def load_model(name: str, dtype: str | None, device: str) -> tuple[Any, Path, str]:
    """Load any causal model; return (model, folder, dtype name). On device `meta` its weights stay on disk.

    Code in the folder is never run. Raises CheckpointError when a tensor is missing or left over.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if dtype is not None and dtype not in DTYPES:
        raise QectomyError(f"unknown --dtype {dtype!r}; known: {', '.join(DTYPES)}")
    folder = locate(name)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'}: not a JSON object")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            output_loading_info=True,
            trust_remote_code=False,
            use_safetensors=True,
            device_map="meta" if device == "meta" else None,
        )
    except Exception as error:  # transformers raises many kinds; the message is what the user needs
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{folder} (model_type {config.get('model_type')!r}) cannot be loaded: {reason}"
        ) from error
    family = FAMILIES.get(str(config.get("model_type")))
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(name) for name in info.get(kind) or ()]
        if kind == "unexpected_keys" and family is not None:
            names = [name for name in names if not name.endswith(family.ignored_suffixes)]
        if names:
            raise CheckpointError(f"{folder}: {kind.replace('_', ' ')}: {sorted(names)[:3]}")
    return model.to(device).eval(), folder, str(model.dtype).removeprefix("torch.")


@torch.no_grad()
def score_model(
    model: Any,
    windows: ScoringWindows,
    progress: Progress | None = None,
    reference: Any | None = None,
    label: str = "the model",
) -> TokenScores:
    """Score every window with a loaded model; log-softmax in float32. Raises NonFiniteError naming the window."""
    device = next(model.parameters()).device
    mask = windows.scored_mask()
    size = max(1, TOKENS_A_BATCH // windows.tokens.shape[1])
    vocab = model.config.vocab_size
    logits_of = logits_reader(model, windows.tokens[:1, :16].to(device))
    reference_of = None if reference is None else logits_reader(reference, windows.tokens[:1, :16].to(device))
    parts: list[TokenScores] = []
    for start in range(0, windows.tokens.shape[0], size):
        tokens = windows.tokens[start : start + size].to(device)
        keep = mask[start : start + size].to(device)
        theirs = None if reference_of is None else reference_of(tokens, keep)
        parts.append(score_tokens(logits_of(tokens, keep), tokens[:, 1:][keep], vocab, theirs))
        kl = parts[-1].kl
        if not all_finite(parts[-1].nll) or (kl is not None and not all_finite(kl)):
            raise NonFiniteError(f"{label} gives NaN or Inf in windows {start} to {start + len(tokens) - 1}")
        if progress:
            progress(min(start + size, len(windows.tokens)), len(windows.tokens))
    return join_scores(parts)


def logits_reader(model: Any, probe: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], Logits]:
    """Return a function from (tokens, kept positions) to the logits that predict the kept next tokens.

    A head that is one matrix is multiplied slice by slice; one that does more (a bias, scaling, a cap on the
    logits: seen by trying it on the probe tokens) is run whole.
    """
    head = model.get_output_embeddings()
    with torch.no_grad():
        whole = model(input_ids=probe, use_cache=False).logits
        sliced = nn.functional.linear(model.base_model(input_ids=probe, use_cache=False).last_hidden_state, head.weight)
    plain = whole.shape == sliced.shape and torch.allclose(whole, sliced, rtol=1e-3, atol=1e-3)

    def read(tokens: torch.Tensor, keep: torch.Tensor) -> Logits:
        if not plain:
            logits = model(input_ids=tokens, use_cache=False).logits[:, :-1][keep]
            return lambda start, stop: logits[:, start:stop]
        hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1][keep]
        return lambda start, stop: nn.functional.linear(hidden, head.weight[start:stop])

    return read


def common_context(names: list[str]) -> int:
    """Return 512, or the number of positions that each of these checkpoints was made for, if that is less."""
    found = [CONTEXT]
    for name in names:
        config = read_json(locate(name) / "config.json")
        fields = config if isinstance(config, dict) else {}
        said = [fields.get(field) for field in ("max_position_embeddings", "n_positions")]
        found += [positions for positions in said if isinstance(positions, int) and positions > 1]
    return min(found)


def check_positions(name: str, config: Any, context: int) -> None:
    """Raise TextError if a model with a table of positions, not RoPE, has fewer than a window's."""
    rows = getattr(config, "max_position_embeddings", None)
    if getattr(config, "rope_parameters", None) is None and isinstance(rows, int) and context > rows:
        raise TextError(f"--context {context} is longer than the {rows} positions of {name}; use {rows} or less")


def evaluate(
    name: str,
    source: Source,
    protocol: Protocol,
    *,
    dtype: str | None = None,
    device: str = "cpu",
    reference: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return perplexity, bits per byte and the protocol of one checkpoint on one text.

    With `reference`, also mean KL(reference || checkpoint) in nats a token and top-1 agreement.
    """
    model, folder, dtype_name = load_model(name, dtype, device)
    check_positions(name, model.config, protocol.context)
    windows = scoring_windows(load_tokenizer(folder), source, protocol, model.config.vocab_size)
    other = None
    if reference is not None:
        other, other_folder, _ = load_model(reference, dtype, device)
        check_positions(reference, other.config, protocol.context)
        theirs = scoring_windows(load_tokenizer(other_folder), source, protocol, other.config.vocab_size)
        if not torch.equal(theirs.tokens, windows.tokens) or other.config.vocab_size != model.config.vocab_size:
            raise CheckpointError(
                f"{reference} and {name} have different tokenizers, so their predictions cannot be compared token by "
                "token; evaluate both without --reference and compare bits per byte"
            )
    scores = score_model(model, windows, progress, other, name)
    result = {"checkpoint": name, **summarize(scores, windows.n_bytes)}
    if reference is not None:
        result["reference"] = reference
    return {**result, "protocol": {**windows.report, "dtype": dtype_name}}
