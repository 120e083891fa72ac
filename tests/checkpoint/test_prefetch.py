"""Layers come in order with their numbers, one ahead at most, their errors where they belong; no thread stays."""

import os
import threading
import time

import pytest
import torch
from damage import edit_weights
from safetensors.torch import load_file

from qectomy.checkpoint import prefetch
from qectomy.checkpoint.checkpoint import open_checkpoint
from qectomy.checkpoint.prefetch import Layers, LayersAhead, page_cache, read_layers
from qectomy.errors import NonFiniteError, UnreadableError

CPU = torch.device("cpu")
KINDS = [Layers, LayersAhead]


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert threads() == []


def layer_of(number):
    return {"weight": torch.tensor([float(number)])}


class Recorded:
    """Reads layers, and knows which were begun and by which thread."""

    def __init__(self, fails=()):
        self.begun, self.by, self.fails = [], [], dict(fails)

    def __call__(self, layer):
        self.begun.append(layer)
        self.by.append(threading.current_thread())
        if layer in self.fails:
            raise self.fails[layer]
        return layer_of(layer)


def settled(read, count):
    """Wait until so many layers were begun, and a little longer, lest there be one more."""
    until = time.monotonic() + 5
    while len(read.begun) < count and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.02)
    return read.begun


@pytest.mark.parametrize("kind", KINDS)
def test_layers_come_in_order(kind):
    with kind(range(2, 6), Recorded()) as layers:
        assert [layers.take(layer)["weight"].item() for layer in range(2, 6)] == [2, 3, 4, 5]


@pytest.mark.parametrize("kind", KINDS)
def test_another_one_than_announced_is_a_mistake(kind):
    with kind(range(3), Recorded()) as layers:
        layers.take(0)
        with pytest.raises(AssertionError, match="in the order in which they were announced"):
            layers.take(2)


def test_without_a_thread_one_is_read_when_it_is_taken_and_the_next_one_is_told():
    read, told = Recorded(), []
    with Layers(range(3), read, told.append) as layers:
        assert (read.begun, told) == ([], [])
        for layer in range(3):
            layers.take(layer)
            assert read.begun == list(range(layer + 1))
            assert told == list(range(1, min(layer + 2, 3)))
    assert set(read.by) == {threading.current_thread()}


def test_the_thread_is_one_ahead_and_never_two():
    read = Recorded()
    with LayersAhead(range(4), read) as layers:
        for layer in range(4):
            assert settled(read, layer + 1) == list(range(layer + 1))
            layers.take(layer)
        assert settled(read, 4) == [0, 1, 2, 3]
    assert len(set(read.by)) == 1
    assert threading.current_thread() not in read.by


def test_one_is_read_while_the_one_before_is_in_use():
    """Each waits for the other: the reader of layer 1 for layer 0 to be in use, and its user for the reader."""
    in_use, reading = threading.Event(), threading.Event()

    def read(layer):
        if layer == 1:
            reading.set()
            assert in_use.wait(5)
        return layer_of(layer)

    with LayersAhead(range(2), read) as layers:
        layers.take(0)
        assert reading.wait(5)
        in_use.set()
        assert layers.take(1)["weight"] == 1


def test_what_was_taken_is_not_held():
    taken = []

    class Held:
        alive = 0

        def __init__(self, layer):
            Held.alive += 1

        def __del__(self):
            Held.alive -= 1

    read = Recorded()

    def held(layer):
        read(layer)
        return Held(layer)

    def receive(one):
        taken.append(Held.alive)
        return {}

    with LayersAhead(range(4), held, receive) as layers:
        for layer in range(4):
            settled(read, layer + 1)
            layers.take(layer)
    assert taken == [1, 1, 1, 1]
    assert Held.alive == 0


def test_the_caller_ends_what_the_thread_began():
    threads_of = []

    def receive(tensors):
        threads_of.append(threading.current_thread())
        return {name: tensor + 10 for name, tensor in tensors.items()}

    with LayersAhead(range(2), Recorded(), receive) as layers:
        assert [layers.take(layer)["weight"].item() for layer in range(2)] == [10, 11]
    assert threads_of == [threading.current_thread()] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error", [NonFiniteError("layer 2 holds NaN"), UnreadableError("layer 2 is gone"), KeyError(2)]
)
def test_an_error_comes_with_its_own_layer_and_not_before(kind, error):
    read = Recorded({2: error})
    with kind(range(5), read) as layers:
        for layer in range(2):
            layers.take(layer)
            settled(read, layer + 1)
        with pytest.raises(type(error)) as caught:
            layers.take(2)
    assert caught.value is error
    assert read.begun == [0, 1, 2]


@pytest.mark.parametrize("error", [ValueError("elsewhere"), KeyboardInterrupt()])
def test_the_thread_ends_with_the_block_also_in_the_middle_of_a_layer(error):
    begun, ended = threading.Event(), []

    def read(layer):
        if layer == 1:
            begun.set()
            time.sleep(0.1)
        ended.append(layer)
        return layer_of(layer)

    def use():
        with LayersAhead(range(9), read) as layers:
            layers.take(0)
            assert begun.wait(5)
            assert len(threads()) == 1
            raise error

    with pytest.raises(type(error)):
        use()
    assert threads() == []
    assert ended == [0, 1]


def test_a_block_in_which_nothing_is_taken():
    with LayersAhead(range(3), Recorded()):
        assert len(threads()) == 1
    with LayersAhead((), Recorded()):
        pass


# Of a checkpoint


class HostCopies:
    """What copies to a device, but that there is none: the device is the host."""

    made = 0

    def __init__(self, device):
        assert device.type == "cuda"
        HostCopies.made += 1

    def send(self, tensors):
        return {name: tensor.clone() for name, tensor in tensors}, threading.current_thread()

    def receive(self, sent, thread):
        assert thread is not threading.current_thread()
        return sent

    def locked(self, tensors):
        assert threading.current_thread() is not threading.main_thread()
        return dict(tensors)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bf16", "gpt2"])
@pytest.mark.parametrize("on_host", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_numbers_are_those_of_the_file(device, on_host, name, dtype, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr(prefetch, "CudaCopies", HostCopies)
    source, made = open_checkpoint(tiny_checkpoint(name)), HostCopies.made
    stored = load_file(source.folder / "model.safetensors")
    with read_layers(source, range(2), dtype, torch.device(device), on_host=on_host) as layers:
        for layer in range(2):
            found, prefix = layers.take(layer), source.prefix(layer)
            expected = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
            assert found.keys() == {name for name in expected if not name.endswith((".bias", "masked_bias"))} | {
                name for name in found if name.endswith(".bias")
            }
            for key, tensor in found.items():
                assert tensor.dtype == dtype or (dtype is None and tensor.dtype == expected[key].dtype)
                assert torch.equal(tensor, expected[key].to(tensor.dtype))
    assert HostCopies.made == made + (device == "cuda")


@pytest.mark.parametrize("on_host", [False, True])
def test_indices_keep_their_type(on_host, tiny_reduced, monkeypatch):
    monkeypatch.setattr(prefetch, "CudaCopies", HostCopies)
    source = open_checkpoint(tiny_reduced(("select", "select")), reduced=True)
    for device in ("cpu", "cuda"):
        with read_layers(source, range(2), torch.float64, torch.device(device), on_host=on_host) as layers:
            kinds = {tensor.dtype for tensor in layers.take(0).values()}
        assert torch.float64 in kinds
        assert [kind for kind in kinds if not kind.is_floating_point]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_nan_in_a_layer_is_said_when_it_is_its_turn(device, tiny_copy, monkeypatch):
    monkeypatch.setattr(prefetch, "CudaCopies", HostCopies)
    folder = tiny_copy("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors[name][0].fill_(torch.nan))
    with read_layers(open_checkpoint(folder), range(2), torch.float32, torch.device(device)) as layers:
        assert layers.take(0)
        with pytest.raises(NonFiniteError, match=f"model.safetensors: tensor {name} holds NaN or Inf"):
            layers.take(1)


# The copies


class Stream:
    """What a stream of a CUDA device is asked to do."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __enter__(self):
        self.log.append(f"{self.name} on")

    def __exit__(self, *_):
        self.log.append(f"{self.name} off")

    def record_event(self):
        self.log.append(f"{self.name} copied")
        return "copied"

    def wait_event(self, event):
        self.log.append(f"{self.name} waits: {event}")


def test_a_copy_is_begun_on_its_own_stream_and_waited_for_on_the_callers(monkeypatch):
    log = []
    own, current = Stream(log, "own"), Stream(log, "current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: own)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: log.append("lock") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: log.append("copy") or tensor)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append(f"kept for {stream.name}"))
    copies = prefetch.CudaCopies(torch.device("cuda", 1))
    tensors = {"a": torch.ones(1), "b": torch.ones(2)}
    sent = copies.send(iter(tensors.items()))
    assert log == ["own on", "lock", "copy", "lock", "copy", "own copied", "own off"]
    log.clear()
    assert copies.receive(*sent) == tensors
    assert log == ["current waits: copied", "kept for current", "kept for current"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_device_the_numbers_arrive_whole_while_it_computes():
    device, shape = torch.device("cuda"), (1024, 1024)
    copies, busy = prefetch.CudaCopies(device), torch.randn(4096, 4096, device=device)

    def read(layer):
        return copies.send((str(i), torch.full(shape, float(layer * 10 + i))) for i in range(8))

    with LayersAhead(range(12), read, lambda sent: copies.receive(*sent)) as layers:
        sums = []
        for layer in range(12):
            tensors = layers.take(layer)
            for _ in range(20):
                busy = torch.nn.functional.normalize(busy @ busy)
            sums.append([tensor.double().sum() for tensor in tensors.values()])
            del tensors
    found = torch.tensor(sums).view(12, 8) / (shape[0] * shape[1])
    assert torch.equal(found, torch.arange(12.0)[:, None] * 10 + torch.arange(8.0))


# The hint


NO_HINTS = not hasattr(os, "posix_fadvise")


@pytest.mark.skipif(NO_HINTS, reason="the system takes no hints")
def test_the_hint_covers_the_bytes_of_the_layer(tiny_checkpoint, monkeypatch):
    source = open_checkpoint(tiny_checkpoint("llama"))
    data = (source.folder / "model.safetensors").read_bytes()
    asked = []
    monkeypatch.setattr(prefetch, "BYTES_A_HINT", 100)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, length, how: asked.append((start, length, how)))
    page_cache(source)(1)
    assert {how for _, _, how in asked} == {os.POSIX_FADV_WILLNEED}
    seen = set().union(*(range(start, start + length) for start, length, _ in asked))
    layer = source.read_layer(1)
    wanted = {at for tensor in layer.values() for at in places(data, tensor)}
    assert wanted <= seen
    assert len(seen) < len(wanted) + 100 * len(layer)
    assert {length for _, length, _ in asked} == {100}


def places(data, tensor):
    """Where the bytes of a tensor lie in a file, which holds them once."""
    own = tensor.numpy().tobytes()
    assert data.count(own) == 1
    return range(data.index(own), data.index(own) + len(own))


@pytest.mark.skipif(NO_HINTS, reason="the system takes no hints")
def test_the_hint_is_one(tiny_copy, monkeypatch):
    """Without the call, and without the file, layers are read or not as if nothing had been hinted."""
    source = open_checkpoint(tiny_copy("llama"))
    soon = page_cache(source)
    monkeypatch.delattr(os, "posix_fadvise")
    page_cache(source)(1)
    monkeypatch.undo()
    (source.folder / "model.safetensors").unlink()
    soon(1)
