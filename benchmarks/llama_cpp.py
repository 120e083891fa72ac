"""llama.cpp as a measuring device: write a stock folder as GGUF, quantise it, score token windows with it.

llama.cpp comes with the package `cyllama`, which is no dependency of Qectomy: `quantized.py` says how to get it. No
tokenizer goes into the file; windows of tokens are scored as they are, by the same protocol as `qectomy eval`'s.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.models.linear_views import oriented, read_view

FILE_TYPES = {"Q8_0": 7, "Q4_K_M": 15, "Q4_0": 2}  # LLAMA_FTYPE_MOSTLY_*
NORMS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm"}


def write_gguf(folder: Path, out: Path) -> None:
    """Write a stock GPT-2, Llama or Mistral folder in float32, as llama.cpp's own converter lays it out."""
    source = open_checkpoint(str(folder))
    is_gpt2 = source.family.model_type == "gpt2"
    writer = gguf.GGUFWriter(out, "gpt2" if is_gpt2 else "llama")
    _add_sizes(writer, source)
    (_add_gpt2_norms if is_gpt2 else _add_llama_rope)(writer, source)
    for name, tensor in _tensors(source, is_gpt2):
        writer.add_tensor(name, np.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: gguf.GGUFWriter, source: Checkpoint) -> None:
    dims = source.dims
    writer.add_block_count(dims.n_layers)
    writer.add_context_length(dims.n_positions)
    writer.add_embedding_length(dims.d_model)
    writer.add_feed_forward_length(dims.d_mlp)
    writer.add_head_count(dims.n_heads)
    writer.add_head_count_kv(dims.n_kv_heads)
    writer.add_vocab_size(dims.vocab_size)
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


def _add_gpt2_norms(writer: gguf.GGUFWriter, source: Checkpoint) -> None:
    writer.add_layer_norm_eps(source.config.get("layer_norm_epsilon", 1e-5))


def _add_llama_rope(writer: gguf.GGUFWriter, source: Checkpoint) -> None:
    rope = source.config.get("rope_parameters") or {"rope_theta": source.config.get("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"only plain RoPE is written as GGUF here, not {rope['rope_type']}")
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(source.dims.d_head)
    writer.add_key_length(source.dims.d_head)
    writer.add_value_length(source.dims.d_head)
    writer.add_layer_norm_rms_eps(source.config.get("rms_norm_eps", 1e-6))


def _tensors(source: Checkpoint, is_gpt2: bool) -> Any:
    """Yield (GGUF's name, tensor); matrices are (out, in)."""
    family, dims, roles = source.family, source.dims, source.family.roles
    yield "token_embd.weight", source.read(family.embedding)
    if family.positions is not None:
        yield "position_embd.weight", source.read(family.positions)
    for name, tensor in source.read_module(family.final_norm).items():
        yield f"output_norm.{name}", tensor
    if not dims.tied:
        yield "output.weight", source.read(family.head)
    names = {"query": "attn_q", "key": "attn_k", "value": "attn_v", "output": "attn_output", "mlp_out": "ffn_down"}
    readers = ("ffn_up",) if is_gpt2 else ("ffn_gate", "ffn_up")
    for layer in range(dims.n_layers):
        tensors, prefix = source.read_layer(layer), f"blk.{layer}."
        views = {name: getattr(roles, role) for role, name in names.items()} | dict(
            zip(readers, roles.mlp_readers, strict=True)
        )
        if is_gpt2:  # fused in both
            for name in ("attn_q", "attn_k", "attn_v"):
                del views[name]
            yield f"{prefix}attn_qkv.weight", oriented(tensors["attn.c_attn.weight"], roles.query).T
            yield f"{prefix}attn_qkv.bias", tensors["attn.c_attn.bias"]
        for name, view in views.items():
            W, bias = read_view(tensors, view)
            n_turned = {"attn_q": dims.n_heads, "attn_k": dims.n_kv_heads}.get(name)
            yield f"{prefix}{name}.weight", _in_pairs(W.T, n_turned)
            if bias is not None:
                yield f"{prefix}{name}.bias", _in_pairs(bias, n_turned)
        for role, name in NORMS.items():
            for part in ("weight", "bias"):
                if (key := f"{getattr(roles, role)}.{part}") in tensors:
                    yield f"{prefix}{name}.{part}", tensors[key]


def _in_pairs(rows: torch.Tensor, n_heads: int | None) -> torch.Tensor:
    """Return the rows of heads that RoPE turns with channels i and i + K/2 side by side, as this architecture does."""
    if n_heads is None:
        return rows
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def quantise(source: Path, out: Path, kind: str) -> None:
    from cyllama.llama import llama_cpp

    llama_cpp.disable_logging()
    params = llama_cpp.LlamaModelQuantizeParams()
    params.ftype, params.nthread = FILE_TYPES[kind], 1
    llama_cpp.model_quantize(str(source), str(out), params)


class LlamaCpp:
    """A GGUF file as llama.cpp runs it on the processor, one window at a time."""

    def __init__(self, path: Path, context: int, n_vocab: int):
        from cyllama.llama import llama_cpp

        llama_cpp.disable_logging()
        self._llama_cpp = llama_cpp
        model_params, params = llama_cpp.LlamaModelParams(), llama_cpp.LlamaContextParams()
        model_params.n_gpu_layers = 0
        params.n_ctx = params.n_batch = params.n_ubatch = context
        params.n_threads = params.n_threads_batch = 1

        class Model(llama_cpp.LlamaModel):  # get_logits_ith of cyllama 0.2.18 asks for what its class lacks
            pass

        Model.n_vocab = n_vocab
        self._model = Model(str(path), model_params, verbose=False)
        self._context = llama_cpp.LlamaContext(self._model, params, verbose=False)

    def logits(self, window: list[int]) -> torch.Tensor:
        """Return the logits (T, V) after each token of a window (T)."""
        batch = self._llama_cpp.LlamaBatch(n_tokens=len(window), embd=0, n_seq_max=1)
        for position, token in enumerate(window):
            batch.add(token, position, [0], True)
        self._context.kv_cache_clear()
        self._context.decode(batch)
        return torch.tensor(np.array([self._context.get_logits_ith(i) for i in range(len(window))], dtype=np.float32))


def perplexity(logits: Any, windows: torch.Tensor) -> float:
    """Return exp of the mean loss of each window's tokens but the first; `logits` is window -> (T, V)."""
    total = 0.0
    for window in windows:
        scores = logits(window.tolist())[:-1].double().log_softmax(-1)
        total -= scores.gather(1, window[1:, None]).sum().item()
    return math.exp(total / (windows.numel() - len(windows)))
