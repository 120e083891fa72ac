"""Text that the original model writes itself, so that healing and calibration need no corpus.

Half of the sequences begin with the tokenizer's BOS token, where it has one, the others with a token drawn at random
from its vocabulary (as in LLM-QAT, arXiv 2305.17888), and go on with samples at temperature 1, past any end-of-text
token. They lie in a cache, one JSON line each, beside a record of where they come from:

    $XDG_CACHE_HOME/qectomy/self-generated/KEY/text.jsonl, provenance.json

KEY hashes the model's files and the settings of the sampling. Every batch has a seed of its own, so a text that was
interrupted, or is too short for a later run, is continued.
"""

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from qectomy.checkpoint.checkpoint import Checkpoint, sha256
from qectomy.healing.devices import multiplies_bfloat16
from qectomy.healing.settings import GENERATED, VALIDATION
from qectomy.models.family import Dimensions
from qectomy.progress import Progress
from qectomy.record.base import made
from qectomy.runs.records import read_record, write_json
from qectomy.text.text import load_tokenizer

BATCH = {"cpu": 32, "cuda": 256}  # sequences sampled side by side, at most ...
CACHE_BYTES = 8_000_000_000  # ... and so that their keys and values take no more


def cache_folder() -> Path:
    """Where generated texts lie: in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qectomy" / "self-generated"


def tokens_to_write(tokens: int | None, most: int = GENERATED, validation: int = VALIDATION) -> int:
    """Return how many tokens to write for healing on `tokens`, `most` at most, and validating beside."""
    return min(most, tokens or most) + validation


def sampling_dtype(device: str) -> str:
    """The type that a model writes in: bfloat16 where the device is made for it."""
    return "bfloat16" if multiplies_bfloat16(device) else "float32"


def self_generated_text(
    original: Checkpoint,
    hashes: dict[str, str],
    model: Any,
    *,
    tokens: int,
    length: int,
    seed: int,
    progress: Progress | None = None,
) -> Path:
    """Return a .jsonl file of at least `tokens` tokens that `model`, the original, wrote in sequences of `length`.

    `hashes` are those of the original's files, by which the text is found again.
    """
    device = model.device.type
    batch = _batch(original.dims, device, length, model.dtype.itemsize)
    sampling = {
        "model": hashes,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device,
        "length": length,
        "temperature": 1.0,
        "batch": batch,
        "seed": seed,
    }
    folder = cache_folder() / hashlib.sha256(json.dumps(sampling, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # another run may want the same text
        return _written(folder, original, model, sampling, tokens, progress)


def _batch(dims: Dimensions, device: str, length: int, itemsize: int) -> int:
    """Return how many sequences are sampled side by side."""
    a_sequence = 2 * dims.n_layers * dims.n_kv_heads * dims.d_head * length * itemsize
    return max(1, min(BATCH.get(device, 32), CACHE_BYTES // a_sequence))


def _written(
    folder: Path, original: Checkpoint, model: Any, sampling: dict[str, Any], tokens: int, progress: Progress | None
) -> Path:
    """Return the text in a folder, once it is long enough."""
    batch, length, seed = sampling["batch"], sampling["length"], sampling["seed"]
    path, wanted = folder / "text.jsonl", -(-tokens // (batch * length))
    tokenizer = load_tokenizer(original.folder)
    done = _whole_batches(path, batch)
    with path.open("ab") as file:
        for number in range(done, wanted):
            texts = _sample(model, tokenizer, batch, length, seed, number)
            file.write("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
            file.flush()
            os.fsync(file.fileno())
            if progress:
                progress(number + 1, wanted, f"{(number + 1) * batch * length:,} tokens written by the original")
    count = max(wanted, done) * batch
    if wanted > done or not _records(folder / "provenance.json", count):
        record = {
            **made(shlex.join(["qectomy", *sys.argv[1:]])),
            "name": original.name,
            **sampling,
            "sequences": count,
            "tokens": count * length,
        }
        write_json(folder / "provenance.json", record | {"sha256": sha256(path)})
    return path


def _records(path: Path, sequences: int) -> bool:
    """Whether the record is of so many sequences: a process killed before it wrote it leaves that of a shorter text."""
    return path.is_file() and read_record(path).get("sequences") == sequences


def _whole_batches(path: Path, batch: int) -> int:
    """Return how many batches a file holds whole; cut off what a killed process left of the next one."""
    if not path.is_file():
        return 0
    lines, end, at = 0, 0, 0
    with path.open("r+b") as file:
        for line in file:
            at += len(line)
            lines += line.endswith(b"\n")
            if lines and lines % batch == 0 and line.endswith(b"\n"):
                end = at
        file.truncate(end)
    return lines // batch


@contextmanager
def _own_sampling_left_out(model: Any) -> Iterator[None]:
    """Let a model sample from its distribution as it is, past the end of a text: its own defaults would fill in."""
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig(
        temperature=1.0, top_p=1.0, top_k=0, repetition_penalty=1.0, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    try:
        yield
    finally:
        model.generation_config = kept


@torch.no_grad()
def _sample(model: Any, tokenizer: Any, batch: int, length: int, seed: int, number: int) -> list[str]:
    """Return one batch of sampled sequences as text; the caller's random state is left as it is."""
    device = model.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed((seed << 20) + number)
        special = set(tokenizer.all_special_ids)
        ordinary = torch.tensor([i for i in range(min(len(tokenizer), model.config.vocab_size)) if i not in special])
        start = ordinary[torch.randint(len(ordinary), (batch, 1))]
        if tokenizer.bos_token_id is not None:
            start[::2] = tokenizer.bos_token_id
        start = start.to(device)
        with _own_sampling_left_out(model):
            ids = model.generate(
                start, attention_mask=torch.ones_like(start), max_new_tokens=length - 1, do_sample=True
            )
    assert ids.shape == (batch, length)
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
