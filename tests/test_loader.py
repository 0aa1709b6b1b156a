"""Datasets, and loaders on the CPU; the streaming road too, with a ring of our own."""

import gc
import threading
import time
import weakref

import numpy as np
import pytest

import cycnn
from cycnn import DataError, Tensor, tensor
from cycnn.data import ArrayDataset, DataLoader, loader
from cycnn.devices import CPU
from cycnn.ops import reference


def make(count=10, shape=(1, 3, 2), dtype="uint8", **options):
    """Image i is filled with i, modulo 256 for uint8; its label is i % 7."""
    images = np.arange(count).reshape(-1, *[1] * len(shape)) * np.ones(shape)
    return ArrayDataset(images.astype(dtype), np.arange(count) % 7, **options)


def collect(batches):
    batches = list(batches)
    return (
        np.concatenate([x.numpy() for x, _ in batches]),
        np.concatenate([labels.numpy() for _, labels in batches]),
    )


# datasets


def test_arrays_that_fit_are_shared():
    for dtype in ("uint8", "float32"):
        images = np.zeros((3, 1, 2, 2), dtype)
        labels = np.zeros(3, np.int32)
        dataset = ArrayDataset(images, labels)
        assert dataset.images is images or dataset.images.base is images
        assert np.shares_memory(dataset.labels, labels)


@pytest.mark.parametrize(
    "dtype, low, high, becomes",
    [
        ("float64", -1, 1, "float32"),
        ("float16", -1, 1, "float32"),
        (">f4", -1, 1, "float32"),
        ("int64", 0, 255, "uint8"),
        ("int64", 0, 256, "float32"),
        ("int16", -1, 255, "float32"),
        ("bool", 0, 1, "uint8"),
    ],
)
def test_other_images_are_converted(dtype, low, high, becomes):
    images = np.array([low, high]).reshape(2, 1, 1, 1).astype(dtype)
    dataset = ArrayDataset(images, [0, 1])
    assert dataset.images.dtype == becomes and dataset.images.dtype.isnative
    assert dataset.images.ravel().tolist() == [low, high]


def test_images_become_contiguous_once():
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(0, 2, 1)
    dataset = ArrayDataset(images, [0, 1])
    assert dataset.images.shape == (2, 1, 4, 3) and dataset.images.flags.c_contiguous
    np.testing.assert_array_equal(dataset.images[:, 0], images)


def test_vectors_and_tensors_are_images_too():
    images, labels = Tensor(np.eye(3), "cpu"), Tensor([0, 1, 2], "cpu")
    dataset = ArrayDataset(images, labels)
    assert dataset.image_shape == (3,) and dataset.classes == 3


def test_number_of_classes():
    assert make(5).classes == 5
    assert make(5, classes=10).classes == 10
    assert make(0).classes == 0


@pytest.mark.parametrize(
    "images, labels, options, error, message",
    [
        (np.zeros((3, 2, 2)), [0, 1], {}, DataError, "3 images but 2 labels"),
        (np.zeros(3), [0, 1, 2], {}, DataError, r"images of shape \(3,\)"),
        (np.zeros((1,) * 5), [0], {}, DataError, r"images of shape \(1, 1, 1, 1, 1\)"),
        (np.zeros((2, 2, 2), complex), [0, 1], {}, TypeError, "complex128"),
        (np.array([["a"], ["b"]]), [0, 1], {}, TypeError, "expected real numbers"),
        (np.zeros((2, 2, 2)), np.eye(2, dtype=int), {}, DataError, "one-hot"),
        (np.zeros((2, 2, 2)), [0.0, 1.0], {}, TypeError, "labels of dtype float64"),
        (np.zeros((2, 2, 2)), [True, False], {}, TypeError, "labels of dtype bool"),
        (np.zeros((2, 2, 2)), [0, -3], {}, DataError, "label 1 is -3: .* from 0"),
        (np.zeros((2, 2, 2)), [2, 1], {"classes": 2}, DataError, "0 is 2: .* 0 to 1"),
        (np.zeros((2, 2, 2)), [0, 2**40], {}, DataError, "do not fit int32"),
        (np.zeros((2, 2, 2)), [0, 1], {"classes": 0}, ValueError, "classes must be 1"),
        (np.zeros((2, 2, 2)), [0, 1], {"scale": np.nan}, ValueError, "scale .* nan"),
        (np.zeros((2, 2, 2)), [0, 1], {"shift": np.inf}, ValueError, "shift .* inf"),
    ],
)
def test_what_is_no_dataset(images, labels, options, error, message):
    with pytest.raises(error, match=message):
        ArrayDataset(images, labels, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_the_first_bad_pixel_is_named(value):
    images = np.zeros((5, 1, 4, 3))
    images[2, 0, 3, 1] = images[4, 0, 0, 0] = value
    with pytest.raises(DataError, match=r"image 2 holds .* at images\[2, 0, 3, 1\]"):
        ArrayDataset(images, np.zeros(5, int))


def test_a_bad_pixel_far_behind_is_found(monkeypatch):
    monkeypatch.setattr("cycnn.data.dataset._CHUNK", 7)
    images = np.zeros((50, 3, 3), np.float32)
    images[49, 2, 2] = np.nan
    with pytest.raises(DataError, match=r"images\[49, 2, 2\]"):
        ArrayDataset(images, np.zeros(50, int))


def test_parts():
    dataset = make(10, scale=2.0, shift=1.0, classes=9)
    part = dataset.subset(4)
    assert len(part) == 4 and np.shares_memory(part.images, dataset.images)
    assert (part.scale, part.shift, part.classes) == (2.0, 1.0, 9)
    assert len(dataset.subset(99)) == 10 and len(dataset.subset(0)) == 0
    assert dataset[-1:2:-3].labels.tolist() == [2, 6, 3]
    with pytest.raises(ValueError, match="n=-1"):
        dataset.subset(-1)
    with pytest.raises(TypeError, match="slice, got 3"):
        dataset[3]


def test_repr_tells_what_it_is():
    assert repr(make(3, classes=10, shift=-0.5)) == (
        "ArrayDataset(3 images of shape (1, 3, 2), uint8, 10 classes, scale=1, "
        "shift=-0.5)"
    )


# loaders


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(1, 3, 2), (3, 5, 5), (7,)])
def test_batches_in_order(dtype, shape):
    dataset = make(10, shape, dtype, scale=0.5, shift=-1.0)
    batches = list(DataLoader(dataset, 4, device="cpu"))
    assert [x.shape for x, _ in batches] == [(4, *shape), (4, *shape), (2, *shape)]
    for x, labels in batches:
        assert x.dtype == np.float32 and labels.dtype == np.int32
        assert x.device == labels.device == CPU and labels.shape == x.shape[:1]
    images, labels = collect(batches)
    np.testing.assert_array_equal(images, dataset.images * np.float32(0.5) - 1)
    np.testing.assert_array_equal(labels, dataset.labels)


@pytest.mark.parametrize(
    "count, batch_size, drop_last, sizes",
    [
        (10, 4, False, [4, 4, 2]),
        (10, 4, True, [4, 4]),
        (8, 4, True, [4, 4]),
        (3, 4, False, [3]),
        (3, 4, True, []),
        (0, 4, False, []),
        (5, 1, False, [1] * 5),
    ],
)
def test_sizes_of_batches(count, batch_size, drop_last, sizes):
    batches = DataLoader(make(count), batch_size, True, drop_last, device="cpu")
    assert len(batches) == len(sizes)
    assert [len(x) for x, _ in batches] == sizes


def test_order_is_the_permutation_of_seed_and_epoch():
    dataset = make(100)
    batches = DataLoader(dataset, 7, shuffle=True, seed=2**64 - 3, device="cpu")
    orders = []
    for epoch in range(3):
        images, labels = collect(batches)
        order = images[:, 0, 0, 0].astype(int)
        expected = reference.permutation(100, 2**64 - 3, epoch, CPU)
        np.testing.assert_array_equal(order, expected)
        np.testing.assert_array_equal(labels, order % 7)
        orders.append(order.tolist())
    assert sorted(orders[0]) == list(range(100))
    assert orders[0] != orders[1] != orders[2]
    batches.set_epoch(1)
    assert collect(batches)[0][:, 0, 0, 0].tolist() == orders[1]
    assert batches.epoch == 2


def test_an_epoch_begins_with_iter_not_with_its_first_batch():
    batches = DataLoader(make(50), 50, shuffle=True, seed=1, device="cpu")
    first, second = iter(batches), iter(batches)
    np.testing.assert_array_equal(
        collect(second)[0][:, 0, 0, 0], reference.permutation(50, 1, 1, CPU)
    )
    np.testing.assert_array_equal(
        collect(first)[0][:, 0, 0, 0], reference.permutation(50, 1, 0, CPU)
    )


def test_the_last_epoch_is_followed_by_the_first():
    batches = DataLoader(make(3), 3, shuffle=True, device="cpu")
    batches.set_epoch(2**32 - 1)
    list(batches)
    assert batches.epoch == 0


def test_manual_seed_makes_the_order():
    def orders():
        cycnn.manual_seed(5)
        loaders = [DataLoader(make(50), 50, True, device="cpu") for _ in range(2)]
        return [collect(each)[1].tolist() for each in loaders]

    first, again = orders(), orders()
    assert first == again and first[0] != first[1]


def test_batches_are_the_caller_s_own():
    dataset = make(4, dtype="float32")
    for x, labels in DataLoader(dataset, 4, device="cpu"):
        x.array[...] = -1
        labels.array[...] = -1
    assert dataset.images.min() == 0 and dataset.labels.min() == 0


def test_read_only_arrays_can_be_loaded():
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1)
    labels = np.arange(6, dtype=np.int32)
    images.flags.writeable = labels.flags.writeable = False
    found = collect(DataLoader(ArrayDataset(images, labels), 4, device="cpu"))
    assert found[0].ravel().tolist() == found[1].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (dict(batch_size=0), ValueError, "batch_size must be 1 or more, got 0"),
        (dict(batch_size=-4), ValueError, "batch_size must be 1 or more, got -4"),
        (dict(batch_size=1.5), TypeError, "batch_size must be an integer, got 1.5"),
        (dict(seed=-1), ValueError, "seed must be from 0"),
        (dict(seed=2**64), ValueError, "seed must be from 0"),
        (dict(seed="one"), TypeError, "seed must be an integer, got 'one'"),
        (dict(device="gpu"), ValueError, "unknown device 'gpu'"),
        (dict(dataset=np.zeros((3, 1, 2, 2))), TypeError, "ArrayDataset.* got ndarray"),
    ],
)
def test_what_makes_no_loader(arguments, error, message):
    arguments = {"dataset": make(3), "batch_size": 2, "device": "cpu", **arguments}
    with pytest.raises(error, match=message):
        DataLoader(**arguments)


@pytest.mark.parametrize(
    "epoch, error", [(-1, ValueError), (2**32, ValueError), (0.5, TypeError)]
)
def test_what_is_no_epoch(epoch, error):
    with pytest.raises(error):
        DataLoader(make(3), 2, device="cpu").set_epoch(epoch)


# the streaming road


class Slot:
    def __init__(self, nbytes):
        self.array = np.empty(nbytes, np.uint8)
        self.target = None  # of a copy that has not been done yet
        self.waited_for = True
        self.lock = threading.Lock()

    def settle(self):
        with self.lock:
            if self.target is not None:
                self.target.content = self.array.copy()
                self.target = None


class Ring:
    """Stands in for PinnedRing: a copy happens at the last moment that is allowed.

    That is when its slot is acquired again, or when the target is read, so that who
    refills a slot too early gets wrong batches.
    """

    def __init__(self, slots, nbytes, fail_at=None):
        self.slots = [Slot(nbytes) for _ in range(slots)]
        self.acquired = self.uploaded = 0
        self.fail_at = fail_at

    def acquire(self):
        if self.acquired == self.fail_at:
            self.fail_at = None
            raise MemoryError("no slot")
        slot = self.slots[self.acquired % len(self.slots)]
        self.acquired += 1
        slot.settle()
        slot.waited_for = True
        slot.array[:] = 0xEE
        return slot

    def upload(self, slot, nbytes):
        slot.target = Target(slot)
        slot.waited_for = False
        self.uploaded += 1
        return slot.target


class Target:
    def __init__(self, slot):
        self.slot, self.content = slot, None


@pytest.fixture
def streaming(monkeypatch):
    """Loaders on the CPU that stream as they do to a GPU."""

    rings = []

    def open_ring(nbytes, device):
        rings.append(Ring(3, nbytes))
        return rings[-1]

    def view(buffer, offset, shape, dtype, device):
        buffer.slot.settle()
        nbytes = int(np.prod(shape)) * dtype.itemsize
        part = buffer.content[offset : offset + nbytes]
        return tensor.from_array(part.view(dtype).reshape(shape))

    monkeypatch.setattr(DataLoader, "resident", lambda self: None)
    monkeypatch.setattr(loader, "_open_ring", open_ring)
    monkeypatch.setattr(loader, "_view", view)
    yield rings
    assert loader_threads() == []
    # no copy may be on its way out of memory that is about to be freed
    assert all(slot.waited_for for ring in rings for slot in ring.slots)


def loader_threads():
    return [one for one in threading.enumerate() if one.name == "cycnn-loader"]


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize(
    "count, batch_size", [(100, 7), (8, 4), (3, 10**12), (1, 1), (40, 1)]
)
@pytest.mark.parametrize(
    "shuffle, drop_last", [(False, False), (True, False), (True, True)]
)
def test_streaming_gives_the_same_bits(
    streaming, monkeypatch, dtype, count, batch_size, shuffle, drop_last
):
    dataset = make(count, (2, 3, 5), dtype, scale=1 / 255, shift=-0.5)
    options = dict(shuffle=shuffle, drop_last=drop_last, seed=3, device="cpu")
    streamed = list(DataLoader(dataset, batch_size, **options))
    monkeypatch.undo()
    gathered = list(DataLoader(dataset, batch_size, **options))
    assert len(streamed) == len(gathered)
    for (x, labels), (other_x, other_labels) in zip(streamed, gathered):
        assert x.shape == other_x.shape
        assert x.numpy().tobytes() == other_x.numpy().tobytes()
        assert labels.numpy().tolist() == other_labels.numpy().tolist()


def test_streaming_keeps_no_more_than_the_ring_ahead(streaming):
    batches = iter(DataLoader(make(100), 5, device="cpu"))
    next(batches)
    time.sleep(0.1)
    ring = streaming[0]
    assert ring.uploaded == 1 and ring.acquired <= 4


@pytest.mark.parametrize("after", [1, 3, 20])
def test_leaving_midway_ends_the_thread_and_frees_the_ring(streaming, after):
    batches = DataLoader(make(100), 5, device="cpu")
    for number, _ in enumerate(batches, 1):
        if number == after:
            break
    assert loader_threads() == []
    ring = weakref.ref(streaming.pop())
    assert ring() is None


def test_an_iterator_that_is_dropped_ends_its_thread(streaming):
    batches = iter(DataLoader(make(100), 5, device="cpu"))
    next(batches)
    assert len(loader_threads()) == 1
    del batches
    gc.collect()
    assert loader_threads() == []


def test_an_iterator_that_never_began_has_no_thread(streaming):
    batches = iter(DataLoader(make(100), 5, device="cpu"))
    assert loader_threads() == [] and streaming == []
    del batches


def test_two_iterations_at_once(streaming):
    batches = DataLoader(make(50), 5, device="cpu")
    for (x, _), (other, _) in zip(batches, batches):
        np.testing.assert_array_equal(x.numpy(), other.numpy())


@pytest.mark.parametrize("fail_at", [0, 1, 5])
def test_an_error_in_the_thread_reaches_the_caller(streaming, monkeypatch, fail_at):
    monkeypatch.setattr(
        loader, "_open_ring", lambda nbytes, device: Ring(3, nbytes, fail_at)
    )
    seen = 0
    with pytest.raises(MemoryError, match="no slot"):
        for _ in DataLoader(make(100), 5, device="cpu"):
            seen += 1
    assert seen == fail_at


def test_an_error_of_the_caller_ends_the_thread(streaming):
    with pytest.raises(ZeroDivisionError):
        for _ in DataLoader(make(100), 5, device="cpu"):
            1 / 0
    assert loader_threads() == []
