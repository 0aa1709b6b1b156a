"""A data set that does not fit a GPU, seen through a window that moves over it.

A recorded step reads its batch from a fixed place, so that is where batches have to go.
"""

from __future__ import annotations

import queue
import threading

import numpy as np

from .. import tensor
from .loader import row_bytes

_SLOTS = 3  # one in use, one on its way, one in reserve
_SLOT_BYTES = 2 << 20  # enough for the work per slot, in Python, to count for nothing


class Window:
    """The next images of an epoch, on a GPU ahead of the steps that use them.

    Parameters
    ----------
    loader : DataLoader
        Of a GPU.

    Attributes
    ----------
    images, labels : Tensor
        Raw rows of the data set. Row i of the epoch, in its order, is in row i % rows.
    rows : int

    Notes
    -----
    The memory is three slots of some batches each. A thread puts the rows of a slot
    together in pinned memory and queues the copy, which runs beside the steps that use
    the slots before. Events keep the order: a copy waits for the steps that used what
    it overwrites, steps wait for the copy of what they use, and the host for neither.
    """

    def __init__(self, loader):
        from ..gpu import device as gpu_device
        from ..gpu.pinned import PinnedRing
        from ..gpu.stream import Event

        self._loader = loader
        dataset, device = loader.dataset, loader.device
        row = row_bytes(dataset.images) + row_bytes(dataset.labels)
        batches = max(1, _SLOT_BYTES // (loader.batch_size * row))
        self._slot_rows = min(batches * loader.batch_size, len(dataset))
        self.rows = _SLOTS * self._slot_rows
        shape = self.rows, *dataset.image_shape
        self.images = tensor.empty(shape, dataset.images.dtype, device)
        shape = self.rows, *dataset.labels.shape[1:]
        self.labels = tensor.empty(shape, dataset.labels.dtype, device)
        self._gpu = gpu_device.get(device.index)
        self._ring = PinnedRing(_SLOTS, self._slot_rows * row, device.index)
        self._used = [Event(device.index) for _ in range(_SLOTS)]
        self._filler = None

    def order(self):
        """Where the rows of an epoch are: int32 Tensor on the device."""
        places = np.arange(len(self._loader.dataset), dtype=np.int32) % self.rows
        return tensor.Tensor(places, self._loader.device)

    def begin(self, epoch, row) -> None:
        """Start to fill the window, from the slot of a row of the epoch on."""
        # made on the GPU, in microseconds where the host takes milliseconds
        order = self._loader.order(epoch).numpy()
        for event in self._used:
            event.record(self._gpu.compute)
        # slots not given back yet, numbered through the epoch: those of _oldest .. _next-1
        self._oldest = self._next = row // self._slot_rows
        self._free = threading.Semaphore(_SLOTS)
        self._ready, self._stop = queue.SimpleQueue(), threading.Event()
        self._filler = threading.Thread(
            target=self._fill,
            args=(order, self._next),
            name="cycnn-window",
            daemon=True,
        )
        self._filler.start()

    def reach(self, start, stop) -> None:
        """Let what is queued from now on use these rows of the epoch.

        Both ends move forwards only; ``stop`` may lie behind the last row.
        """
        first = start // self._slot_rows
        last = min(stop, len(self._loader.dataset)) - 1
        while self._oldest < first:
            self._used[self._oldest % _SLOTS].record(self._gpu.compute)
            self._free.release()
            self._oldest += 1
        while self._next <= last // self._slot_rows:
            slot, error = self._ready.get()
            if error is not None:
                raise error
            self._gpu.compute.wait(slot.copied)
            self._next += 1

    def end(self) -> None:
        """Stop filling; however far the epoch has come."""
        if self._filler is None:
            return
        self._stop.set()
        self._free.release()
        self._filler.join()
        self._filler = None
        # the ring's memory must outlive the copies out of it
        for _ in range(_SLOTS):
            self._ring.acquire()

    def _fill(self, order, first):
        """The thread: one slot after the other."""
        dataset, ring, rows = self._loader.dataset, self._ring, self._slot_rows
        try:
            for number in range(first, -(-len(order) // rows)):
                self._free.acquire()
                if self._stop.is_set():
                    return
                slot = ring.acquire()
                index = order[number * rows : (number + 1) * rows]
                place = number % _SLOTS
                pieces, offset = [], 0
                for source, target in (
                    (dataset.labels, self.labels),  # first, to be aligned
                    (dataset.images, self.images),
                ):
                    nbytes = len(index) * row_bytes(source)
                    part = slot.array[offset : offset + nbytes].view(source.dtype)
                    np.take(
                        source,
                        index,
                        axis=0,
                        out=part.reshape(len(index), *source.shape[1:]),
                        mode="clip",  # "raise" would gather into another array first
                    )
                    at = target.ptr + place * rows * row_bytes(source)
                    pieces.append((offset, nbytes, at))
                    offset += nbytes
                self._gpu.copy.wait(self._used[place])
                ring.send(slot, pieces)
                self._ready.put((slot, None))
        except BaseException as error:  # raised again where the rows are used
            self._ready.put((None, error))
