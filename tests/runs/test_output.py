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
from qectomy.runs.output import cause, check_absent, check_room, interruptible, make_parents, move


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def made(out):
    """Return a folder that is ready to become the output."""
    work = out.with_name("work")
    (work / "sub").mkdir(parents=True, mode=0o700)
    (work / "weights").write_bytes(b"w" * 1000)
    (work / "sub/config").write_text("c")
    return work


def test_a_folder_appears_whole(out, tmp_path):
    move(made(out), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "weights").stat().st_size == 1000
    assert (out / "sub/config").read_text() == "c"
    assert out.stat().st_mode & 0o777 == 0o755


def test_an_output_that_appears_meanwhile_is_kept(out):
    work = made(out)
    out.mkdir()
    (out / "precious").write_text("theirs")
    with pytest.raises(OutputError, match="out exists"):
        move(work, out)
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_existing_output_is_refused(tmp_path):
    folder, file, link = tmp_path / "folder", tmp_path / "file", tmp_path / "link"
    folder.mkdir()
    file.write_text("precious")
    link.symlink_to(tmp_path / "nowhere")
    for out in (folder, file, link):
        with pytest.raises(OutputError, match=f"{out} exists; nothing is overwritten. Give another --out"):
            check_absent(out)


@pytest.mark.parametrize(
    "code, what",
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EROFS, "the disk is read-only"),
        (errno.EIO, "Input/output error"),
        (None, "odd"),
    ],
)
def test_operating_system_errors_are_explained(code, what):
    assert cause(OSError(code, os.strerror(code)) if code else OSError("odd")) == what


SCRIPT = """
import time
from qectomy.runs.output import interruptible
with interruptible():
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        print("tidied up", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_is_an_interruption(number):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=allow_interrupts,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    said, stderr = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in stderr
    assert said == "tidied up\n"


def test_the_old_handler_of_sigterm_comes_back():
    def handler(signum, frame):
        raise AssertionError("not during the block")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGTERM) is not handler
        assert signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_it_works_outside_the_main_thread(tmp_path):
    def work():
        with interruptible():
            (tmp_path / "done").touch()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (tmp_path / "done").exists()


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
