"""Readers of a checkpoint folder: headers, index, config, recipe, --query, what is copied along."""

import hashlib
import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from cases import SECRET, Case, Folder, Hole, Link, Reader, files_of, odd_file
from mutations import STRINGS, Dice, Raw, hostile, json_text, mutated, mutated_bytes

from qectomy.checkpoint.checkpoint import Checkpoint, open_checkpoint
from qectomy.checkpoint.config_files import CARRIED, copy_companions, load_config, reduced_config, stock_config
from qectomy.checkpoint.headers import INDEX, SINGLE
from qectomy.checkpoint.sizes import totals
from qectomy.errors import QectomyError
from qectomy.models.query_maps import parse_exact, parse_recipe
from qectomy.surgery.materialize import dense_layer

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "X", "")


class Grounds:
    """Sound folders, as cases, from which hostile ones are made."""

    def __init__(self, **folders: Path):
        self._folders = folders
        self.files = {name: files_of(folder) for name, folder in folders.items()}

    def config(self, name: str) -> dict[str, Any]:
        return json.loads(self.files[name]["config.json"])

    @cache  # noqa: B019 (as long-lived as the process)
    def opened(self, name: str) -> Checkpoint:
        return open_checkpoint(self._folders[name])


def header_reader(grounds: Grounds) -> Reader:
    """A safetensors file: its header, and the tensors read by it."""
    config, data = (grounds.files["llama"][name] for name in ("config.json", SINGLE))
    length = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]

    def make(dice: Dice) -> Case:
        kind = dice.randrange(12)
        if kind == 0:
            return {"config.json": config, SINGLE: odd_file(dice)}
        if kind < 3:
            return {"config.json": config, SINGLE: mutated_bytes(dice, data)}
        text = json_text(dice, _header_damage(dice, header) if kind < 10 else mutated(dice, header))
        lies = (0, 1, 7, len(text) - 1, len(text) + 1, 10**8, 2**40, 2**63, 2**64 - 1)
        told = len(text) if dice.randrange(12) else dice.choice(lies)
        rest = body if dice.randrange(6) else dice.choice((b"", body[:-1], body + b"\0", body[4:], body * 2))
        return {"config.json": config, SINGLE: (told % 2**64).to_bytes(8, "little") + text + rest}

    return Reader("safetensors header", make, read_whole, lambda raw: {"config.json": config, SINGLE: raw})


def _header_damage(dice: Dice, header: dict[str, Any]) -> dict[str, Any]:
    """A header with offsets, shapes, dtypes or names that do not fit."""
    found = {name: json.loads(json.dumps(entry)) for name, entry in header.items()}
    names = [name for name in found if name != "__metadata__"]
    for _ in range(1 + dice.randrange(2)):
        one, other = dice.choice(names), dice.choice(names)
        entry, kind = found[one], dice.randrange(9)
        if kind == 0:
            entry["data_offsets"] = list(found[other]["data_offsets"])
        elif kind == 1:
            entry["data_offsets"][dice.randrange(2)] += dice.choice((-4, -1, 1, 4, 2**31, 2**63, 2**64, -(2**40)))
        elif kind == 2:
            entry["data_offsets"] = entry["data_offsets"][::-1]
        elif kind == 3:
            entry["shape"] = dice.choice(([2**32, 2**32], [0], [], [-1], [2**63], [1] * 500, [0, 2**64], [32.0, 32]))
        elif kind == 4:
            entry["dtype"] = dice.choice(DTYPES)
        elif kind == 5:
            found[one], found[other] = found[other], found[one]
        elif kind == 6:
            found[dice.choice((*STRINGS, f"{one}.x", "model.layers.0.self_attn.q_norm.weight"))] = entry
        elif kind == 7:
            entry[dice.choice(("shape", "dtype", "data_offsets", "extra"))] = hostile(dice)
        else:
            found["__metadata__"] = dice.choice((None, {"format": 3}, {"a": "b" * 9000}, [], {"format": "pt"}))
    return found


def read_whole(folder: Path) -> None:
    """Open a checkpoint and read every tensor in each way; all must agree with a plain reading of the file."""
    checkpoint = open_checkpoint(folder)
    headers = {file: plain_header(folder / file) for file in checkpoint.files}
    for name, info in checkpoint.tensors.items():
        start, header = headers[info.file]
        begin, end = header[info.stored_name]["data_offsets"]
        with (folder / info.file).open("rb") as file:
            file.seek(start + begin)
            stored = file.read(end - begin)
        assert info.nbytes == end - begin == len(stored), f"{name} has other bytes than its shape calls for"
        assert checkpoint.digest(name) == hashlib.sha256(stored).hexdigest()
        rows = checkpoint.read_rows(name, 0, info.shape[0])
        assert torch.equal(rows, checkpoint.read(name))
        assert rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes() == stored


def plain_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a file begin, and its header; no two tensors may share a byte."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    spans = sorted(entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    assert all(before[1] <= after[0] for before, after in pairwise(spans)), "tensors overlap"
    assert spans[-1][1] + 8 + length <= path.stat().st_size
    return 8 + length, header


def index_reader(grounds: Grounds) -> Reader:
    """An index of shards, and what stands in the shards' places."""
    files = {name: data for name, data in grounds.files["sharded"].items() if "token" not in name}
    index = json.loads(files[INDEX])
    shards = [name for name in files if name.endswith(".safetensors")]

    def make(dice: Dice) -> Case:
        case: Case = dict(files)
        kind = dice.randrange(10)
        if kind < 3:
            case[dice.choice(shards)] = odd_file(dice)
        elif kind == 3:
            case[INDEX] = odd_file(dice)
        elif kind == 4:
            one, other = dice.choice(shards), dice.choice(shards)
            case[one], case[other] = case[other], case[one] if dice.randrange(2) else files[other]
        elif kind < 8:
            found = {**index, "weight_map": dict(index["weight_map"])}
            name = dice.choice(list(found["weight_map"]))
            elsewhere = ("../model.safetensors", "OUTSIDE/model.safetensors", "./" + shards[0], "a/../" + shards[0])
            more = ("..safetensors", ".safetensors", "\0.safetensors", "\ud800.safetensors", "~/x.safetensors")
            more = (*elsewhere, *more, "x" * 300 + ".safetensors", "C:\\x.safetensors", "\x1b[2J.safetensors", *shards)
            found["weight_map"][dice.choice((name, "more"))] = dice.choice((*more, *STRINGS, hostile(dice)))
            case[INDEX] = json_text(dice, found)
        else:
            case[INDEX] = json_text(dice, mutated(dice, index))
        return case

    return Reader("index", make, read_whole, lambda raw: {**files, INDEX: raw})


def config_reader(grounds: Grounds) -> Reader:
    """config.json of an original, up to the model's modules and the config of what it would become."""
    names = ("llama", "gpt2", "mistral", "yarn")

    def make(dice: Dice) -> Case:
        name = dice.choice(names)
        config, weights = grounds.config(name), grounds.files[name][SINGLE]
        if dice.randrange(25) == 0:
            return {"config.json": odd_file(dice), SINGLE: weights}
        if dice.randrange(3) == 0:
            layers = dice.choice(("num_hidden_layers", "n_layer"))
            config[layers] = dice.choice((10**6, 10**7, 2**31 - 1, 2**63, 10_000, Raw("1e7"), "2", 1, 3))
        elif dice.randrange(3) == 0:
            extra = ("n_layer", "num_hidden_layers", "n_head", "num_attention_heads", "head_dim", "sliding_window")
            config[dice.choice((*extra, "n_embd", "rope_scaling", "quantization_config", "auto_map"))] = hostile(dice)
        return {"config.json": json_text(dice, mutated(dice, config)), SINGLE: weights}

    llama = grounds.files["llama"][SINGLE]
    return Reader("config.json", make, read_config, lambda raw: {"config.json": raw, SINGLE: llama})


def read_config(folder: Path) -> None:
    """Read the config of an original as inspect and convert do."""
    checkpoint = open_checkpoint(folder)
    config = load_config(checkpoint.family, checkpoint.config)
    with torch.device("meta"):
        layer = checkpoint.family.stock_layer(config, 0)
    own = checkpoint.family.layer_shapes(checkpoint.dims, checkpoint.recipe[0])
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == own
    recipe = tuple(parse_recipe("select", checkpoint.dims))
    json.dumps(reduced_config(checkpoint, recipe, checkpoint.dtype), indent=2, sort_keys=True)
    totals(checkpoint, recipe)


def recipe_reader(grounds: Grounds) -> Reader:
    """config.json of a reduced checkpoint: its maps, and what materialize makes of them."""

    def make(dice: Dice) -> Case:
        name = dice.choice(("reduced", "reduced_gpt2", "exact"))
        config = grounds.config(name)
        if dice.randrange(4):
            field = dice.choice(("query_maps", "value_maps", "output_maps"))
            names = list(config.get(field) or ["dense"] * len(config["query_maps"]))
            maps = ("identity", "select", "key-shared", "low-rank:3", "low-rank:9999999", "dense", "gauge", "merged")
            for _ in range(1 + dice.randrange(3)):
                change = dice.choice(
                    (*maps, "exact", "low-rank:0", "select:3", "low-rank:" + "9" * 5000, hostile(dice))
                )
                names[dice.randrange(len(names))] = change
            names = names if dice.randrange(8) else dice.choice((names[1:], names * 3000, names[0], []))
            config[field] = names
        else:
            config = mutated(dice, config)
        return {"config.json": json_text(dice, config), SINGLE: grounds.files[name][SINGLE]}

    weights = grounds.files["reduced"][SINGLE]
    return Reader("stored recipe", make, read_recipe, lambda raw: {"config.json": raw, SINGLE: weights})


def read_recipe(folder: Path) -> None:
    """Read a reduced checkpoint and write every W_Q back."""
    checkpoint = open_checkpoint(folder, reduced=True)
    config = load_config(checkpoint.family, checkpoint.config, reduced=True)
    json.dumps(stock_config(checkpoint, checkpoint.dtype), indent=2, sort_keys=True)
    for layer in range(checkpoint.dims.n_layers if checkpoint.dims.stock else 0):
        dense = dense_layer(checkpoint, config, layer, checkpoint.read_layer(layer))
        own = checkpoint.family.layer_shapes(checkpoint.dims, open_dense(checkpoint))
        assert {name: tuple(tensor.shape) for name, tensor in dense.items()} == own


def open_dense(checkpoint: Checkpoint) -> Any:
    """The maps of a layer that nothing was taken out of."""
    return type(checkpoint.recipe[0])("dense")


def query_reader(grounds: Grounds) -> Reader:
    """The text given as --query."""
    parts = ("identity", "select", "key-shared", "low-rank:", "low-rank:3", "dense", "exact", "=", ",", "-", "0", "1")
    parts = (*parts, "0-1", "1-", "-0", "3", "99999", "999999999", " ", ":", "\0", "é", "\x1b[m", "x" * 2000, "²", "0=")

    def make(dice: Dice) -> Case:
        if dice.randrange(4):
            text = "".join(dice.choice(parts) for _ in range(dice.randrange(12)))
        else:
            text = mutated_bytes(dice, b"0=dense,1-=key-shared").decode(errors="replace")
        return {"query": text.encode()}

    def read(folder: Path) -> None:
        dims, text = grounds.opened("llama").dims, (folder / "query").read_bytes().decode(errors="replace")
        kept = parse_exact(text, dims)
        if kept is not None:
            assert kept <= set(range(dims.n_layers))
        else:
            assert len(parse_recipe(text, dims)) == dims.n_layers

    return Reader("query option", make, read, lambda raw: {"query": raw})


def companion_reader(grounds: Grounds) -> Reader:
    """What is copied along: no byte of a file outside the folder may come."""
    names = (
        "tokenizer.json",
        "tokenizer_config.json",
        "LICENSE",
        "generation_config.json",
        "chat_template.jinja",
        "a.model",
    )

    def make(dice: Dice) -> Case:
        case: Case = {f"source/{name}": b"own" for name in names}
        for _ in range(1 + dice.randrange(3)):
            name = dice.choice((*names, "tokenizer.py", "tokenizer.pkl", "NOTICE-\n\x1b[2J", "vocab.json"))
            link = Link(dice.choice(("LICENSE", "../blobs/a", "../../secret", "OUTSIDE/secret", "/etc/passwd", name)))
            case[f"source/{name}"] = dice.choice((odd_file(dice), link, Hole(3 * 10**8), Folder()))
        return {**case, "blobs/a": b"a blob", "out": Folder()}

    def read(folder: Path) -> None:
        copy_companions(folder / "source", folder / "out", CARRIED)
        copied = files_of(folder / "out").values()
        assert all(data != SECRET and b"root:" not in data for data in copied), "a private file was copied"
        assert not [path for path in (folder / "out").iterdir() if path.suffix in (".py", ".pkl")]

    return Reader("files copied along", make, read)


def refused_or_none(read: Any, *arguments: Any) -> Any:
    """What a reader returns; None where it refuses."""
    try:
        return read(*arguments)
    except QectomyError:
        return None
