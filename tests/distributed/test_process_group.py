"""The processes of a run: alone here, and what is said where several cannot be one run."""

import pytest
import torch
from launches import launched

from qectomy.distributed.process_group import ProcessGroup, join
from qectomy.errors import QectomyError


def test_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    found, numbers = join("cpu"), torch.arange(3)
    assert (found.world_size, found.rank, found.is_main, found.device) == (1, 0, True, "cpu")
    found.all_reduce_(numbers)
    found.broadcast_(numbers)
    assert numbers.tolist() == [0, 1, 2]
    assert found.on_main(lambda: {"a": 1}) == {"a": 1}
    assert found.all_gather("a") == ["a"]


def test_what_the_main_process_raises_reaches_the_caller():
    def fail():
        raise QectomyError("no")

    processes = ProcessGroup("cpu")
    with pytest.raises(QectomyError, match=r"^no$"), processes.collective():
        processes.on_main(fail)


@pytest.mark.parametrize(
    "device, gpus, message",
    [
        ("nonsense", True, r"^--device nonsense: not usable here \("),
        ("cuda:2", True, r"^--device cuda:2: several processes take a GPU each; give --device cuda$"),
        ("cuda", False, r"^--device cuda: not usable here by several processes; give --device cpu, or cuda with GPUs$"),
        ("cuda", True, r"^--device cuda: LOCAL_RANK, which says whose GPU is whose, is not set; start by torchrun$"),
    ],
)
def test_a_device_that_several_processes_cannot_have(device, gpus, message, monkeypatch):
    """It is said at once: connections that wait for others would wait for half an hour."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    with pytest.raises(QectomyError, match=message):
        join(device)


def test_processes_find_each_other_again():
    """As where one script of several processes converts, and converts again."""

    def act(processes):
        found = [processes.all_gather(processes.rank)]
        again = join("cpu")
        with again.collective():
            found.append(again.all_gather(10 + again.rank))
        return found, again.device

    assert launched(2, act) == [([[0, 1], [10, 11]], "cpu:0")] * 2
