"""Reduced models in vLLM: its own class where nothing but identity blocks differs from stock, else on its backend.

Such a model (`exact`) decodes as fast as the original; vLLM's Transformers backend costs the sample Llama a tenth.
The backend rebuilds a model of transformers: it exchanges linear layers, norms and embeddings for its own, shards them,
and hands attention over to its kernels. What is left to do here: write the identity blocks of `exact` out while the
weights stream in, so that the model is built as the stock one is; refuse ways of sharding that would compute something
else; and take nothing for loaded that was not in the folder. Checked with vLLM 0.32.
"""

import copy
from functools import cached_property
from typing import Any

from vllm.model_executor.models.registry import ModelRegistry  # type: ignore[import-not-found]
from vllm.model_executor.models.transformers import TransformersForCausalLM as Backend  # type: ignore[import-not-found]

from qectomy.serving.dense_stream import Tensors, dense_config, dense_tensors, family_of, own_tensors, stock_config


class TransformersForCausalLM(Backend):
    """A reduced model in vLLM, which knows by this class's name that it is one of transformers."""

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
        stored = current_config(vllm_config.model_config.hf_config)
        config = stock_config(stored)
        if config is None:
            return super().__new__(cls)
        model_class = ModelRegistry.models[config.architectures[0]].load_model_cls()

        class WrittenOut(model_class):  # type: ignore[misc, valid-type]
            def load_weights(self, weights: Tensors) -> set[str]:
                loaded: set[str] = super().load_weights(dense_tensors(weights, stored))
                return loaded

        WrittenOut.__name__ = model_class.__name__
        return WrittenOut(vllm_config=with_config(vllm_config, config), prefix=prefix)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        stored = current_config(vllm_config.model_config.hf_config)
        check_sharding(stored, vllm_config.parallel_config.tensor_parallel_size)
        super().__init__(vllm_config=with_config(vllm_config, dense_config(stored)), prefix=prefix)
        self.stored_config = stored

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        # With --trust-remote-code, transformers would build the model from the folder's code, which may be older.
        return {**super()._from_config_kwargs, "trust_remote_code": False}

    def load_weights(self, weights: Tensors) -> set[str]:
        """Load a checkpoint's tensors; return their names.

        Raises ValueError naming what a query map lacks, and for channel numbers that are not the checkpoint's: vLLM
        compiles the model, so that its first pass checks nothing.
        """
        loaded: set[str] = super().load_weights(dense_tensors(weights, self.stored_config))
        if missing := sorted(set(own_tensors(self)) - loaded):
            raise ValueError(
                f"the checkpoint lacks {', '.join(missing[:3])}{' and others' * (len(missing) > 3)}, of which the "
                "queries are made: it is damaged, or its config.json is another model's"
            )
        self.model.check_indices()
        return loaded


def current_config(config: Any) -> Any:
    """Return the config as the installed package's class, whichever code of the folder read it."""
    ours = family_of(config).config_class(reduced=True)
    return config if isinstance(config, ours) else ours.from_dict(config.to_dict())


def check_sharding(config: Any, n_ranks: int) -> None:
    """Raise ValueError where a process of tensor parallelism would not hold whole heads beside their own keys."""
    if n_ranks == 1:
        return
    if config.model_type == "qectomy_gpt2":
        raise ValueError(
            f"tensor_parallel_size {n_ranks}: a reduced GPT-2 is not sharded, as queries, keys and values lie in one "
            "tensor; serve it with --tensor-parallel-size 1"
        )
    if config.num_key_value_heads % n_ranks:
        raise ValueError(
            f"tensor_parallel_size {n_ranks} does not divide the {config.num_key_value_heads} key-value heads, and a "
            "query map needs the keys of its own heads in the same process; choose one that does"
        )


def with_config(vllm_config: Any, config: Any) -> Any:
    """Return vLLM's settings with this config of the model; the given ones, from which it may build again, stay."""
    model_config = copy.copy(vllm_config.model_config)
    model_config.hf_config = model_config.hf_text_config = config
    changed = copy.copy(vllm_config)
    changed.model_config = model_config
    return changed
