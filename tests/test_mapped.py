"""Sets in memory-mapped files: nothing copies them, and only what is used is read."""

import queue
import threading
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cycnn.data import ArrayDataset, DataLoader, channel_statistics, loader

SHAPE = 3, 64, 64
COUNT = (256 << 20) // (3 * 64 * 64)
SMALL = 32 << 20  # what counts as little beside the 256 MB of the file

TRAINING = """
import resource
import numpy as np
import cycnn
from cycnn import Trainer, data, nn, optim

images = np.load({path!r}, mmap_mode="r")
labels = np.arange(len(images)) % 2
model = nn.Sequential(nn.Flatten(), nn.Linear(images[0].size, 2))
loss, optimizer = nn.CrossEntropyLoss(), optim.SGD(model.parameters(), lr=0.1)
trainer = Trainer(model, loss, optimizer)
train = data.ArrayDataset(images[:128], labels[:128])
trainer.fit(train, epochs=1, batch_size=64)  # takes what any training takes

status = open("/proc/self/status").read()
held = int(status.split("VmData:")[1].split()[0]) << 10
limit = held + images.nbytes // 4
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    np.array(images)
except MemoryError:
    print("the set is larger than memory")
train = data.ArrayDataset(images, labels, scale=1 / 255)
mean, std = data.channel_statistics(train)
batches = data.DataLoader(train, 64, shuffle=True, device="cpu")
print(sum(len(y) for _, y in batches) == len(images))
trainer.fit(train[-1280:], epochs=2, batch_size=64)
print(trainer.evaluate(train[:1280], batch_size=64)["loss"] > 0)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of 256 MB, nearly all holes; the first byte of an image tells which."""
    path = tmp_path_factory.mktemp("mapped") / "images.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (COUNT, *SHAPE))
    array[::1000, 0, 0, 0] = np.arange(len(array[::1000]))
    return path


@pytest.fixture
def dataset(path):
    images = np.load(path, mmap_mode="r")
    return ArrayDataset(images, np.arange(COUNT) % 2, scale=1 / 255)


def read_so_far(path):
    """Bytes of the file that this process has in its page table."""
    _, _, entry = Path("/proc/self/smaps").read_text().partition(str(path))
    return int(entry.split("Rss:")[1].split()[0]) << 10


@pytest.fixture
def little(path):
    """That a test neither allocates nor reads much."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < SMALL
    assert 0 < read_so_far(path) < SMALL


def test_a_mapped_array_is_kept(dataset, path):
    images = dataset.images
    assert not images.flags.owndata and not images.flags.writeable
    part = dataset[5:2000:1]
    assert np.shares_memory(part.images, images)
    assert part.images[995, 0, 0, 0] == 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_reads_its_batches_only(little, dataset, shuffle):
    batches = DataLoader(dataset, 16, shuffle=shuffle, seed=0, device="cpu")
    order = batches.order(0).numpy()
    for number, (images, labels) in zip(range(4), batches):
        index = order[16 * number : 16 * number + 16]
        expected = dataset.images[index] * np.float32(1 / 255)
        np.testing.assert_array_equal(images.numpy(), expected)
        assert labels.numpy().tolist() == (index % 2).tolist()


def test_the_streaming_thread_reads_its_batches_only(little, dataset):
    slot = SimpleNamespace(
        array=np.zeros(loader._batch_bytes(dataset, 16)[1], np.uint8)
    )
    ring = SimpleNamespace(acquire=lambda: slot)
    order = np.random.default_rng(0).permutation(COUNT).astype(np.int32)
    bounds = [(start, start + 16) for start in range(0, 64, 16)]
    free, ready = threading.Semaphore(len(bounds)), queue.SimpleQueue()
    loader._fill(dataset, order, bounds, ring, free, ready, threading.Event())
    assert [ready.get()[1:] for _ in bounds] == [(16, None)] * len(bounds)
    images = slot.array[: 16 * dataset.images[0].nbytes]
    np.testing.assert_array_equal(
        images.reshape(16, *SHAPE), dataset.images[order[48:64]]
    )


def test_statistics_take_little_memory(dataset):
    tracemalloc.start()
    mean, _ = channel_statistics(dataset)
    assert tracemalloc.get_traced_memory()[1] < SMALL
    tracemalloc.stop()
    expected = dataset.images[::1000, 0, 0, 0].sum() / (COUNT * 64 * 64)
    assert mean[0] == pytest.approx(expected) and mean[1] == 0


def test_floats_stay_mapped_and_are_checked(tmp_path):
    array = np.lib.format.open_memmap(
        tmp_path / "floats.npy", "w+", np.float32, (4096, 3, 32, 32)
    )
    array.flush()
    tracemalloc.start()
    mapped = np.load(tmp_path / "floats.npy", mmap_mode="r")
    dataset = ArrayDataset(mapped, np.zeros(4096, int))
    assert tracemalloc.get_traced_memory()[1] < mapped.nbytes / 2
    tracemalloc.stop()
    assert np.shares_memory(dataset.images, mapped)
    array[4000, 1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"images\[4000, 1, 2, 3\]"):
        ArrayDataset(mapped, np.zeros(4096, int))


def test_floats_at_an_odd_place_are_copied_once(tmp_path):
    """np.take would copy them all for every batch."""
    values = np.arange(60, dtype=np.float32).reshape(10, 6)
    (tmp_path / "raw").write_bytes(b"\0" + values.tobytes())
    mapped = np.memmap(tmp_path / "raw", np.float32, "r", offset=1, shape=(10, 6))
    assert not mapped.flags.aligned
    dataset = ArrayDataset(mapped, np.zeros(10, int))
    assert dataset.images.flags.aligned
    np.testing.assert_array_equal(dataset.images, values)


def test_a_set_larger_than_memory_trains(path, run_python):
    printed = run_python(TRAINING.format(path=str(path)), CUDA_VISIBLE_DEVICES="")
    assert printed.splitlines() == ["the set is larger than memory", "True", "True"]
