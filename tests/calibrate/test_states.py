"""Hidden states in a file read back as they were written, whole or a few windows at a time."""

import contextlib
import errno
import os
from unittest.mock import Mock

import pytest
import torch

from qectomy.calibrate.states import Streams, WindowFile, batches, scratch_file
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
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=[None, None, full]))
    with pytest.raises(OutputError, match="no room"):
        Streams(tmp_path, (2, 5, 3), fitted=1, batch=1)
    assert list(tmp_path.iterdir()) == []


def test_streams_hand_the_teachers_output_to_the_next_layer_and_leave_no_file(tmp_path):
    streams = Streams(tmp_path, (2, 5, 3), fitted=1, batch=1)
    assert len(list(tmp_path.iterdir())) == 4
    streams.teacher[:], streams.teacher_after[:], streams.student[:] = numbers(2), 2 * numbers(2), 3 * numbers(2)
    streams.next_layer()
    assert torch.equal(streams.teacher[:], 2 * numbers(2))
    assert torch.equal(streams.student[:], 3 * numbers(2))
    assert streams.teacher is not streams.teacher_after
    streams.close()
    assert list(tmp_path.iterdir()) == []
