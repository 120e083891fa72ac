"""Open a checkpoint of the hub by its config and the headers of its weights alone, without fetching the weights.

huggingface_hub asks for the first bytes of each safetensors file (a range request), so that a table made of headers
costs megabytes of traffic at most, whatever the model's size.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

from qectomy.checkpoint.checkpoint import ADAPTER, Checkpoint, assemble, open_checkpoint, read_config_json
from qectomy.checkpoint.headers import INDEX, SINGLE, TensorInfo, read_index
from qectomy.errors import CheckpointError, QectomyError, note, reason_of

HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"


def open_headers(name: str) -> tuple[Checkpoint, bool]:
    """Return an original checkpoint, and whether its weights are here to be read.

    A folder, and what the hub's cache holds where the hub cannot be reached, is opened as `open_checkpoint` does. Of a
    hub's id only config.json, an index and headers are fetched. Raises what `open_checkpoint` does.
    """
    if Path(name).exists() or not re.fullmatch(HUB_ID, name):
        return open_checkpoint(name), True
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        files = set(api.list_repo_files(name))
    except Exception:  # the hub raises a dozen kinds; what the cache holds may do, and says so if it does not
        return open_checkpoint(name), True
    try:
        folder = _fetch(api, name, sorted(files & {"config.json", ADAPTER, INDEX}))
        config = read_config_json(folder)
        opened = assemble(name, folder, config, partial(_headers, api, name, folder, files), lambda one, other: True)
    except QectomyError:
        raise
    except Exception as error:
        raise CheckpointError(f"the hub did not give the headers of {name!r}: {reason_of(error)}") from error
    for told in opened.notes:
        note(told)
    note(f"{name}: config and headers were fetched, no weights: what a probe of this machine would tell is left out")
    return opened, False


def _fetch(api: Any, name: str, files: list[str]) -> Path:
    """Bring small files into the hub's cache; return the folder that they are in."""
    folders = [Path(api.hf_hub_download(name, file)).parent for file in files]
    if not folders:
        raise CheckpointError(f"{name} on the hub holds no config.json; it is not a checkpoint")
    return folders[0]


def _headers(api: Any, name: str, folder: Path, files: set[str]) -> dict[str, TensorInfo]:
    """Return every tensor of the weights that transformers reads, by the name it is stored under."""
    if SINGLE in files:
        places: dict[str, str] = {}
        names = [SINGLE]
    elif INDEX in files:
        places = read_index(folder / INDEX)
        names = sorted(set(places.values()))
    else:
        there = ", ".join(sorted(file for file in files if file.endswith(".safetensors"))[:5]) or "none"
        raise CheckpointError(
            f"{name} on the hub holds no {SINGLE} and no {INDEX}, which transformers reads (safetensors files there: "
            f"{there})"
        )
    found: dict[str, TensorInfo] = {}
    for file in names:
        if file not in files:
            raise CheckpointError(f"{INDEX} of {name} names {file}, which is not there, so the model is not whole")
        for stored, tensor in api.parse_safetensors_file_metadata(name, file).tensors.items():
            if stored in found:
                raise CheckpointError(f"tensor {stored} stands in both {found[stored].file} and {file}")
            at = {"start": tensor.data_offsets[0], "indexed": places.get(stored, "")}
            found[stored] = TensorInfo(file, tuple(tensor.shape), tensor.dtype, stored, **at)
    return found
