"""How often a conversion does what, against one that is counted; and its files, against those that lie there."""

import inspect
import os
import subprocess
import sys
from dataclasses import replace

import conversions
import pytest
import torch
from conversions import QUICK, convert_tiny

from qectomy.calibrate import attention_kl, key_shared, layer_fit, moments, preconditioning, refine, refit
from qectomy.calibrate.precision import fast_dtype
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.conversion import final_scores, layerwise
from qectomy.conversion.forecast import commands, work
from qectomy.conversion.forecast.disk import disk_bytes, scratch_files
from qectomy.conversion.forecast.work import fast_itemsize, plan_work
from qectomy.eval import certificate, layerwise_model, reload, samples, token_scores
from qectomy.models.query_maps import parse_recipe
from qectomy.surgery import checkpoint


def planned(source, query="key-shared", **told):
    """Return the work of a QUICK conversion."""
    return plan_work(source, tuple(parse_recipe(query, source.dims)), **{**QUICK, **told})


def test_the_constants_are_those_of_the_modules_that_do_the_work():
    settings = refine.RefineSettings()
    assert work.TOKENS_A_BATCH == layerwise.TOKENS_A_BATCH
    assert work.TOKENS_ON_DEVICE == layerwise.TOKENS_ON_DEVICE
    assert work.KL_WINDOWS == layerwise.KL_WINDOWS
    assert work.TOKENS_A_PART == refine.TOKENS_A_PART
    assert settings.rows_a_step == work.ROWS_A_STEP
    assert 1 / settings.row_share == work.ROWS_STRIDE
    assert work.JOINT_STEPS == key_shared.STEPS
    attended = inspect.signature(layer_fit.attended_moments).parameters
    assert attended["windows"].default == work.ATTENDED_WINDOWS
    assert attended["stride"].default == work.ATTENDED_STRIDE
    assert work.EIGEN_CHANNELS == layer_fit.EIGEN_CHANNELS
    assert work.BLOCK_LOGITS == attention_kl.BLOCK_LOGITS
    assert work.COLUMNS == moments.COLUMNS
    assert work.SCORED_TOKENS == final_scores.SCORED_TOKENS
    assert work.SLICE == token_scores.SLICE
    assert work.RELOAD_TOKENS == reload.RELOAD_TOKENS
    assert len(samples.PROMPTS) * samples.NEW_TOKENS == work.GENERATED
    assert work.MOST_GENERATING == samples.MOST_BYTES
    assert commands.STREAMED_TOKENS == layerwise_model.TOKENS_A_BATCH
    assert commands.STATES_BYTES == layerwise_model.STATES_BYTES
    assert commands.ROWS_A_HEAD == layerwise_model.ROWS_A_HEAD
    assert commands.SAMPLED == certificate.SAMPLED
    assert commands.FOLD_ROWS == checkpoint.ROWS_AT_ONCE


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


@pytest.mark.parametrize("tokens", [64, 4096, 32_768, 131_072, 2_000_000])
def test_the_steps_grow_as_those_of_the_fit(tokens, tiny_checkpoint):
    source = open_checkpoint(tiny_checkpoint())
    assert planned(source, tokens=tokens).refine_steps == refine.RefineSettings().steps_for(tokens)


@pytest.mark.parametrize("windows, attended", [(5, 5), (12, 12), (23, 23), (24, 12), (30, 15), (64, 13)])
def test_about_twelve_windows_are_attended(windows, attended, tiny_checkpoint):
    assert planned(open_checkpoint(tiny_checkpoint()), tokens=32 * windows).attended == attended


@pytest.mark.parametrize("shape, query", [("llama", "key-shared"), ("llama", "0=dense,1=select"), ("gpt2", "identity")])
def test_counts_are_those_of_a_conversion(shape, query, tiny_checkpoint, raven, tmp_path, monkeypatch):
    seen = {}

    def counted(name, function):
        def count(*arguments, **options):
            seen[name] = seen.get(name, 0) + 1
            return function(*arguments, **options)

        return count

    def adam_of(name):
        def adam(*arguments, **options):
            seen[name] = options["steps"]
            preconditioning.adam(*arguments, **{**options, "steps": 2})

        return adam

    monkeypatch.setattr(conversions, "few_steps", lambda patch: None)
    monkeypatch.setattr(refine, "adam", adam_of("refine steps"))
    monkeypatch.setattr(key_shared, "adam", adam_of("joint steps"))
    monkeypatch.setattr(refine, "_loss", counted("parts", refine._loss))
    monkeypatch.setattr(refit.Regression, "add", counted("sums", refit.Regression.add))
    monkeypatch.setattr(moments.MomentSums, "add", counted("collected", moments.MomentSums.add))
    monkeypatch.setattr(layer_fit, "attention_logits", counted("attended", layer_fit.attention_logits))
    monkeypatch.setattr(layerwise, "attention_kl", counted("KL", layerwise.attention_kl))
    monkeypatch.setattr(final_scores, "score_tokens", counted("scores", final_scores.score_tokens))
    monkeypatch.setattr(layerwise.LayerRunner, "forward", counted("student", layerwise.LayerRunner.forward))
    monkeypatch.setattr(layerwise, "TOKENS_A_BATCH", 64)
    monkeypatch.setattr(work, "TOKENS_A_BATCH", 64)
    monkeypatch.setattr(refine, "TOKENS_A_PART", 96)
    monkeypatch.setattr(work, "TOKENS_A_PART", 96)
    source = open_checkpoint(tiny_checkpoint(shape))
    convert_tiny(source.folder, tmp_path / "out", query, raven)
    told = planned(source, query)
    fits = sum(spec.name != "dense" for spec in told.recipe)
    joint = "key-shared" in query
    assert told.fitted_batches == 5
    assert told.held_batches == 3
    assert seen == {
        "refine steps": told.refine_steps,
        **({"joint steps": work.JOINT_STEPS} if joint else {}),
        "parts": fits * 2 * -(-told.step_windows // told.part_windows),
        "sums": 2 * sum(told.drifting) * told.fitted_batches,
        "collected": fits * told.fitted_batches,
        **({"attended": fits * told.attended} if joint or shape == "gpt2" else {}),
        "KL": len(told.recipe) * told.kl_windows,
        "scores": told.score_batches,
        "student": len(told.recipe) * (told.fitted_batches + told.held_batches),
    }


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
