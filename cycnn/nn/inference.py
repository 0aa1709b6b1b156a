"""The forward pass alone, replayed on a GPU as one CUDA graph for each shape of input.

A small model answers in less time than Python takes to launch its kernels one by one.
So the first forward pass of a shape runs operation by operation, the second is recorded
as a CUDA graph, and from then on it is replayed with one call.
"""

from __future__ import annotations

import logging
import threading
import weakref

import numpy as np

from ..errors import CudaError
from ..ops import for_device, fused
from ..precision import get_precision
from ..tensor import Tensor, empty, on_gpu
from .fuse import FusedSequential, forward_kernels, fuse
from .layer import as_floats, as_input
from .sequential import Sequential

_log = logging.getLogger("cycnn")

# Images that run at a time unless the caller says otherwise: enough to fill a large GPU,
# and the activations of the reference network stay under 100 MB.
BATCH = 2000

_SHAPES = 8  # that graphs are kept for; the one that was not used for longest goes
_FEW = 1 << 14  # numbers of an input that the GPU reads from the host's memory itself
_FLOAT32 = np.dtype("float32")

# All work of a GPU goes through one stream, on which nothing else may be queued while
# something is recorded: predictions and steps of training take turns. Reentrant: a layer
# may ask another model.
turn = threading.RLock()


class Predictor:
    """Computes the output of a model, and nothing for a backward.

    Parameters
    ----------
    model : Layer
        Not kept alive.
    fused : bool, optional
        Whether to :func:`fuse` the model. Default: on a GPU.
    captured : bool, optional
        Whether to replay CUDA graphs. Default: on a GPU; nowhere else are there any.

    Notes
    -----
    The results have the same bits as those of the fused (or unfused) model, called in
    evaluation mode with batches of the same sizes. What the model's layers remember for
    a backward, and whether they are in training mode, stays as it is.

    A graph reads the parameters where they are, so it sees what is written into them.
    It is made anew when they have moved or the precision has changed. Who puts another
    Parameter into a layer, or changes a setting such as its stride, calls
    :meth:`release`. Layers of one's own must do the same operations each time; one that
    cannot be recorded, because it reads a result on the host, runs without a graph.

    Several threads may predict and train: they take turns, whatever the models. What
    else a thread does on the same GPU meanwhile may end up in a recording.
    """

    def __init__(self, model, fused=None, captured=None):
        self._model = weakref.ref(model)
        self._wanted = fused, captured
        self._passes = {}
        self._seen = None

    def __call__(self, x, batch_size=None):
        """The output for ``x``: a Tensor for a Tensor, else an array in host memory.

        Parameters
        ----------
        x : Tensor or array_like
            (N, ...) as the model takes it.
        batch_size : int, optional
            How many of the N run at a time. Default: 2000.
        """
        y = self.scores(x, batch_size)
        if isinstance(x, Tensor) or isinstance(y, np.ndarray):
            return y
        return y.numpy()

    def scores(self, x, batch_size=None):
        """The output: an array where that is the shortest way, else a Tensor."""
        if batch_size is None:
            batch_size = BATCH
        elif batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        with turn:
            if self._seen is None or self._is_stale():
                self._renew()
            first = self._model() if self._first is None else self._first
            if isinstance(x, Tensor):
                x = as_input(first, x, self._device)
            else:
                x = as_floats(first, x, "input")
            count = x.shape[0] if x.shape else 0
            if count > batch_size:
                return self._in_parts(x, count, batch_size)
            if not self._captured or not x.size:
                return self._eager(x)
            if isinstance(x, Tensor):
                return Tensor(self._replayed(x))
            if x.size > _FEW:
                return self._replayed(x).numpy()
            return self._pass(x.shape, True).answer(x, self._forward)

    def release(self) -> None:
        """Free the graphs and their memory. They are made anew when needed."""
        with turn:
            self._passes.clear()
            self._seen = None

    def _is_stale(self) -> bool:
        for slab, departures in self._slabs:
            found = slab()
            if found is None or found.departures != departures:
                return True
        if self._captured and self._get_gpu(self._device.index) is not self._gpu:
            return True  # cycnn.shutdown() was called meanwhile
        return get_precision() != self._seen

    def _renew(self):
        """Look at the model; forget what was recorded before."""
        model = self._model()
        self._passes.clear()
        parameters = [parameter for _, parameter in model._walk()]
        slabs = dict.fromkeys(parameter.slab for parameter in parameters)
        # weak: they are let go of when the model moves to another device
        self._slabs = [(weakref.ref(slab), slab.departures) for slab in slabs]
        # without parameters, a model works wherever its input is
        self._device = parameters[0].device if parameters else None
        on_gpu = self._device is not None and self._device.is_cuda
        together, captured = (on_gpu if w is None else w for w in self._wanted)
        self._captured = on_gpu and captured
        if self._captured:
            from ..gpu.device import get

            self._get_gpu, self._gpu = get, get(self._device.index)
        # Not the model itself, which must not keep itself alive. Each of its layers is
        # let go of what it remembers before the next one runs.
        self._layers = self._first = None
        whole = fuse(model) if together else model
        if (together or captured) and type(whole) in (Sequential, FusedSequential):
            self._layers = [(layer, _with_inner(layer)) for layer in whole]
            self._first = whole[0] if self._layers else None
        self._seen = get_precision()

    def _forward(self, x):
        """The model's output for a Tensor, operation by operation."""
        model = self._model()
        modes = [(layer, layer.training) for layer in _with_inner(model)]
        model.eval()
        try:
            if self._layers is None:
                return _undisturbed(model, _with_inner(model), x)
            for layer, inner in self._layers:
                x = _undisturbed(layer, inner, x)
            return x
        finally:
            model.train()
            for layer, training in modes:
                layer.training = training

    def _eager(self, x):
        if not isinstance(x, Tensor):
            x = Tensor(x, self._device or self._model().device)
        return self._forward(x)

    def _replayed(self, x):
        """The output for a batch: a Tensor that the next batch of its shape changes."""
        recorded = self._pass(x.shape, False)
        recorded.x.copy_(x)
        return recorded.run(self._forward)

    def _in_parts(self, x, count, batch_size):
        one = self._replayed if self._captured else self._eager
        cuts = range(0, count, batch_size)
        if self._captured and not isinstance(x, Tensor):
            parts = _uploaded(x, cuts, self._gpu, self._device)
        else:
            parts = (x[start : start + batch_size] for start in cuts)
        y = None
        for start, part in zip(cuts, parts):
            made = one(part)
            if y is None:
                y = empty((count, *made.shape[1:]), made.dtype, made.device)
            y[start : start + batch_size].copy_(made)
        return y

    def _prepare(self, shape):
        """Compile the fused kernels for a shape, all at once."""
        machine = fused.machine_of(self._device)
        if machine is not None and self._layers is not None:
            layers = [layer for layer, _ in self._layers]
            kernels = forward_kernels(layers, shape, machine, self._seen)
            fused.prepare(kernels, self._device)

    def _pass(self, shape, on_host):
        """The recorded forward pass of a shape, now the one that was used last."""
        key = shape, on_host
        found = self._passes.pop(key, None)
        if found is None:
            self._prepare(shape)
            found = _Pass(shape, self._gpu, self._device, on_host)
            if len(self._passes) == _SHAPES:
                del self._passes[next(iter(self._passes))]
        self._passes[key] = found
        return found


class _Pass:
    """The forward pass for one shape of input.

    Parameters
    ----------
    shape : tuple of int
    gpu : gpu.device.Device
    device : Device
        The same.
    on_host : bool
        Whether input and output lie in pinned memory of the host. Of a few numbers,
        reading and writing them there takes less time than copies to and from the GPU.

    Attributes
    ----------
    x : Tensor
        The input is to be put here.
    """

    def __init__(self, shape, gpu, device, on_host):
        from ..gpu.graph import Graph

        self._graph = Graph(device.index)
        self._wait = gpu.compute.synchronize
        self._rehearsed = self._refused = False
        self._y = self._y_on_host = None
        self._on_host = on_host
        if on_host:
            self.x, self._inbox = _pinned(shape, _FLOAT32, device)
        else:
            self.x = empty(shape, device=device)

    def run(self, forward):
        """Queue the forward pass.

        Parameters
        ----------
        forward : callable
            Tensor -> Tensor, the same in each call.

        Returns
        -------
        Tensor
            The output. Another call may overwrite it.
        """
        if self._y is None and not self._record(forward):
            if self._refused:
                return self._body(forward)
            y = self._graph.rehearse(lambda: self._body(forward))
            self._rehearsed = True
            # not in the graph's memory, all of which the recording needs
            return Tensor(y)
        self._graph.launch()
        return self._y

    def answer(self, x, forward):
        """The output for an array, once it is there; of a pass in the host's memory."""
        self._inbox[...] = x
        if self._y is None:
            self.run(forward)
        else:
            self._graph.launch()
        self._wait()
        return self._outbox.copy()

    def _record(self, forward) -> bool:
        """Record it if it has run before; returns whether there is something to replay."""
        if self._rehearsed and not self._refused:
            try:
                self._y = self._graph.record(lambda: self._body(forward))
            except CudaError as error:
                _log.warning("predictions run without a CUDA graph: %s", str(error))
                self._refused = True
        return self._y is not None

    def _body(self, forward):
        y = forward(self.x)
        if self._on_host:
            if self._y_on_host is None:
                self._y_on_host, self._outbox = _pinned(y.shape, y.dtype, y.device)
            if y.dtype == _FLOAT32:
                for_device(y.device).copy(y, self._y_on_host)
            else:
                self._y_on_host.copy_(y)
        return y


def _with_inner(layer) -> list:
    return [layer, *(inner for _, inner in layer._descendants())]


def _undisturbed(layer, inner, x):
    """The layer's output; ``inner``, itself among them, remember what they did before."""
    saved = [each._saved for each in inner]
    try:
        return layer(x)
    finally:
        for each, before in zip(inner, saved):
            each._saved = before


def _pinned(shape, dtype, device):
    """A tensor in pinned memory of the host, and the array that shares it."""
    from ..gpu.pinned import PinnedBuffer

    count = int(np.prod(shape))
    buffer = PinnedBuffer(max(count, 1) * dtype.itemsize, device.index)
    array = np.frombuffer(buffer, dtype, count).reshape(shape)
    return on_gpu(tuple(shape), dtype, device, buffer.ptr, buffer), array


def _uploaded(x, cuts, gpu, device):
    """Parts of an array on the GPU, each copied there while the one ahead is used.

    What uses a part must be queued before the next one is asked for.
    """
    from ..gpu.memory import copy_from_host
    from ..gpu.stream import Event

    shape = cuts.step, *x.shape[1:]
    held = [(empty(shape, device=device), Event(device.index)) for _ in range(2)]
    # memory is handed out in the order of the compute stream
    gpu.copy.wait_stream(gpu.compute)
    for i, start in enumerate(cuts):
        part = np.ascontiguousarray(x[start : start + cuts.step], _FLOAT32)
        buffer, used = held[i % 2]
        gpu.copy.wait(used)
        copy_from_host(buffer.ptr, part, device.index, gpu.copy)
        yield buffer[: len(part)]
        used.record(gpu.compute)
