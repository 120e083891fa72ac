"""Tiny checkpoints with every parameter scrambled, and a tiny tokenizer, saved as folders.

Hugging Face initialises gains to 1 and biases to 0, which hides a lost gain or bias; here nothing is at its
default. Weights are large enough for peaked attention, so that a wrong query shows in the logits.
"""

import copy
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qectomy.checkpoint.checkpoint import expected_tensors, open_checkpoint
from qectomy.checkpoint.config_files import (
    copy_companions,
    copy_model_code,
    load_config,
    reduced_config,
    write_reduced_config,
)
from qectomy.checkpoint.shards import MAX_SHARD_BYTES, ShardWriter, TensorSpec
from qectomy.models.architectures import FAMILIES
from qectomy.models.linear_views import read_view, store_views
from qectomy.models.query_maps import parse_query_map

VOCAB_SIZE = 320
RAVEN = """Once upon a midnight dreary, while I pondered, weak and weary,
Over many a quaint and curious volume of forgotten lore,
While I nodded, nearly napping, suddenly there came a tapping,
As of some one gently rapping, rapping at my chamber door.
"'Tis some visitor," I muttered, "tapping at my chamber door;
Only this, and nothing more."

Ah, distinctly I remember, it was in the bleak December,
And each separate dying ember wrought its ghost upon the floor.
Eagerly I wished the morrow; vainly I had sought to borrow
From my books surcease of sorrow, sorrow for the lost Lenore,
For the rare and radiant maiden whom the angels name Lenore,
Nameless here forevermore.
"""  # Edgar Allan Poe, 1845

BASE: dict[str, Any] = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)

GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}

# Arguments beyond BASE; `model_type`, `dtype`, `max_shard_size` where not Llama, float32, one file.
LLAMA_SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},  # grouped-query, untied, no biases
    "mha": dict(num_key_value_heads=4),
    "mqa": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "attention-bias": dict(attention_bias=True, tie_word_embeddings=True),
    "mlp-bias": dict(mlp_bias=True),
    "wide-heads": dict(head_dim=12),
    "narrow-heads": dict(head_dim=6, attention_bias=True),
    "bf16": dict(dtype="bfloat16"),
    "fp16": dict(dtype="float16"),
    "sharded": dict(max_shard_size="12KB"),
    "mistral": dict(model_type="mistral", sliding_window=5),
    "qwen2": dict(model_type="qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen2-full": dict(model_type="qwen2", tie_word_embeddings=True),
    "mistral-full": dict(model_type="mistral", sliding_window=None, tie_word_embeddings=True),
}

ROPES: dict[str, dict[str, Any]] = {
    "default": dict(rope_type="default", rope_theta=500.0),
    "linear": dict(rope_type="linear", rope_theta=500.0, factor=3.0),
    "dynamic": dict(rope_type="dynamic", rope_theta=500.0, factor=2.0),
    "yarn": dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=32),
    "longrope": dict(
        rope_type="longrope",
        rope_theta=500.0,
        short_factor=[1.0, 1.2, 1.4, 1.6],
        long_factor=[2.0, 3.0, 4.0, 5.0],
        original_max_position_embeddings=32,
        factor=4.0,
    ),
    "llama3": dict(
        rope_type="llama3",
        rope_theta=500.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
    ),
    "proportional": dict(rope_type="proportional", rope_theta=500.0, partial_rotary_factor=0.5),
}
if "proportional" not in ROPE_INIT_FUNCTIONS:  # transformers 5.4 does not know it
    del ROPES["proportional"]
LLAMA_SHAPES |= {f"rope-{name}": dict(rope_parameters=parameters) for name, parameters in ROPES.items()}

GPT2_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": dict(model_type="gpt2"),  # tied, a d_mlp that is not 4 d_model
    "gpt2-untied": dict(model_type="gpt2", tie_word_embeddings=False, intermediate_size=None),
    "gpt2-inverse": dict(model_type="gpt2", scale_attn_by_inverse_layer_idx=True, activation_function="relu"),
    "gpt2-unscaled": dict(model_type="gpt2", scale_attn_weights=False, reorder_and_upcast_attn=True),
    "gpt2-one-head": dict(model_type="gpt2", num_attention_heads=1),
    "gpt2-bf16": dict(model_type="gpt2", dtype="bfloat16"),
    "gpt2-sharded": dict(model_type="gpt2", max_shard_size="12KB"),
}
SHAPES = {**LLAMA_SHAPES, **GPT2_SHAPES}

EVERY_MAP = ("identity", "select", "key-shared", "low-rank:3", "dense")


def resolve(name: str = "llama", **overrides: Any) -> tuple[str, str, str | None, dict[str, Any]]:
    """Return (model_type, dtype, max_shard_size, config arguments) of a named shape with overrides."""
    options = {**BASE, **SHAPES[name], **overrides}
    model_type = options.pop("model_type", "llama")
    if model_type == "gpt2":
        del options["num_key_value_heads"]
        options["n_inner"] = options.pop("intermediate_size")
        for theirs, own in GPT2_NAMES.items():
            options[own] = options.pop(theirs)
    return model_type, options.pop("dtype", "float32"), options.pop("max_shard_size", None), options


def scramble(model: torch.nn.Module, seed: str) -> None:
    """Give every parameter random values: matrices of gain near 1.5, gains and biases away from 1 and 0."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                value = (
                    0.4 * noise
                    if name.endswith("bias")
                    else 0.7 + 0.6 * torch.rand(parameter.shape, generator=generator)
                )
            else:
                value = 1.5 * noise * parameter.shape[-1] ** -0.5
            parameter.copy_(value)


def tiny_model(name: str = "llama", **overrides: Any) -> torch.nn.Module:
    """A stock model in float32 on the CPU, every parameter scrambled, the same for the same arguments."""
    model_type, _, _, options = resolve(name, **overrides)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "gpt2": (GPT2Config, GPT2LMHeadModel),
    }[model_type]
    model = model_class(config_class(**options))
    scramble(model, repr((model_type, sorted(options.items(), key=repr))))
    return model.eval()


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCAB_SIZE tokens, which encodes any text without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(RAVEN.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )


def bos_tokenizer() -> PreTrainedTokenizerFast:
    """The same tokenizer, but one that starts every text with BOS, as Llama's does."""
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def save_tiny(folder: Path, name: str = "llama", **overrides: Any) -> Path:
    """Save a scrambled stock checkpoint with its tokenizer; return the folder."""
    _, dtype, max_shard_size, _ = resolve(name, **overrides)
    model = tiny_model(name, **overrides).to(getattr(torch, dtype))
    model.save_pretrained(folder, **({"max_shard_size": max_shard_size} if max_shard_size else {}))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def variant_model(family: str, **fields: Any) -> torch.nn.Module:
    """A model of the family's reduced class in float32, every parameter scrambled; `fields` beside BASE's, by any name.

    Without `query_maps` all its projections are whole: what norms, skips or sharing leave is all that is not stock.
    """
    named = {**SHAPES[family], **fields}
    named.pop("model_type", None)
    ours = FAMILIES[family].causal_class(reduced=True)
    _, _, _, options = resolve(model_type=family, **named)
    model = ours(FAMILIES[family].config_class(reduced=True)(**options))
    scramble(model, repr((family, sorted(fields.items(), key=repr))))
    return model.eval()


def save_variant(folder: Path, family: str, dtype: str = "float64", **fields: Any) -> Path:
    """Save a scrambled model of the family's reduced class with its tokenizer; return the folder."""
    variant_model(family, **fields).to(getattr(torch, dtype)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_query(spec: Any, dims: Any, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return random tensors for one layer's query map, by the names it stores them under."""
    tensors = {}
    for name, (kind, shape) in spec.stored(dims).items():
        if kind == "index":
            tensors[name] = torch.randint(dims.d_model, shape, generator=generator, dtype=torch.int32)
        else:
            spread = 1.0 if len(shape) == 1 else 1.5 * shape[-1] ** -0.5
            tensors[name] = spread * torch.randn(shape, generator=generator)
    return tensors


def save_reduced(
    folder: Path,
    source: Path,
    recipe: tuple[str, ...],
    *,
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write a reduced checkpoint: the source's weights, with random query maps in place of W_Q."""
    checkpoint = open_checkpoint(source)
    family, dims = checkpoint.family, checkpoint.dims
    specs = tuple(parse_query_map(name) for name in recipe)
    assert len(specs) == dims.n_layers, f"{len(specs)} query maps for {dims.n_layers} layers"
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for layer, spec in enumerate(specs):
        prefix, roles = family.prefix(layer), family.roles
        if spec.name != "dense":
            parts = []
            for stock, reduced in ((roles.key, roles.reduced_key), (roles.value, roles.reduced_value)):
                W, bias = read_view(checkpoint.read_layer(layer), stock)
                parts.append((reduced, (W, None if family.folds_kv_bias else bias)))
            tensors |= {prefix + name: tensor for name, tensor in store_views(parts).items()}
        for name, tensor in random_query(spec, dims, generator).items():
            tensors[f"{prefix}{roles.query_map}.{name}"] = tensor
    plan = {
        name: TensorSpec(shape, checkpoint.dtype if tensors[name].is_floating_point() else "I32")
        for name, shape in expected_tensors(family, dims, specs).items()
    }
    folder.mkdir(parents=True)
    with ShardWriter(folder, plan, max_shard_bytes) as writer:
        for name in plan:
            writer.write(name, tensors[name])
        writer.finish()
    write_reduced_config(folder, reduced_config(checkpoint, specs, checkpoint.dtype))
    copy_companions(source, folder)
    copy_model_code(family, folder)
    return folder


def load_reduced(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Return the shipped class with a reduced folder's weights, loaded without from_pretrained, strictly."""
    checkpoint = open_checkpoint(folder, reduced=True)
    family = checkpoint.family
    config = load_config(family, checkpoint.config, reduced=True)
    model = family.causal_class(reduced=True)(config)
    for parameter in model.parameters():  # RoPE's frequencies stay float32, as from_pretrained leaves them
        parameter.data = parameter.data.to(dtype)
    state = {name: checkpoint.read(name) for name in checkpoint.tensors}
    for layer in range(checkpoint.dims.n_layers):  # layers that share their weights are stored once
        state |= {family.prefix(layer) + name: tensor for name, tensor in checkpoint.read_layer(layer).items()}
    if checkpoint.dims.tied:
        state[family.head] = state[family.embedding]
    model.load_state_dict(state, strict=True)
    return model.eval()


def tokens(batch: int = 2, length: int = 17, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Return random token ids, (B, T), none of them special."""
    return torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
