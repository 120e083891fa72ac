"""Output folders appear whole or not at all, however the work ends."""

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from damage import allow_interrupts
from interruptions import in_a_child

from qectomy.errors import OutputError
from qectomy.runs.output import check_absent, check_room, make_parents, new_folder


def fill(work):
    (work / "weights").write_bytes(b"w" * 1000)
    (work / "sub").mkdir()
    (work / "sub/config").write_text("c")


def place(out):
    """Return where an output is made: in a folder of its run's, which stays."""
    run = out.with_name(f"{out.name}.run")
    run.mkdir(exist_ok=True)
    return run / "result"


def nothing_is_left(out):
    return not out.exists() and not any(place(out).parent.iterdir())


def fail(out, error, meanwhile=lambda: None):
    """Fill a new folder, let something else happen meanwhile, and fail with the error, if any."""
    with new_folder(out, place(out)) as work:
        fill(work)
        meanwhile()
        if error is not None:
            raise error


def test_success(tmp_path):
    out = tmp_path / "out"
    with new_folder(out, place(out)) as work:
        assert work == tmp_path / "out.run/result"
        assert not out.exists()
        fill(work)
    assert not any(place(out).parent.iterdir())
    assert (out / "weights").stat().st_size == 1000
    assert (out / "sub/config").read_text() == "c"
    assert out.stat().st_mode & 0o777 == 0o755


def test_relative_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder(Path("out"), place(tmp_path / "out")) as work:
        fill(work)
        monkeypatch.chdir("/")  # a library may change the working folder
    assert (tmp_path / "out/weights").is_file()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OutputError])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(error, match="stop"):
        fail(tmp_path / "out", error("stop"))
    assert nothing_is_left(tmp_path / "out")


def test_what_a_kill_left_goes_when_the_output_is_made_again(tmp_path):
    out = tmp_path / "out"

    def killed():
        with new_folder(out, place(out)) as work:
            (work / "half").write_text("h")
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_a_child(killed) == "killed"
    assert [path.name for path in place(out).iterdir()] == ["half"]
    fail(out, None)
    assert sorted(path.name for path in out.iterdir()) == ["sub", "weights"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.run"]


@pytest.mark.parametrize(
    "code, what",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EIO, "Input/output error"),
        (None, "odd"),
    ],
)
def test_operating_system_errors_are_explained(tmp_path, code, what):
    error = OSError(code, os.strerror(code)) if code else OSError("odd")
    with pytest.raises(OutputError, match=f"out could not be written: {what}$"):
        fail(tmp_path / "out", error)
    assert nothing_is_left(tmp_path / "out")


SCRIPT = """
import sys, time, pathlib
from qectomy.runs.output import new_folder
with new_folder(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])) as work:
    (work / "weights").write_bytes(b"w" * 1000)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), str(place(tmp_path / "out"))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=allow_interrupts,
    )
    assert process.stdout.readline() == "ready\n"
    assert any(place(tmp_path / "out").iterdir())
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in stderr
    assert nothing_is_left(tmp_path / "out")


def test_the_old_handler_of_sigterm_comes_back(tmp_path):
    def handler(signum, frame):
        raise AssertionError("not during the block")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with new_folder(tmp_path / "good", place(tmp_path / "good")):
            assert signal.getsignal(signal.SIGTERM) is not handler
        assert signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "bad", place(tmp_path / "bad")):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "good").is_dir()
    assert nothing_is_left(tmp_path / "bad")


def test_works_outside_the_main_thread(tmp_path):
    def work():
        with new_folder(tmp_path / "out", place(tmp_path / "out")) as folder:
            fill(folder)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (tmp_path / "out/weights").is_file()


def test_existing_output_is_refused(tmp_path):
    folder, file, link = tmp_path / "folder", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    file.write_text("precious")
    link.symlink_to(tmp_path / "nowhere")
    for out in (folder, file, link):
        with pytest.raises(OutputError, match=f"{out} exists; nothing is overwritten. Give another --out"):
            with new_folder(out, tmp_path / "run"):
                pytest.fail("the block must not run")
    assert file.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


def test_output_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def appear():
        out.mkdir()
        (out / "precious").write_text("theirs")

    with pytest.raises(OutputError, match="out exists"):
        fail(out, None, appear)
    assert not any(place(out).parent.iterdir())
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file is not a folder that can be written to"):
        check_absent(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_parent(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for out in (locked / "out", locked / "a/out"):
        with pytest.raises(OutputError, match="locked is not a folder that can be written to"):
            check_absent(out)


def test_a_parent_that_refuses(tmp_path, monkeypatch):
    """What a read-only parent does, for root too."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    place(tmp_path / "out")
    for method in ("mkdir", "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(sys.modules[__name__], "place", lambda out: tmp_path / "out.run/result")
            patch.setattr(Path, method, refuse)
            with pytest.raises(OutputError, match="out could not be written: Permission denied"):
                fail(tmp_path / "out", None)
    assert nothing_is_left(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        with pytest.raises(OutputError, match="a cannot be made: Permission denied"):
            make_parents(tmp_path / "a")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="is not a folder that can be written to"):
        check_absent(tmp_path / "a/out")


def test_room(tmp_path):
    check_room(tmp_path / "a/b", 1)
    with pytest.raises(OutputError, match=r"bytes free; 1,000,000,000,000,000,000 are needed. Nothing was written"):
        check_room(tmp_path / "a/b", 10**18)
    assert list(tmp_path.iterdir()) == []
