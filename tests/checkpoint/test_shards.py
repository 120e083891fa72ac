"""Files written piece by piece hold what safetensors itself reads back, wherever a piece came from."""

import errno
import json
import os
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qectomy.checkpoint.shards import DTYPES, ShardWriter, TensorSpec, layout, plan_shards, write_all


@st.composite
def plans(draw):
    """{name: (shape, type)} in the order in which a pass would write them."""
    names = draw(st.lists(st.text("abc._é\"'\\ ", min_size=1, max_size=12), min_size=1, max_size=8, unique=True))
    shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
    return {name: (draw(shapes), draw(st.sampled_from(sorted(DTYPES)))) for name in names}


def planned(drawn):
    # Not inside the strategy: beartype samples annotated tuples with the random module.
    return {name: TensorSpec(shape, dtype) for name, (shape, dtype) in drawn.items()}


def random_tensor(spec, generator):
    if DTYPES[spec.dtype].is_floating_point:
        return torch.randn(spec.shape, generator=generator, dtype=torch.float64).to(DTYPES[spec.dtype])
    return torch.randint(-999, 999, spec.shape, generator=generator).to(DTYPES[spec.dtype])


@given(plans(), st.integers(1, 400), st.data())
def test_any_order_reloads_identically(tmp_path_factory, drawn, max_shard_bytes, data):
    folder, plan = tmp_path_factory.mktemp("shards"), planned(drawn)
    generator = torch.Generator().manual_seed(len(plan))
    tensors = {name: random_tensor(spec, generator) for name, spec in plan.items()}
    pieces = {name: [] for name in plan}  # row blocks, in order within a tensor
    for name, tensor in tensors.items():
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, tensor.shape[0] - 1)), max_size=3)) | {0})
        cuts = [cut for cut in cuts if cut < tensor.shape[0]]
        pieces[name] = [(start, tensor[start:stop]) for start, stop in zip(cuts, [*cuts[1:], None], strict=True)]
    turns = data.draw(st.permutations([name for name, blocks in pieces.items() for _ in blocks]))

    with ShardWriter(folder, plan, max_shard_bytes) as writer:
        for name in turns:
            writer.write_rows(name, *pieces[name].pop(0))
        writer.finish()

    shards = plan_shards(plan, max_shard_bytes)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == len(shards)
    reloaded = [load_file(file) for file in files]
    for shard, held in zip(shards, reloaded, strict=True):
        assert set(held) == set(shard)
        assert len(shard) == 1 or sum(plan[name].nbytes for name in shard) <= max_shard_bytes
        for name in shard:
            assert held[name].dtype == tensors[name].dtype
            assert torch.equal(held[name], tensors[name])
    check_index(folder, files, reloaded, plan)


def check_index(folder, files, reloaded, plan):
    index = folder / "model.safetensors.index.json"
    if len(files) == 1:
        assert [file.name for file in folder.iterdir()] == ["model.safetensors"]
        return
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    content = json.loads(index.read_text(encoding="utf-8"))
    assert content["weight_map"] == {
        name: file.name for file, held in zip(files, reloaded, strict=True) for name in held
    }
    assert content["metadata"]["total_size"] == sum(spec.nbytes for spec in plan.values())


@given(plans())
def test_every_tensor_starts_at_a_multiple_of_its_item(drawn):
    plan = planned(drawn)
    header, offsets, size = layout(list(plan), plan)
    assert len(header) % 8 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    taken = []
    for name, spec in plan.items():
        assert offsets[name] % DTYPES[spec.dtype].itemsize == 0
        taken.append((offsets[name], offsets[name] + spec.nbytes))
    taken.sort()
    assert taken[0][0] == len(header)
    assert taken[-1][1] == size
    assert all(stop == start for (_, stop), (start, _) in pairwise(taken))


@given(plans(), st.integers(1, 400))
def test_shards_keep_the_order_and_fill_up(drawn, max_shard_bytes):
    plan = planned(drawn)
    shards = plan_shards(plan, max_shard_bytes)
    assert [name for shard in shards for name in shard] == list(plan)
    for shard, following in pairwise(shards):
        filled = sum(plan[name].nbytes for name in shard)
        assert filled + plan[following[0]].nbytes > max_shard_bytes


def test_same_size_as_the_library(tmp_path):
    tensors = {
        "a": torch.randn(5, 3),
        "b": torch.arange(7, dtype=torch.int32),
        "c": torch.randn(2).bfloat16(),
    }
    save_file(tensors, tmp_path / "library.safetensors", metadata={"format": "pt"})
    plan = {"a": TensorSpec((5, 3), "F32"), "b": TensorSpec((7,), "I32"), "c": TensorSpec((2,), "BF16")}
    with ShardWriter(tmp_path, plan) as writer:
        for name in ("c", "a", "b"):
            writer.write(name, tensors[name])
        writer.finish()
    ours, theirs = tmp_path / "model.safetensors", tmp_path / "library.safetensors"
    assert ours.stat().st_size == theirs.stat().st_size
    assert ours.read_bytes()[-(60 + 28 + 4) :] == theirs.read_bytes()[-(60 + 28 + 4) :]


def test_casts_to_the_planned_type(tmp_path):
    tensor = torch.randn(4, 4, dtype=torch.float64)
    with ShardWriter(tmp_path, {"w": TensorSpec((4, 4), "BF16")}) as writer:
        writer.write("w", tensor.T)  # not contiguous
        writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensor.T.bfloat16())


def test_parameters_are_detached(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 2))
    with ShardWriter(tmp_path, {"w": TensorSpec((3, 2), "F32")}) as writer:
        writer.write("w", weight)
        writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], weight.detach())


def test_mistakes_of_the_caller_are_caught(tmp_path):
    with ShardWriter(tmp_path, {"w": TensorSpec((4, 2), "F32"), "v": TensorSpec((2,), "F32")}) as writer:
        with pytest.raises(AssertionError, match=r"w: rows of \(4, 3\) are not rows of \(4, 2\)"):
            writer.write("w", torch.zeros(4, 3))
        with pytest.raises(AssertionError, match="w: row 2 comes out of order"):
            writer.write_rows("w", 2, torch.zeros(2, 2))
        writer.write_rows("w", 0, torch.zeros(3, 2))
        with pytest.raises(AssertionError, match="w: more rows than the 4 planned"):
            writer.write_rows("w", 3, torch.zeros(2, 2))
        with pytest.raises(AssertionError, match=r"not written whole.*w.*v"):
            writer.finish()
        with pytest.raises(KeyError):
            writer.write("unplanned", torch.zeros(1))


def test_never_overwrites(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        ShardWriter(tmp_path, {"w": TensorSpec((1,), "F32")})
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"


def test_short_writes_are_continued(tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: whole(fd, data[:5], offset))
    tensor = torch.randn(6, 3)
    with ShardWriter(tmp_path, {"w": TensorSpec((6, 3), "F32")}) as writer:
        writer.write("w", tensor)
        writer.finish()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], tensor)


def test_a_full_disk_is_an_error(monkeypatch):
    def refuse(descriptor, data, offset):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(OSError, match="No space left"):
        write_all(0, memoryview(b"abc"), 0)


def test_files_are_closed_after_an_error(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, {"w": TensorSpec((2,), "F32")}) as writer:
        raise RuntimeError
    with pytest.raises(ValueError, match="closed file"):
        writer.write("w", torch.zeros(2))
