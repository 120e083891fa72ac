"""Text that the original writes: cached with its provenance, continued, extended, the same every time."""

import json

import pytest
import torch
from healings import STEP, heal_tiny

from qectomy.checkpoint.checkpoint import open_checkpoint, sha256
from qectomy.healing import self_generated
from qectomy.healing.models import load_teacher
from qectomy.healing.self_generated import cache_folder, self_generated_text

LENGTH, BATCH = 24, 4


@pytest.fixture
def write(tiny_checkpoint, tmp_path, monkeypatch):
    """Return a function (batches, cache, options) -> path of a text that a tiny GPT-2 wrote."""
    monkeypatch.setitem(self_generated.BATCH, "cpu", BATCH)
    original = open_checkpoint(tiny_checkpoint("gpt2"))
    model = load_teacher(original, "float32", "cpu")

    def make(batches, cache="cache", **options):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        told = {"tokens": batches * BATCH * LENGTH, "length": LENGTH, "seed": 0, **options}
        return self_generated_text(original, original.hashes(), model, **told)

    return make


def provenance(path):
    return json.loads((path.parent / "provenance.json").read_text())


def test_it_lies_in_the_cache_with_where_it_comes_from(write, tmp_path, tiny_checkpoint):
    path = write(3)
    assert path.parent.parent == tmp_path / "cache/qectomy/self-generated" == cache_folder()
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert len(texts) == 3 * BATCH
    assert len(set(texts)) == len(texts)
    assert all(text.startswith("<s>") for text in texts[::2])
    assert not all(text.startswith("<s>") for text in texts[1::2])
    wanted = {"sequences": 12, "tokens": 12 * LENGTH, "sha256": sha256(path), "seed": 0, "length": LENGTH}
    wanted |= {"dtype": "float32", "device": "cpu", "temperature": 1.0, "batch": BATCH}
    wanted |= {"model": open_checkpoint(tiny_checkpoint("gpt2")).hashes()}
    assert provenance(path).items() >= wanted.items()
    assert {"versions", "created", "name"} <= provenance(path).keys()


def test_the_models_own_way_of_sampling_is_left_out(tiny_checkpoint, monkeypatch, tmp_path):
    """transformers fills in from it what a call leaves open: an end of text would stop, a temperature sharpen."""
    original = open_checkpoint(tiny_checkpoint("gpt2"))
    texts = []
    for number, own in enumerate(({}, {"eos_token_id": list(range(300)), "temperature": 0.01, "top_p": 0.1})):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(number)))
        model = load_teacher(original, "float32", "cpu")
        for name, value in own.items():
            setattr(model.generation_config, name, value)
        kept = model.generation_config
        texts.append(self_generated_text(original, {}, model, tokens=1, length=LENGTH, seed=0).read_bytes())
        assert model.generation_config is kept
    assert texts[0] == texts[1]


def test_as_many_side_by_side_as_the_cache_has_room_for(tiny_checkpoint, monkeypatch):
    dims = open_checkpoint(tiny_checkpoint("gpt2")).dims
    a_sequence = 2 * dims.n_layers * dims.n_kv_heads * dims.d_head * LENGTH * 2
    monkeypatch.setattr(self_generated, "CACHE_BYTES", 5 * a_sequence + 1)
    assert self_generated._batch(dims, "cuda", LENGTH, 2) == 5
    assert self_generated._batch(dims, "cuda", 100 * LENGTH, 2) == 1


def test_without_a_cache_named_it_lies_at_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/qectomy/self-generated"


def test_tokens_are_rounded_up_to_batches(write):
    assert len(write(0, tokens=1).read_text().splitlines()) == BATCH
    assert len(write(0, tokens=BATCH * LENGTH + 1).read_text().splitlines()) == 2 * BATCH


def test_the_same_text_every_time_and_the_random_state_left_alone(write):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = write(2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert write(2, "another").read_bytes() == first.read_bytes()
    other = write(2, seed=1)
    assert other.parent != first.parent
    assert other.read_bytes() != first.read_bytes()
    assert write(2, length=LENGTH + 1).parent != first.parent


def test_what_is_there_is_not_written_again(write, monkeypatch):
    path = write(2)
    monkeypatch.setattr(self_generated, "_sample", lambda *_: pytest.fail("sampled"))
    assert write(2) == path
    assert write(1) == path


def test_a_longer_text_begins_with_the_shorter_one(write):
    short = write(1).read_bytes()
    calls = []
    path = write(3, progress=lambda *call: calls.append(call[:2]))
    assert path.read_bytes().startswith(short)
    assert path.read_bytes() == write(3, "another").read_bytes()
    assert calls == [(2, 3), (3, 3)]
    assert provenance(path)["sequences"] == 3 * BATCH
    assert provenance(path)["sha256"] == sha256(path)


@pytest.mark.parametrize("cut", [-1, -10, "line", "batch"])
def test_a_text_that_was_cut_off_is_continued(write, cut):
    path = write(3)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = {"line": b"".join(lines[: BATCH + 2]), "batch": b"".join(lines[:BATCH])}
    path.write_bytes(kept[cut] if isinstance(cut, str) else whole[:cut])
    assert write(3).read_bytes() == whole


def test_a_record_that_a_killed_process_left_behind_is_written_again(write, monkeypatch):
    with monkeypatch.context() as patch:
        write(1)
        patch.setattr(self_generated, "write_json", lambda *_: None)
        path = write(2)
    assert provenance(path)["sequences"] == BATCH
    write(2)
    assert provenance(path)["sequences"] == 2 * BATCH
    assert provenance(path)["sha256"] == sha256(path)


def test_healing_on_what_the_original_wrote(pair, raven, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = {"texts": (), "self_generated": True, "tokens": 2 * STEP, "generated_tokens": 2 * STEP, "evaluations": 1}
    report = heal_tiny(pair(), tmp_path / "out", raven, **told)
    (path,) = (tmp_path / "cache").rglob("text.jsonl")
    assert report["healing"]["texts"][0]["sha256"] == sha256(path)
    assert report["healing"]["settings"]["self_generated"] is True
    assert report["healing"]["tokens"] == 2 * STEP


def test_field_is_that_of_the_text_measured_on_alone(pair, raven, tmp_path, monkeypatch):
    monkeypatch.setitem(self_generated.BATCH, "cpu", BATCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"body": raven.read_text(), "other": "x"}))
    told = dict(texts=(), self_generated=True, tokens=2 * STEP, generated_tokens=1, evaluations=1)
    report = heal_tiny(pair(), tmp_path / "out", raven, **told, eval_text=str(tmp_path / "eval.jsonl"), field="body")
    assert report["perplexity"]["protocol"]["text_read_as"]["field"] == "body"
    assert report["healing"]["texts"][0]["read_as"]["field"] == "text"
