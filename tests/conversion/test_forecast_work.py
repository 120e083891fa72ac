"""The files of a conversion, against those that lie there; and the type in which it multiplies."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conversions import QUICK, convert_tiny

from qectomy.calibrate import layer_fit
from qectomy.calibrate.precision import fast_dtype
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion.forecast import work
from qectomy.conversion.forecast.disk import disk_bytes, scratch_files
from qectomy.conversion.forecast.work import fast_itemsize, plan_work
from qectomy.models.query_maps import parse_recipe


def planned(source, query="key-shared", **told):
    """Return the work of a QUICK conversion."""
    return plan_work(source, tuple(parse_recipe(query, source.dims)), **{**QUICK, **told})


ALONE = """
import pathlib, sys
from qectomy.conversion.forecast import work
found = []
for listed in (work.Path, lambda path: pathlib.Path(sys.argv[1]), lambda path: pathlib.Path(sys.argv[2])):
    work.Path = listed  # of this process alone
    work.fast_itemsize.cache_clear()
    found.append(work.fast_itemsize())
assert "torch" not in sys.modules
import torch
from qectomy.calibrate.precision import fast_dtype
print(*found, fast_dtype(torch.device("cpu")).itemsize)
"""


def test_the_fast_type_is_the_one_that_torch_finds(tmp_path):
    fast_itemsize.cache_clear()
    assert fast_itemsize() == fast_dtype(torch.device("cpu")).itemsize
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu avx512f avx512_bf16 avx512vl\n")
    native = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    command = [sys.executable, "-c", ALONE, str(tmp_path / "cpuinfo"), str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=native)
    assert done.returncode == 0, done.stderr
    alone, listed, unknown, real = map(int, done.stdout.split())
    assert (listed, unknown) == (2, 4)
    if work.Path("/proc/cpuinfo").exists():
        assert alone == real


@pytest.mark.parametrize("shape", ["llama", "gpt2", "wide-heads"])
def test_scratch_files_are_foretold_to_the_byte(shape, tiny_checkpoint, raven, tmp_path, monkeypatch):
    source, seen, refined = open_checkpoint(tiny_checkpoint(shape)), {}, layer_fit.refine

    def look(*arguments):
        seen.update({path.name: path.stat().st_size for path in (tmp_path / "out.converting/scratch").iterdir()})
        return refined(*arguments)

    monkeypatch.setattr(layer_fit, "refine", look)
    convert_tiny(source.folder, tmp_path / "out", "key-shared", raven)
    states, middle, fit, _ = scratch_files(planned(source)).values()
    assert sum(seen.pop(f"{model}-{i}") for model in ("teacher", "student") for i in range(3)) == states
    assert seen.pop("teacher-mid") == middle
    assert sum(seen.pop(name) for name in ("hidden", "teacher_query", "teacher_key")) == fit
    assert not seen


def test_the_disk_holds_scratch_and_result(tiny_checkpoint, raven, tmp_path):
    source = open_checkpoint(tiny_checkpoint())
    told = planned(source)
    convert_tiny(source.folder, tmp_path / "out", "key-shared", raven)
    result = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    *always, fit, rows = scratch_files(told).values()
    assert 0 < disk_bytes(source, told) - sum(always) - max(fit, rows) - result < 1_000_000
    more = replace(told, fitted=told.fitted + 1)
    a_token = 6 * 32 * 4 + 4 * 32 + (told.fast_itemsize * 80 if fit > rows else 0)  # embedding: all 320 rows already
    assert disk_bytes(source, more) - disk_bytes(source, told) == 32 * a_token
