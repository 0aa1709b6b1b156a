"""The window over a set that streams, with stand-ins for the GPU: its order of things."""

import ctypes
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from training import digest, make_trainer, patterns

pytest.importorskip("cycnn.gpu.pinned")

from cycnn import data
from cycnn.data import window
from cycnn.gpu import device as gpu_device
from cycnn.gpu import pinned
from cycnn.gpu import stream as gpu_stream

TRAIN = patterns(200)


class Ring:
    """A PinnedRing whose copies are done at once."""

    def __init__(self, slots, nbytes, device_index):
        self.slots = [
            SimpleNamespace(array=np.zeros(nbytes, np.uint8), copied=None)
            for _ in range(slots)
        ]
        self.taken = 0

    def acquire(self):
        self.taken += 1
        return self.slots[self.taken % len(self.slots)]

    def send(self, slot, pieces):
        for offset, nbytes, target in pieces:
            assert offset + nbytes <= slot.array.nbytes
            ctypes.memmove(target, slot.array.ctypes.data + offset, nbytes)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    stream = SimpleNamespace(wait=lambda event: None)
    gpu = SimpleNamespace(compute=stream, copy=stream)
    event = SimpleNamespace(record=lambda stream: None)
    monkeypatch.setattr(gpu_device, "get", lambda index: gpu)
    monkeypatch.setattr(gpu_stream, "Event", lambda index: event)
    monkeypatch.setattr(pinned, "PinnedRing", Ring)


def check(batch_size, first=0, ahead=0, epoch=3):
    """Whether each batch is in the window when it is used, and so many more."""
    loader = data.DataLoader(TRAIN, batch_size, shuffle=True, seed=1, device="cpu")
    order = loader.order(epoch).numpy()
    seen = window.Window(loader)
    places = seen.order().numpy()
    assert places.max() < seen.rows
    seen.begin(epoch, first)
    try:
        for start in range(first, len(order), batch_size):
            stop = start + batch_size
            seen.reach(start, stop + ahead)
            at, index = places[start : stop + ahead], order[start : stop + ahead]
            np.testing.assert_array_equal(seen.images.array[at], TRAIN.images[index])
            np.testing.assert_array_equal(seen.labels.array[at], TRAIN.labels[index])
    finally:
        seen.end()
        seen.end()  # a second one does nothing
    assert not [t for t in threading.enumerate() if t.name == "cycnn-window"]
    return seen.rows


@pytest.mark.parametrize("batch_size", [1, 7, 32, 150, 200, 1000])
@pytest.mark.parametrize("slot_bytes", [1, 40 * 32, 40 * 64, 1 << 20])
def test_batches_are_there_when_they_are_used(batch_size, slot_bytes, monkeypatch):
    monkeypatch.setattr(window, "_SLOT_BYTES", slot_bytes)
    rows = check(batch_size)
    assert rows <= 3 * max(batch_size, slot_bytes // 40)
    check(batch_size, ahead=batch_size)
    check(batch_size, first=min(3 * batch_size, 199 // batch_size * batch_size))


@pytest.mark.parametrize("batch_size", [32, 150, 1000])
def test_training_through_the_window(batch_size, monkeypatch):
    monkeypatch.setattr(window, "_SLOT_BYTES", 40 * 64)
    digests = []
    for streams in (False, True):
        trainer = make_trainer()
        trainer.capture = True
        if streams:
            monkeypatch.setattr(data.DataLoader, "resident", lambda self: None)
        trainer.fit(TRAIN, 3, batch_size, seed=5)
        digests.append(digest(trainer))
    assert digests[0] == digests[1]


def test_leaving_an_epoch_ends_the_thread(monkeypatch):
    monkeypatch.setattr(window, "_SLOT_BYTES", 1)
    loader = data.DataLoader(TRAIN, 10, seed=1, device="cpu")
    seen = window.Window(loader)
    for steps in (0, 1, 5):
        seen.begin(0, 0)
        for step in range(steps):
            seen.reach(10 * step, 10 * step + 10)
        seen.end()
    assert not [t for t in threading.enumerate() if t.name == "cycnn-window"]


def test_what_fails_in_the_thread_is_raised_where_it_is_used(monkeypatch):
    seen = window.Window(data.DataLoader(TRAIN, 10, seed=1, device="cpu"))

    def fail(*args, **options):
        raise OSError("the disk is gone")

    monkeypatch.setattr(np, "take", fail)
    seen.begin(0, 0)
    with pytest.raises(OSError, match="the disk is gone"):
        seen.reach(0, 10)
    seen.end()


def test_a_mapped_set(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", TRAIN.images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    train = data.ArrayDataset(mapped, TRAIN.labels)
    assert np.shares_memory(train.images, mapped)
    monkeypatch.setitem(globals(), "TRAIN", train)
    check(32)
