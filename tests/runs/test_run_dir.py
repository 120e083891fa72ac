"""Who may enter a run's folder, what is removed of it and when, and what a kill leaves around its end."""

import fcntl
import json
import random
import shutil
import subprocess
import sys

import pytest
from interruptions import PowerCut, in_a_child

from qectomy import __version__
from qectomy.checkpoint.shards import TensorSpec
from qectomy.errors import NonFiniteError, OutputError, QectomyError, Stopped
from qectomy.runs import run_dir as module
from qectomy.runs.produce import run_dir
from qectomy.runs.run_dir import CONVERTING, HEALING, RunDir, check_out, finished
from qectomy.runs.run_dir import TOLD as RUN
from qectomy.runs.step_writer import StepWriter

TOLD = {"seed": 0, "text 1": "a.txt (sha256 00)"}


def make(out, error=None, steps=1, **options):
    """Fill a run's folder, note some steps, and fail or publish."""
    with run_dir(out, TOLD, **options) as work:
        (work.result / "weights").write_text("w")
        for step in range(steps):
            work.journal.append(step=step)
        if error is not None:
            raise error
        work.publish()


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


WHOLE = [RUN, "weights"]


def names(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


# How it ends


def test_the_output_appears_by_a_rename_and_the_rest_goes(out, tmp_path, monkeypatch):
    seen, move = [], module.move

    def look(work, to):
        seen.append((work.parent, to, to.exists()))
        move(work, to)

    monkeypatch.setattr(module, "move", look)
    make(out)
    assert seen == [(tmp_path / "out.converting", out, False)]
    assert names(tmp_path) == ["out"]
    assert names(out) == WHOLE
    assert out.stat().st_mode & 0o777 == 0o755


LEFT = "out.converting holds what was done: go on with --resume, or start anew with --clean."


@pytest.mark.parametrize("error", [OSError("odd"), OutputError("odd"), Stopped("odd."), KeyboardInterrupt()])
def test_what_can_pass_keeps_what_was_done(error, out, tmp_path):
    expected = Stopped if isinstance(error, Stopped | KeyboardInterrupt) else OutputError
    with pytest.raises(expected, match=rf"(odd|interrupted)\. .*{LEFT}$"):
        make(out, error)
    assert names(tmp_path) == ["out.converting"]
    make(out, resume=True)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "error", [NonFiniteError("NaN"), OSError("odd"), Stopped("odd"), KeyboardInterrupt(), ValueError("bug")]
)
def test_without_a_step_nothing_is_kept(error, out, tmp_path):
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        make(out, error, steps=0)
    assert names(tmp_path) == []


def test_what_was_refused_is_not_kept(out, tmp_path):
    with pytest.raises(NonFiniteError, match=r"^NaN$"):
        make(out, NonFiniteError("NaN"))
    assert names(tmp_path) == []


def test_a_bug_keeps_what_was_done(out, tmp_path):
    with pytest.raises(ValueError, match=r"^bug$"):
        make(out, ValueError("bug"))
    assert names(tmp_path) == ["out.converting"]


def test_parents_that_were_made_go_too(tmp_path):
    with pytest.raises(NonFiniteError):
        make(tmp_path / "a/b/out", NonFiniteError("NaN"))
    assert names(tmp_path) == []


def test_parents_with_other_files_stay(tmp_path):
    def act():
        with run_dir(tmp_path / "a/b/out", TOLD):
            (tmp_path / "a/notes").write_text("theirs")
            raise NonFiniteError("NaN")

    with pytest.raises(NonFiniteError):
        act()
    assert (tmp_path / "a/notes").is_file()
    assert not (tmp_path / "a/b").exists()


# Killed around the end


def again(out, way):
    """What a command does that is given once more; return whether there was nothing left to do."""
    check_out(out, way == "resume")
    if way == "resume" and finished(out, TOLD):
        return True
    make(out, **({} if way == "plain" else {way: True}))
    return False


@pytest.mark.parametrize("way", ["plain", "resume", "clean"])
def test_killed_at_every_call_that_ends_a_run(way, tmp_path):
    """Once the output is there `--resume` says so; whatever is asked for, nothing stays beside it."""
    seen = []
    for number in range(100):
        place = tmp_path / f"{number}"
        place.mkdir()
        out = place / "out"

        def act(out=out, number=number):
            with pytest.MonkeyPatch.context() as patch:
                PowerCut(number, random.Random(0)).install(patch)
                with run_dir(out, TOLD) as work:
                    (work.result / "weights").write_text("w")
                    (work.scratch / "states").write_text("s")
                    work.journal.append(step=0)
                    work.publish()

        if in_a_child(act) == "done":
            break
        whole, left = out.exists(), names(place / "out.converting") if (place / "out.converting").exists() else None
        if not whole and left and "run.json" in left and way == "plain":
            with pytest.raises(QectomyError, match="go on with --resume, or start anew with --clean"):
                again(out, way)
            continue
        if whole and way != "resume":
            with pytest.raises(OutputError, match=r"out exists; nothing is overwritten"):
                again(out, way)
        else:
            assert again(out, way) == whole, left
        assert names(place) == ["out"], left
        assert names(out) == WHOLE
        seen += [left] if whole else []
    assert [] in seen
    assert ["lock"] in seen
    assert ["lock", "run.json"] in seen
    assert ["journal", "lock", "run.json", "scratch"] in seen
    assert number != 99  # or it was never done


def test_a_finished_output_is_known_by_what_its_run_was_told(out, tmp_path, capsys):
    make(out)
    for _ in range(2):
        assert finished(out, TOLD)
    assert capsys.readouterr().err.startswith(f"note: {out} is whole, and this run made it: there was nothing left")
    with pytest.raises(QectomyError) as caught:
        finished(out, TOLD | {"seed": 1})
    assert str(caught.value) == (
        f"{out} is whole, and another run made it: seed was 0, is 1. Give what that run was given, or another --out"
    )
    (out / RUN).unlink()
    assert not finished(out, TOLD)
    with pytest.raises(OutputError, match="out exists; nothing is overwritten"):
        check_out(out, resume=True)
    assert names(tmp_path) == ["out"]


def test_an_empty_folder_is_no_sign_that_an_output_of_later_is_whole(out):
    """It may be what is left of a run that was refused."""
    for left in ((), ("lock",)):
        out.with_name("out.converting").mkdir()
        for name in left:
            (out.with_name("out.converting") / name).touch()
        out.mkdir()
        assert not finished(out, TOLD)
        with pytest.raises(OutputError, match="out exists; nothing is overwritten"):
            make(out, resume=True)
        assert names(out) == []
        out.rmdir()
        assert not out.with_name("out.converting").exists()


def test_what_is_not_the_rest_of_a_run_stays_beside_an_output(out, tmp_path):
    """An unfinished run, its output made by other means meanwhile; and a folder of someone else."""
    unfinished(out)
    out.mkdir()
    before = names(tmp_path / "out.converting")
    for options in ({}, {"clean": True}, {"resume": True}):
        with pytest.raises(OutputError, match="out exists; nothing is overwritten"):
            make(out, **options)
    assert names(tmp_path / "out.converting") == before
    shutil.rmtree(tmp_path / "out.converting")
    (tmp_path / "out.converting").mkdir()
    for name, content in (("thesis.tex", "years of work"), ("run.json", "{}")):
        (tmp_path / "out.converting" / name).write_text(content)
        with pytest.raises(OutputError, match="out exists; nothing is overwritten"):
            make(out, clean=True)
    assert names(tmp_path / "out.converting") == ["run.json", "thesis.tex"]


# Who may enter


def unfinished(out):
    with pytest.raises(Stopped):
        make(out, Stopped("odd"))


def test_an_unfinished_run_is_resumed_or_cleaned(out, tmp_path):
    unfinished(out)
    with pytest.raises(QectomyError) as caught:
        make(out)
    assert str(caught.value) == (
        f"{out}.converting holds a run that was not finished: go on with --resume, or start anew with --clean"
    )
    with run_dir(out, TOLD, resume=True) as work:
        assert work.journal.entries == [{"step": 0}]
    with run_dir(out, TOLD, clean=True) as work:
        assert work.journal.entries == []
        assert names(work.result) == []


def test_resuming_or_cleaning_nothing_is_starting(out, tmp_path):
    make(out, resume=True)
    make(tmp_path / "other", clean=True)
    assert names(tmp_path) == ["other", "out"]


def test_a_run_that_must_go_on_never_begins(out, tmp_path):
    for _ in range(2):
        with pytest.raises(QectomyError) as caught:
            make(out, resume="only")
        assert str(caught.value) == (
            f"{out}.converting holds no run to go on with, and --resume-only begins none (--resume would)"
        )
        assert not isinstance(caught.value, OutputError)
        assert not caught.value.resumable
        assert names(tmp_path) == []
    unfinished(out)
    with run_dir(out, TOLD, resume="only") as work:
        assert work.journal.entries == [{"step": 0}]
    (out.with_name("out.converting") / "journal").write_bytes(b"torn")
    with (
        pytest.raises(QectomyError, match=r"holds nothing sound to go on from, and --resume-only does not .*would\)$"),
        run_dir(out, TOLD, resume="only") as work,
    ):
        StepWriter(work, {"w": TensorSpec((1,), "F32")})
    assert names(out.with_name("out.converting")) == ["journal", "lock", "result", "run.json", "scratch"]
    assert (out.with_name("out.converting") / "result/weights").is_file()
    make(out, resume=True)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"seed": 1}, r"seed was 0, is 1\."),
        ({"text 1": "b.txt (sha256 01)"}, r"text 1 was a\.txt \(sha256 00\), is b\.txt \(sha256 01\)\."),
        ({"text 2": "b"}, r"text 2 was None, is b\."),
    ],
)
def test_another_run_is_refused_by_what_differs_and_stays(changed, message, out):
    unfinished(out)
    with pytest.raises(
        QectomyError, match=rf"out\.converting holds another run: {message} Give what that run was given"
    ):
        with run_dir(out, TOLD | changed, resume=True):
            pytest.fail("the block must not run")
    make(out, resume=True)


@pytest.mark.parametrize("package", ["qectomy", "torch", "transformers"])
def test_another_version_is_refused(package, out, monkeypatch):
    unfinished(out)
    if package == "qectomy":
        monkeypatch.setattr(module, "__version__", "9.9")
    else:
        right = module.importlib.metadata.version
        monkeypatch.setattr(
            module.importlib.metadata, "version", lambda name: "9.9" if name == package else right(name)
        )
    with pytest.raises(QectomyError, match=rf"holds another run: {package} was .*, is 9\.9\."):
        make(out, resume=True)


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"clean": True}])
def test_two_runs_do_not_share_an_output(options, out, tmp_path):
    with run_dir(out, TOLD) as work:
        work.journal.append(step=0)
        with pytest.raises(QectomyError, match=r"out\.converting is in use: another process works there"):
            make(out, **options)
        assert work.journal.path.is_file()
        work.publish()
    assert names(tmp_path) == ["out"]


SCRIPT = """
import pathlib, sys, time
from qectomy.runs.produce import run_dir
with run_dir(pathlib.Path(sys.argv[1]), {"seed": 0, "text 1": "a.txt (sha256 00)"}) as work:
    work.journal.append(step=0)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_another_process_dies_with_it(out):
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(QectomyError, match="is in use: another process works there"):
            make(out, resume=True)
    finally:
        process.kill()
        process.communicate(timeout=20)
    make(out, resume=True)


def test_a_folder_that_is_removed_while_it_is_entered(out, monkeypatch):
    """The other process was done between the two calls: its lock is on a file that is gone."""
    other, flock = RunDir(out), fcntl.flock
    other.start(TOLD, resume=False)
    calls = []

    def late(file, how):
        calls.append(how)
        if len(calls) == 1:
            other.remove()
            other.release()
        flock(file, how)

    monkeypatch.setattr("fcntl.flock", late)
    make(out)
    assert calls.count(fcntl.LOCK_EX | fcntl.LOCK_NB) == 2
    assert names(out) == WHOLE


@pytest.mark.parametrize("kind", [CONVERTING, HEALING])
def test_it_lies_beside_the_output(kind, out):
    assert RunDir(out, kind).path == out.with_name(f"out.{kind}")
    assert RunDir(out.with_name("a.b"), kind).path == out.with_name(f"a.b.{kind}")


def test_a_run_keeps_what_it_was_told_and_notes(out):
    run = RunDir(out, HEALING)
    assert run.start({"texts": ("a",)}, resume=True) is False
    assert run.fingerprint == {"texts": ["a"]}
    run.note(plan={"steps": 3})
    run.note(seconds=1.5, plan={"steps": 4})
    assert run.record() == {
        "made by": f"qectomy {__version__}",
        "fingerprint": {"texts": ["a"]},
        "plan": {"steps": 4},
        "seconds": 1.5,
    }
    run.release()
    assert RunDir(out, HEALING).start({"texts": ("a",)}, resume=True) is True


# What is not ours


@pytest.mark.parametrize("name", ["thesis.tex", "run.json"])
def test_a_folder_of_someone_else_is_left_alone(name, out):
    theirs = out.with_name("out.converting")
    theirs.mkdir()
    (theirs / name).write_text(json.dumps({"fingerprint": {"years": "of work"}}))
    for options in ({}, {"resume": True}, {"clean": True}):
        with pytest.raises(QectomyError, match=r"is no run's folder|holds a run|holds another run"):
            make(out, **options)
    assert json.loads((theirs / name).read_text()) == {"fingerprint": {"years": "of work"}}


def test_a_record_that_is_damaged_is_said(out):
    unfinished(out)
    (out.with_name("out.converting") / "run.json").write_text("{")
    for options in ({"resume": True}, {"clean": True}):
        with pytest.raises(QectomyError, match=r"run\.json cannot be read .*; remove the folder to start anew"):
            make(out, **options)


@pytest.mark.parametrize("there", [(), ("lock",), ("lock", "run.json.draft"), ("lock", "journal", "result", "scratch")])
def test_what_a_kill_leaves_of_a_folder_that_is_made_or_removed(there, out, tmp_path):
    folder = out.with_name("out.converting")
    folder.mkdir()
    for name in there:
        (folder / name).mkdir() if name in ("result", "scratch") else (folder / name).write_text("")
    make(out)
    assert names(tmp_path) == ["out"]


def test_a_finished_output_without_its_weights_is_no_finished_one(out):
    with run_dir(out, TOLD) as work:
        (work.result / "model.safetensors").write_text("weights")
        work.publish()
    assert finished(out, TOLD)
    (out / "model.safetensors").write_text("weig")
    with pytest.raises(OutputError, match=r"model\.safetensors is not there as it was written"):
        finished(out, TOLD)
    (out / "model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"model\.safetensors is not there as it was written"):
        finished(out, TOLD)
