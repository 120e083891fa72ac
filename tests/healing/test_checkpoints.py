"""Which of a healing run's checkpoints count, and which stay."""

import hashlib
import json
import os

import pytest

from qectomy.healing.checkpoints import COMPLETE, Checkpoints, is_complete, mark_complete, step_of
from qectomy.runs.records import read_record
from qectomy.runs.run_dir import HEALING, RunDir


@pytest.fixture
def started(tmp_path):
    return Checkpoints(RunDir(tmp_path / "out", HEALING))


def checkpoint(folder, step, complete=True):
    """Make a checkpoint as Trainer does, with a file in a folder of its own."""
    path = folder.path / f"checkpoint-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights" * step)
    (path / "inner" / "state.json").write_text("{}")
    if complete:
        mark_complete(path)
    return path


def kept(folder):
    return sorted(path.name for path in folder.path.iterdir())


def test_the_last_whole_checkpoint_is_found_by_number(started):
    assert started.last() is None
    for step in (2, 10, 9):
        checkpoint(started, step)
    assert started.last() == started.path / "checkpoint-10"


def test_half_written_ones_are_removed_and_do_not_count(started):
    whole = checkpoint(started, 2)
    checkpoint(started, 10, complete=False)
    assert started.last() == whole
    assert kept(started) == ["checkpoint-2"]


@pytest.mark.parametrize("name", ["model.safetensors", "inner/state.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "long", "flipped"])
def test_one_damaged_file_takes_a_checkpoint_away(started, name, damage):
    checkpoint(started, 2)
    path = checkpoint(started, 4) / name
    if damage == "missing":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes({"short": data[:-1], "long": data + b"0", "flipped": bytes([data[0] ^ 1]) + data[1:]}[damage])
    assert started.last() == started.path / "checkpoint-2"
    assert kept(started) == ["checkpoint-2"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"model.safetensors": 21}', b'{"inner": "0"}'])
def test_a_mark_that_is_damaged_takes_a_checkpoint_away(damage, started, capsys):
    whole, other = checkpoint(started, 2), checkpoint(started, 4)
    (other / COMPLETE).write_bytes(damage)
    assert started.last() == whole
    said = "note: checkpoint-4 in {} was damaged on the disk: going on from checkpoint-2\n"
    assert capsys.readouterr().err == said.format(started.run.path)


def with_best(path, step):
    (path / "trainer_state.json").write_text(json.dumps({"best_global_step": step}))
    mark_complete(path)
    return path


def test_a_checkpoint_counts_with_the_best_one_until_then_alone(started):
    """Its weights may become the result."""
    for step, best in {2: 2, 4: 4, 6: 4, 8: 4}.items():
        with_best(checkpoint(started, step, complete=False), best)
    assert started.last() == started.path / "checkpoint-8"
    (started.path / "checkpoint-4/model.safetensors").write_bytes(b"other")
    assert started.last() == started.path / "checkpoint-2"
    assert kept(started) == ["checkpoint-2"]


@pytest.mark.parametrize(
    "bests, left",
    [({2: 2, 4: 4, 6: 6}, [4, 6]), ({2: 2, 4: 2, 6: 2, 8: 2}, [2, 6, 8]), ({2: 2, 4: 2, 6: 2, 8: 8}, [2, 6, 8])],
)
def test_the_last_two_stay_with_the_best_of_each(bests, left, started):
    for step, best in bests.items():
        started.keep_latest(with_best(checkpoint(started, step, complete=False), best))
    assert kept(started) == [f"checkpoint-{step}" for step in left]
    for step in left[:0:-1]:  # each time the newest is damaged there is one to go back to, as long as two are left
        (started.path / f"checkpoint-{step}/model.safetensors").unlink()
        assert started.last() == started.path / f"checkpoint-{left[left.index(step) - 1]}"


def test_the_mark_names_every_file_and_its_sha256(started):
    path = checkpoint(started, 3)
    assert read_record(path / COMPLETE) == {
        "inner/state.json": hashlib.sha256(b"{}").hexdigest(),
        "model.safetensors": hashlib.sha256(b"weights" * 3).hexdigest(),
    }
    mark_complete(path)  # the mark itself is none of them
    assert COMPLETE not in read_record(path / COMPLETE)
    assert is_complete(path)


def test_files_are_on_the_disk_before_the_mark_is(started, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    path = checkpoint(started, 3, complete=False)

    def sync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr("pathlib.Path.replace", lambda self, to: (events.append("named"), replace(self, to)))
    mark_complete(path)
    assert events == ["state.json", "model.safetensors", f"{COMPLETE}.draft", "named", "checkpoint-3"]


def test_others_than_the_kept_are_removed(started):
    paths = {step: checkpoint(started, step) for step in (2, 4, 6, 8)}
    checkpoint(started, 9, complete=False)
    started.keep_only(paths[8], paths[4], None)
    assert kept(started) == ["checkpoint-4", "checkpoint-8"]
    started.keep_only(None)
    assert kept(started) == []


def test_a_checkpoint_loses_its_mark_before_its_files(started, monkeypatch):
    """A process killed while it removes one leaves none that counts."""
    path = checkpoint(started, 2)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    started.keep_only(None)
    assert path.is_dir()
    assert not is_complete(path)


def test_step_numbers(tmp_path):
    assert step_of(tmp_path / "checkpoint-120") == 120
    assert step_of(tmp_path / "checkpoint-best") == -1
