"""A loader on the GPU yields what it yields on the CPU, on each of its roads."""

import gc
import threading

import numpy as np
import pytest

from cycnn.data import ArrayDataset, DataLoader, loader
from cycnn.gpu import memory

pytestmark = pytest.mark.gpu

# image sizes that are no multiple of 4 move the labels of a packed batch
SHAPES = [(1, 28, 28), (3, 5, 7), (1,)]


def random_dataset(count, shape, dtype):
    drawn = np.random.default_rng(count)
    if dtype == "uint8":
        images = drawn.integers(0, 256, (count, *shape), np.uint8)
    else:
        images = drawn.standard_normal((count, *shape), np.float32)
    return ArrayDataset(images, drawn.integers(0, 10, count), 1 / 255, -0.5, 10)


@pytest.fixture(params=["resident", "streaming"])
def road(request, monkeypatch):
    """Takes the road that is meant, and checks that no other was taken."""
    methods = {"resident": "_gather", "streaming": "_stream"}
    taken = []
    for name in methods.values():
        method = getattr(DataLoader, name)

        def note(self, epoch, name=name, method=method):
            if self.device.is_cuda:
                taken.append(name)
            return method(self, epoch)

        monkeypatch.setattr(DataLoader, name, note)
    if request.param == "streaming":
        monkeypatch.setattr(loader, "_free_memory", lambda device: 0)
    yield request.param
    assert set(taken) == {methods[request.param]}


@pytest.fixture
def nothing_left():
    gc.collect()
    before = memory.stats()["live_buffers"], memory.stats()["live_bytes"]
    yield
    gc.collect()
    assert (memory.stats()["live_buffers"], memory.stats()["live_bytes"]) == before
    assert "cycnn-loader" not in [thread.name for thread in threading.enumerate()]


def assert_same_bits(batches, others):
    # all of them before the first is looked at: the host runs ahead of the GPU
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for (x, labels), (other_x, other_labels) in zip(batches, others):
        assert x.device == labels.device == "cuda:0"
        assert x.shape == other_x.shape and x.dtype == other_x.dtype
        assert x.numpy().tobytes() == other_x.numpy().tobytes()
        assert labels.numpy().tolist() == other_labels.numpy().tolist()


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count, batch_size", [(1000, 96), (128, 128), (5, 9), (33, 1)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_same_bits_as_on_the_cpu(
    nothing_left, road, dtype, shape, count, batch_size, shuffle
):
    dataset = random_dataset(count, shape, dtype)
    options = dict(shuffle=shuffle, seed=2**63 + 1)
    there = DataLoader(dataset, batch_size, device="cuda", **options)
    here = DataLoader(dataset, batch_size, device="cpu", **options)
    for _ in range(2):  # two epochs
        assert_same_bits(there, here)


def test_drop_last(nothing_left, road):
    dataset = random_dataset(100, (1, 4, 4), "uint8")
    there = DataLoader(dataset, 32, drop_last=True, device="cuda")
    assert_same_bits(there, DataLoader(dataset, 32, drop_last=True, device="cpu"))
    assert [len(x) for x, _ in there] == [32, 32, 32]


def test_leaving_midway(nothing_left, road):
    dataset = random_dataset(1000, (1, 28, 28), "uint8")
    batches = DataLoader(dataset, 10, shuffle=True, seed=1, device="cuda")
    for after in (1, 2, 7):
        for number, _ in enumerate(batches, 1):
            if number == after:
                break
    other = DataLoader(dataset, 10, shuffle=True, seed=1, device="cpu")
    other.set_epoch(batches.epoch)
    assert_same_bits(batches, other)


def test_a_set_is_on_the_gpu_once_and_not_longer_than_its_loaders(nothing_left):
    dataset = random_dataset(1000, (1, 28, 28), "uint8")
    before = memory.stats()["live_bytes"]
    held = dataset.images.nbytes + dataset.labels.nbytes
    loaders = [DataLoader(dataset, 100, device="cuda") for _ in range(3)]
    for batches in loaders:
        for _ in batches:
            pass
    del _
    assert held <= memory.stats()["live_bytes"] - before < 2 * held
    del loaders, batches
    gc.collect()
    assert memory.stats()["live_bytes"] == before


def test_only_a_set_that_fits_becomes_resident(nothing_left, monkeypatch):
    dataset = random_dataset(64, (1, 8, 8), "uint8")
    nbytes = dataset.images.nbytes + dataset.labels.nbytes
    for free, resident in ((4 * nbytes, True), (4 * nbytes - 1, False)):
        monkeypatch.setattr(loader, "_free_memory", lambda device, free=free: free)
        batches = DataLoader(dataset, 8, device="cuda")
        next(iter(batches))
        assert (batches._tensors is not None) == resident


def test_an_empty_set(nothing_left):
    dataset = ArrayDataset(np.zeros((0, 1, 2, 2), np.uint8), np.zeros(0, int))
    assert list(DataLoader(dataset, 4, device="cuda")) == []
