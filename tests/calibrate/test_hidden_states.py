"""Hidden states in a file read back as they were written, whole or a few windows at a time."""

import binascii
import contextlib
import errno
import os
from unittest.mock import Mock

import pytest
import torch

from qectomy.calibrate.hidden_states import Streams, WindowFile, batches, scratch_file
from qectomy.errors import OutputError


@pytest.fixture
def states(tmp_path):
    made = WindowFile(tmp_path / "states", 7, 5, 3)
    yield made
    made.close()


def numbers(n=7):
    return torch.randn(n, 5, 3, generator=torch.Generator().manual_seed(n))


def test_round_trip_in_any_pieces(states):
    whole = numbers()
    for start, stop in [(5, 7), (0, 1), (1, 5)]:
        states[start:stop] = whole[start:stop]
    assert torch.equal(states[0:7], whole)
    for start in range(7):
        for stop in range(start + 1, 8):
            assert torch.equal(states[start:stop], whole[start:stop])


def test_what_is_read_is_a_copy(states):
    states[:] = numbers()
    states[2:4].zero_()
    assert torch.equal(states[0:7], numbers())


def test_other_types_and_layouts_are_stored_as_float32(states):
    whole = numbers().double()
    states[:] = whole.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert torch.equal(states[0:7], whole.float())
    states[3:4] = whole[3:4].bfloat16()
    assert torch.equal(states[3:4], whole[3:4].bfloat16().float())
    assert torch.equal(states[4:7], whole[4:].float())


def test_short_reads_and_writes_are_continued(states, monkeypatch):
    pread, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: pread(fd, [views[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:11], at))
    states[:] = numbers()
    assert torch.equal(states[0:7], numbers())


def test_no_room_is_said_before_the_work_starts(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match=r"no room for 60 bytes"):
        WindowFile(tmp_path / "states", 1, 5, 3)


@pytest.mark.parametrize(
    "first, last, size, runs",
    [
        (0, 5, 2, [(0, 2), (2, 4), (4, 5)]),
        (3, 5, 4, [(3, 5)]),
        (0, 4, 4, [(0, 4)]),
        (2, 2, 3, []),
    ],
)
def test_batches_cover_the_range_once(first, last, size, runs):
    assert list(batches(first, last, size)) == runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_listed_windows_come_in_the_order_asked_for(tmp_path, dtype):
    file = WindowFile(tmp_path / "file", 7, 5, 3, dtype=dtype)
    file[:] = numbers()
    for wanted in ([3], [6, 0, 2], [1, 1]):
        found = file[wanted]
        assert found.dtype == dtype
        assert torch.equal(found, numbers().to(dtype)[wanted])
    file.close()


def test_values_of_another_shape_are_refused(states):
    states[:] = numbers()
    for wrong in (torch.zeros(1, 9, 3), torch.zeros(1, 1, 1), torch.zeros(2, 5, 3)):
        with pytest.raises(AssertionError):
            states[2:3] = wrong
    assert torch.equal(states[:], numbers())


def test_a_scratch_file_is_gone_whatever_happens(tmp_path, monkeypatch):
    with contextlib.suppress(KeyboardInterrupt), scratch_file(tmp_path / "file", 2, 3):
        assert (tmp_path / "file").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=full))
    with pytest.raises(OutputError, match="no room"), scratch_file(tmp_path / "file", 2, 3):
        pytest.fail("the block must not run")
    assert list(tmp_path.iterdir()) == []


def test_streams_hand_what_left_a_layer_to_the_next_and_keep_what_entered_it(tmp_path):
    streams = Streams(tmp_path, (2, 5, 3), fitted=1, batch=1)
    streams.teacher[:], streams.student[:] = numbers(2), 2 * numbers(2)
    first = streams.sync()
    streams.teacher_after[:], streams.student_after[:] = 3 * numbers(2), 4 * numbers(2)
    streams.enter(1)
    second = streams.sync()
    assert torch.equal(streams.teacher[:], 3 * numbers(2))
    assert torch.equal(streams.student[:], 4 * numbers(2))
    streams.teacher_after[:], streams.student_after[:] = 5 * numbers(2), 6 * numbers(2)  # layer 1 has run, too
    streams.close()
    later = Streams(tmp_path, (2, 5, 3), fitted=1, batch=1)  # another process
    assert later.checksums_on_disk(0) == first
    assert later.checksums_on_disk(1) == second
    assert first != second
    later.enter(1)
    assert torch.equal(later.student[:], 4 * numbers(2))
    later.close()


@pytest.mark.parametrize("size", [1, 3, 7])
def test_checksums_are_those_of_the_bytes_in_the_file(tmp_path, size):
    file = WindowFile(tmp_path / "file", 7, 5, 3)
    for start, stop in batches(0, 7, size):
        file[start:stop] = numbers()[start:stop]
    expected = binascii.crc32((tmp_path / "file").read_bytes())
    assert file.checksum() == file.checksum_on_disk() == expected
    file[0:2] = numbers()[0:2]
    with pytest.raises(AssertionError, match="not written one after the other"):
        file.checksum()  # the rest may be of another layer
    file[3:7] = numbers()[3:7]
    with pytest.raises(AssertionError, match="not written one after the other"):
        file.checksum()
    file.close()
