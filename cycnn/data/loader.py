"""Batches, in an order that depends on (seed, epoch) alone, on any device.

Three roads lead to the same numbers:

- on the CPU, rows are gathered from the dataset's own array;
- on a GPU, a set that fits stays there as it is stored (MNIST: 47 MB of uint8) and a
  kernel gathers and normalises from it;
- a larger one streams: a thread puts the raw rows of the next batches into pinned
  memory, one copy takes images and labels to the GPU while it computes. Recorded steps
  have a :class:`~.window.Window` for that.
"""

from __future__ import annotations

import functools
import math
import operator
import queue
import threading
import weakref

import numpy as np

from .. import random, tensor
from ..devices import CPU
from ..devices import device as as_device
from ..errors import DataError
from ..ops import for_device
from .augment import Augment
from .dataset import ArrayDataset

_SLOTS = 3  # one being filled, one on its way, one in reserve
_ALIGN = 256  # of labels behind the images; what cudaMalloc promises
_RESIDENT_SHARE = 4  # a set stays on the GPU if it takes 1/4 of the free memory or less

_residents = weakref.WeakKeyDictionary()  # dataset -> {device: its tensors there}


class DataLoader:
    """Iterates over a dataset in batches of float32 images and int32 labels.

    Of a :class:`TargetDataset` it yields float32 targets in the place of labels.

    Parameters
    ----------
    dataset : ArrayDataset
    batch_size : int
        The last batch is smaller where the numbers do not divide.
    shuffle : bool
        Take the images in an order made from ``seed`` and the epoch, the same on every
        device; otherwise in the dataset's order.
    drop_last : bool
        Leave out a last batch that is smaller than ``batch_size``.
    seed : int, optional
        From 0 to 2**64 - 1. By default drawn from :mod:`cycnn.random`, hence set by
        :func:`cycnn.manual_seed`.
    device : None, str or Device
        Where the batches are made; None is the default device.
    augment : Augment, optional
        What happens to the images at random, which depends on ``seed``, too.

    Attributes
    ----------
    epoch : int
        Number of the epoch that the next iteration runs through. It goes up by one
        whenever an iteration begins, so that iterating again gives another order;
        :meth:`set_epoch` chooses it.

    Notes
    -----
    An iteration that is left midway (``break``) ends its thread when its iterator is
    let go, which a ``for`` loop does at once.
    """

    def __init__(
        self,
        dataset,
        batch_size,
        shuffle=False,
        drop_last=False,
        seed=None,
        device=None,
        augment=None,
    ):
        if not isinstance(dataset, ArrayDataset):
            raise TypeError(
                f"a DataLoader takes a cycnn.data.ArrayDataset, got "
                f"{type(dataset).__name__}; ArrayDataset(images, labels) makes one"
            )
        try:
            batch_size = operator.index(batch_size)
        except TypeError:
            raise TypeError(
                f"batch_size must be an integer, got {batch_size!r}"
            ) from None
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        if seed is None:
            seed = random.draw_seed() if shuffle or augment is not None else 0
        seed = random.checked_seed(seed)
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self.seed = seed
        self.device = as_device(device)
        self.epoch = 0
        self.preparation = None
        if augment is not None or isinstance(dataset.scale, tuple):
            self.preparation = Preparation(self, augment)
        self._tensors = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, hence the order, of the next iteration."""
        epoch = operator.index(epoch)
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch must be from 0 to 2**32 - 1, got {epoch}")
        self.epoch = epoch

    def __len__(self):
        """Number of batches in an epoch."""
        full, rest = divmod(len(self.dataset), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self):
        epoch = self.epoch
        self.set_epoch((epoch + 1) % 2**32)
        if len(self) == 0:
            return iter(())
        if self.resident() is not None:
            return self._gather(epoch)
        return self._stream(epoch)

    def _bounds(self):
        count = len(self.dataset)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield start, min(start + self.batch_size, count)

    def order(self, epoch, device=None):
        """Indices of the epoch's images, in order: int32 Tensor on the device."""
        count, device = len(self.dataset), device or self.device
        if self.shuffle:
            return for_device(device).permutation(count, self.seed, epoch, device)
        return tensor.Tensor(np.arange(count, dtype=np.int32), device)

    # gathered from tensors on the device

    def resident(self):
        """The set's ``images`` and ``labels`` on the device; None if it streams.

        The first call puts them there.
        """
        if self._tensors is None:
            dataset, device = self.dataset, self.device
            if not device.is_cuda:
                self._tensors = _OnDevice(
                    tensor.from_array(dataset.images),
                    tensor.from_array(dataset.labels),
                )
            else:
                self._tensors = _resident(dataset, device)
        return self._tensors

    def _gather(self, epoch):
        ops = for_device(self.device)
        images, labels = self._tensors.images, self._tensors.labels
        order = self.order(epoch)
        make = self._maker(epoch)
        for start, stop in self._bounds():
            index = order[start:stop]
            batch = make(images, index, index)
            yield batch, gather_targets(ops, self.dataset, labels, index, batch)

    def _maker(self, epoch):
        """A function of raw images, their rows there and in the set: the batch."""
        if self.preparation is not None:
            key = self.preparation.key_of(epoch)
            return functools.partial(self.preparation.batch, key)
        gather, dataset = for_device(self.device).gather_images, self.dataset

        def make(images, index, samples):
            return gather(images, index, dataset.scale, dataset.shift)

        return make

    # streamed through pinned memory

    def _stream(self, epoch):
        dataset, device = self.dataset, self.device
        order = self.order(epoch, CPU).array
        make, samples = self._maker(epoch), None
        if self.preparation is not None:
            samples = self.order(epoch)
        done = 0
        largest = min(self.batch_size, len(dataset))
        ring = _open_ring(_batch_bytes(dataset, largest)[1], device)
        identity = tensor.Tensor(np.arange(largest, dtype=np.int32), device)
        # upload() does not ask whether the slot was filled anew, acquire() does not ask
        # whether it was uploaded: at most _SLOTS batches may be between the two
        free, ready = threading.Semaphore(_SLOTS), queue.SimpleQueue()
        stop = threading.Event()
        # not a method, no self: the thread must not keep the iterator alive
        filler = threading.Thread(
            target=_fill,
            args=(dataset, order, list(self._bounds()), ring, free, ready, stop),
            name="cycnn-loader",
            daemon=True,
        )
        filler.start()
        try:
            for _ in range(len(self)):
                slot, count, error = ready.get()
                if error is not None:
                    raise error
                offset, nbytes = _batch_bytes(dataset, count)
                buffer = ring.upload(slot, nbytes)
                free.release()
                shape = (count, *dataset.image_shape)
                raw = _view(buffer, 0, shape, dataset.images.dtype, device)
                shape = (count, *dataset.labels.shape[1:])
                labels = _view(buffer, offset, shape, dataset.labels.dtype, device)
                numbers = None if samples is None else samples[done : done + count]
                done += count
                images = make(raw, identity[:count], numbers)
                yield images, images if dataset.own_images else labels
        finally:
            stop.set()
            free.release()
            filler.join()
            # the ring's memory must outlive the copies out of it
            for _ in range(_SLOTS):
                ring.acquire()


def gather_targets(ops, dataset, labels, index, images):
    """What a batch is to be: class indices, numbers, or the images themselves.

    Parameters
    ----------
    ops : module
    dataset : ArrayDataset
    labels : Tensor (M, ...)
        Those of the set, on the device.
    index : int32 Tensor (N,)
    images : Tensor (N, ...)
        The batch.
    """
    if dataset.has_classes:
        return ops.gather_labels(labels, index)
    if dataset.own_images:
        return images
    return ops.gather_images(labels, index, 1.0, 0.0)


def row_bytes(array) -> int:
    """Bytes of ``array[0]``."""
    return math.prod(array.shape[1:]) * array.itemsize


class Preparation:
    """How the images of a loader are made where a gather is not enough.

    That is where they are augmented, or where each channel has a scale of its own.

    Parameters
    ----------
    loader : DataLoader
    augment : Augment or None
    """

    def __init__(self, loader, augment):
        if augment is not None and not isinstance(augment, Augment):
            raise TypeError(f"augment is a cycnn.data.Augment or None, got {augment!r}")
        dataset, self._device = loader.dataset, loader.device
        shape = dataset.image_shape
        if augment is not None and len(shape) != 3:
            raise DataError(
                f"images of shape {shape} cannot be augmented: expected (C, H, W)"
            )
        self._ways = None if augment is None else augment.ways
        self._seed = loader.seed
        # a vector is an image of one pixel, in many channels
        self._shape = shape if len(shape) == 3 else (shape[0], 1, 1)
        self._scales = [
            tensor.Tensor(
                np.broadcast_to(np.float32(value), self._shape[:1]).copy(), self._device
            )
            for value in (dataset.scale, dataset.shift)
        ]

    def key_of(self, epoch):
        """What the random numbers of an epoch depend on: int32 Tensor (2,), or None."""
        if self._ways is None:
            return None
        make = for_device(self._device).augment_key
        return make(self._seed, epoch, self._device)

    def batch(self, key, images, index, samples):
        """The float32 batch of raw images (M, ...) at ``index``.

        Parameters
        ----------
        key : int32 Tensor (2,) or None
            From :meth:`key_of`.
        images : Tensor (M, ...)
        index : int32 Tensor (N,)
            Rows of ``images``.
        samples : int32 Tensor (N,)
            Numbers of these images in the data set; None where they do not matter.
        """
        made = for_device(self._device).augment_images(
            images.reshape(images.shape[0], *self._shape),
            index,
            None if self._ways is None else samples,
            key,
            *self._scales,
            self._ways,
        )
        return made.reshape(len(index), *images.shape[1:])


def _resident(dataset, device):
    """The dataset's tensors on a GPU, shared by its loaders; None if too large."""
    held = _residents.setdefault(dataset, weakref.WeakValueDictionary())
    found = held.get(device)
    if found is None:
        nbytes = dataset.images.nbytes + dataset.labels.nbytes
        if nbytes > _free_memory(device) // _RESIDENT_SHARE:
            return None
        found = held[device] = _OnDevice(
            tensor.Tensor(dataset.images, device), tensor.Tensor(dataset.labels, device)
        )
    return found


class _OnDevice:
    """A dataset's tensors on a device. Loaders own it: the last one to go frees it."""

    __slots__ = ("images", "labels", "__weakref__")

    def __init__(self, images, labels):
        self.images, self.labels = images, labels


def _batch_bytes(dataset, count) -> tuple:
    """(where the labels of a packed batch begin, its length), in bytes."""
    offset = -(-count * row_bytes(dataset.images) // _ALIGN) * _ALIGN
    return offset, offset + count * row_bytes(dataset.labels)


def _fill(dataset, order, bounds, ring, free, ready, stop) -> None:
    """The thread: raw rows of one batch after the other into slots of the ring."""
    try:
        for start, end in bounds:
            free.acquire()
            if stop.is_set():
                return
            slot = ring.acquire()
            index = order[start:end]
            offset, nbytes = _batch_bytes(dataset, end - start)
            images = slot.array[: len(index) * dataset.images[0].nbytes]
            images = images.view(dataset.images.dtype)
            np.take(
                dataset.images,
                index,
                axis=0,
                out=images.reshape(len(index), *dataset.image_shape),
                mode="clip",  # "raise" would gather into a second array first
            )
            labels = slot.array[offset:nbytes].view(dataset.labels.dtype)
            np.take(
                dataset.labels,
                index,
                axis=0,
                out=labels.reshape(len(index), *dataset.labels.shape[1:]),
                mode="clip",
            )
            ready.put((slot, end - start, None))
    except BaseException as error:  # raised again where the batches are used
        ready.put((None, 0, error))


def _free_memory(device) -> int:
    from ..gpu import memory

    return memory.info(device.index)[0]


def _open_ring(nbytes, device):
    from ..gpu.pinned import PinnedRing

    return PinnedRing(_SLOTS, nbytes, device.index)


def _view(buffer, offset, shape, dtype, device):
    """A tensor over part of an uploaded batch, which it keeps alive."""
    return tensor.on_gpu(shape, dtype, device, buffer.ptr + offset, buffer)
