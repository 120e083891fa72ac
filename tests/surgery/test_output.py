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

from qectomy.errors import OutputError
from qectomy.surgery.output import check_absent, check_room, new_folder


def fill(work):
    (work / "weights").write_bytes(b"w" * 1000)
    (work / "sub").mkdir()
    (work / "sub/config").write_text("c")


def fail(out, error, meanwhile=lambda: None):
    """Fill a new folder, let something else happen meanwhile, and fail with the error, if any."""
    with new_folder(out) as work:
        fill(work)
        meanwhile()
        if error is not None:
            raise error


def test_success(tmp_path):
    out = tmp_path / "out"
    with new_folder(out) as work:
        assert work.parent == tmp_path
        assert work.name.startswith(".out.partial-")
        assert not out.exists()
        fill(work)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "weights").stat().st_size == 1000
    assert (out / "sub/config").read_text() == "c"
    assert out.stat().st_mode & 0o777 == 0o755


def test_relative_and_deep_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder(Path("a/b/out")) as work:
        fill(work)
        monkeypatch.chdir("/")  # a library may change the working folder
    assert (tmp_path / "a/b/out/weights").is_file()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OutputError])
@pytest.mark.parametrize("where", ["out", "a/b/out"])
def test_nothing_is_left_after_an_error(tmp_path, error, where):
    with pytest.raises(error, match="stop"):
        fail(tmp_path / where, error("stop"))
    assert list(tmp_path.iterdir()) == []


def test_parents_with_other_files_stay(tmp_path):
    with pytest.raises(ValueError, match="stop"):
        fail(tmp_path / "a/b/out", ValueError("stop"), lambda: (tmp_path / "a/notes").write_text("theirs"))
    assert (tmp_path / "a/notes").is_file()
    assert not (tmp_path / "a/b").exists()


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
    with pytest.raises(OutputError, match=f"out could not be written: {what}. Nothing was left behind"):
        fail(tmp_path / "out", error)
    assert list(tmp_path.iterdir()) == []


SCRIPT = """
import sys, time, pathlib
from qectomy.surgery.output import new_folder
with new_folder(pathlib.Path(sys.argv[1])) as work:
    (work / "weights").write_bytes(b"w" * 1000)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_after_a_signal(tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "a/out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=allow_interrupts,
    )
    assert process.stdout.readline() == "ready\n"
    assert any((tmp_path / "a").iterdir())
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in stderr
    assert list(tmp_path.iterdir()) == []


def test_the_old_handler_of_sigterm_comes_back(tmp_path):
    def handler(signum, frame):
        raise AssertionError("not during the block")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with new_folder(tmp_path / "good"):
            assert signal.getsignal(signal.SIGTERM) is not handler
        assert signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "bad"):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_works_outside_the_main_thread(tmp_path):
    def work():
        with new_folder(tmp_path / "out") as folder:
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
            with new_folder(out):
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
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
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
            with new_folder(out):
                pytest.fail("the block must not run")


def test_a_parent_that_refuses(tmp_path, monkeypatch):
    """What a read-only parent does, for root too."""

    def refuse(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for method, message in (("mkdir", "a cannot be made: "), ("rename", "out could not be written: ")):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, refuse)
            with pytest.raises(OutputError, match=f"{message}Permission denied"):
                fail(tmp_path / "a/out", None)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="is not a folder that can be written to"):
        check_absent(tmp_path / "a/out")


def test_room(tmp_path):
    check_room(tmp_path / "a/b", 1)
    with pytest.raises(OutputError, match=r"bytes free; 1,000,000,000,000,000,000 are needed. Nothing was written"):
        check_room(tmp_path / "a/b", 10**18)
    assert list(tmp_path.iterdir()) == []
