"""The files that several processes of a run share: the source, and the shards that the first one writes."""

import hashlib
import shutil

import pytest
from launches import launched

from qectomy.calibrate.hidden_states import Streams
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.shards import TensorSpec
from qectomy.conversion import shared_run
from qectomy.distributed.process_group import ProcessGroup
from qectomy.errors import Stopped
from qectomy.runs import input_hashes
from qectomy.runs.input_hashes import SourceWatch
from qectomy.runs.produce import run_dir
from qectomy.runs.step_writer import StepWriter


def sha256_of(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_no_shard_stays_open_where_another_process_fails_first(tmp_path, monkeypatch):
    """The first one has its shards open when it hears of the failure."""

    class Failing(ProcessGroup):
        def on_main(self, act):
            raise Stopped("another one has failed")

    made = []

    class Recorded(StepWriter):
        def __init__(self, *given, **more):
            super().__init__(*given, **more)
            made.append(self)

    monkeypatch.setattr(shared_run, "StepWriter", Recorded)
    with run_dir(tmp_path / "out", {}) as work:
        streams = Streams(work.scratch, (2, 4, 2), fitted=1, batch=1)
        with pytest.raises(Stopped):
            shared_run.SharedWriter(Failing("cpu"), work, {"a": TensorSpec((2, 2), "F32")}, streams)
        streams.close()
    assert [file.closed for file in made[0]._files] == [True]


def test_the_source_is_read_by_one_process_for_all_that_see_it(tiny_checkpoint, tmp_path, monkeypatch):
    """A copy that another process has in its place is read there, and may be another model."""
    source, read = tiny_checkpoint(), []
    copied = shutil.copytree(source, tmp_path / "copy")
    (copied / "config.json").write_text((source / "config.json").read_text() + " ")
    monkeypatch.setattr(input_hashes, "sha256", lambda path: read.append(path.name) or sha256_of(path))
    hashed = lambda folder: {path.name: sha256_of(path) for path in folder.iterdir()}  # noqa: E731

    def act(processes):
        found = []
        for folder in (source, source if processes.is_main else copied):
            read.clear()
            found.append((SourceWatch(open_checkpoint(folder), processes.on_main).hashes, len(read)))
        return found

    first, other = launched(2, act)
    n_files, told = len(first[0][0]), hashed(source)
    assert first == [({name: told[name] for name in first[0][0]}, n_files)] * 2
    assert other[0] == (first[0][0], 0)
    assert other[1] == ({name: hashed(copied)[name] for name in first[0][0]}, n_files)
    assert other[1][0]["config.json"] != first[1][0]["config.json"]
