"""What each layer stores now and stored before, by the config and the headers of a reduced checkpoint."""

from dataclasses import dataclass
from math import prod
from pathlib import Path

from qectomy.checkpoint.checkpoint import expected_layer, open_checkpoint
from qectomy.errors import QectomyError
from qectomy.models.query_maps import QueryMapSpec


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """Numbers stored by one layer: its W_Q or what stands in its place, and everything else."""

    index: int
    query_before: int
    query_after: int
    rest_before: int
    rest_after: int
    bytes_after: int


def stored_layers(folder: Path) -> list[LayerSizes]:
    """Return the sizes of each layer that a reduced checkpoint stores; nothing where its weights cannot be read.

    The report says all else without them: a page is made of a folder whose weights lie elsewhere too.
    """
    try:
        checkpoint = open_checkpoint(folder, reduced=True)
    except (QectomyError, OSError):
        return []
    dims, family, dense = checkpoint.dims, checkpoint.family, QueryMapSpec("dense")
    before = sum(prod(shape) for shape in expected_layer(family, dims, dense).values())
    query_before = dense.parameters(dims)
    sizes = []
    for index, spec in enumerate(checkpoint.recipe[: dims.n_stored]):
        held = [info for _, info in checkpoint.layer_tensors(index)]
        query_after = spec.parameters(dims)
        sizes.append(
            LayerSizes(
                index=index,
                query_before=query_before,
                query_after=query_after,
                rest_before=before - query_before,
                rest_after=sum(info.numel for info in held) - query_after,
                bytes_after=sum(info.nbytes for info in held),
            )
        )
    return sizes
