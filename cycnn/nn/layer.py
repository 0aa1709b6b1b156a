"""The base class of all layers.

A layer holds parameters and wiring; the mathematics is in :mod:`cycnn.ops`. There is
no recorded graph: ``forward`` remembers what ``backward`` will need, and ``backward``
turns the gradient of the loss by the output into the gradient by the input, filling
the gradients of the parameters on its way.
"""

from __future__ import annotations

import weakref

import numpy as np

from ..devices import default_device
from ..devices import device as as_device
from ..errors import ShapeError
from ..tensor import Tensor
from . import weights
from .buffer import Buffer
from .parameter import Parameter, pack

_FLOAT32 = np.dtype("float32")


class Layer:
    """Something with a forward and a backward.

    To write a layer of your own, derive from this class, keep each
    :class:`Parameter`, each :class:`Buffer` and each inner layer in a public attribute
    (names that begin with an underscore are not looked at), and define

    - ``forward(x)``: returns the output; remembers in ``self._saved`` what
      ``backward`` needs;
    - ``backward(dy, input_grad=True, accumulate=False)``: ``dy`` is the gradient by
      the output. Writes the gradients of the parameters, or adds to them if
      ``accumulate``; returns the gradient by the input, or None if not ``input_grad``.

    A layer remembers one forward, so it has one place in a model, and in a loop of one's
    own one thread at a time uses a model that is trained: from forward to the optimizer's
    step. What another thread does in between, :meth:`predict` too, can make the gradients
    wrong without an error. :class:`~cycnn.Trainer` sees to that by itself.

    Attributes
    ----------
    training : bool
        Set by :meth:`train` and :meth:`eval`.
    """

    training = True
    _saved = None
    _device = None
    _next = None
    _previous = None
    _predictor = None

    def __call__(self, x):
        return self.forward(x)

    def forward(self, x):
        raise NotImplementedError(f"{type(self).__name__} does not define forward")

    def backward(self, dy, input_grad=True, accumulate=False):
        raise NotImplementedError(f"{type(self).__name__} does not define backward")

    def predict(self, x, batch_size=None):
        """The output for ``x``, as fast as it can be had.

        The layer is used in evaluation mode, and nothing is remembered: a backward that
        is still to come finds what the last forward left. On a GPU the layers are fused
        (:func:`fuse`), and from the third time on that ``x`` has a certain shape the
        whole is replayed as one CUDA graph. :class:`~cycnn.nn.Predictor` says what
        layers of one's own, and programs of several threads, have to know.

        Parameters
        ----------
        x : Tensor or array_like
            (N, ...) as for :meth:`forward`.
        batch_size : int, optional
            How many of the N run at a time. Default: 2000.

        Returns
        -------
        Tensor or ndarray
            A Tensor for a Tensor, else an array in host memory.
        """
        return (self._predictor or self._own_predictor())(x, batch_size)

    def _own_predictor(self):
        if self._predictor is None:
            from .inference import Predictor

            self._predictor = Predictor(self)
        return self._predictor

    def release(self) -> None:
        """Free what :meth:`predict` keeps on a GPU: graphs, and memory for activations.

        It is freed with the layer, too, and when the layer moves to another device.
        """
        self._predictor = None

    # its parts

    def _children(self):
        """``(name, layer)`` of the layers that this one is made of."""
        return [
            (name, value)
            for name, value in vars(self).items()
            if isinstance(value, Layer) and not name.startswith("_")
        ]

    def _walk(self, prefix="", kind=Parameter):
        """``(path, value)`` of what is of a class or several, in PyTorch's order."""
        found = [
            (prefix + name, value)
            for name, value in vars(self).items()
            if isinstance(value, kind) and not name.startswith("_")
        ]
        for name, child in self._children():
            found += child._walk(f"{prefix}{name}.", kind)
        return found

    def _descendants(self):
        """``(path, layer)`` of all layers below this one."""
        found = []
        for name, child in self._children():
            found.append((name, child))
            for below, layer in child._descendants():
                found.append((f"{name}.{below}", layer))
        return found

    def named_parameters(self) -> list:
        """``(name, Parameter)`` in PyTorch's order and with its names: ``0.weight``.

        Raises
        ------
        ValueError
            If two layers share a parameter: a backward pass writes gradients, so the
            second layer would overwrite what the first one wrote.
        """
        found = self._walk()
        seen = {}
        for name, parameter in found:
            if id(parameter) in seen:
                raise ValueError(
                    f"{seen[id(parameter)]} and {name} are the same Parameter: layers "
                    f"cannot share parameters, because each writes the gradient of its "
                    f"own; give the second layer a Parameter of its own"
                )
            seen[id(parameter)] = name
        return found

    def parameters(self) -> list:
        """The parameters, in the order of :meth:`state_dict`."""
        return [parameter for _, parameter in self.named_parameters()]

    def named_buffers(self) -> list:
        """``(name, Buffer)`` of all layers, in PyTorch's order and with its names."""
        return self._walk(kind=Buffer)

    def _named_state(self) -> list:
        """``(name, Parameter or Buffer)`` of what :meth:`state_dict` holds."""
        self.named_parameters()  # refuses what is shared
        return [
            (name, value)
            for name, value in self._walk(kind=(Parameter, Buffer))
            if isinstance(value, Parameter) or value.persistent
        ]

    def pack(self, device=None) -> None:
        """Put the parameters side by side in one slab; see :mod:`cycnn.nn.parameter`.

        Sequential does so when it is made and :meth:`to` on the new device. Parameters
        that lie side by side already do not move.
        """
        named = self.named_parameters()
        for name, parameter in named:
            parameter.name = name
        pack([parameter for _, parameter in named], device)

    # where it is, and how it is used

    @property
    def device(self):
        """The device of parameters and buffers; without any, that of arrays' copies."""
        for _, value in self._walk(kind=(Parameter, Buffer)):
            return value.device
        return default_device() if self._device is None else self._device

    def to(self, device):
        """Move the layer to a device, in place; returns the layer.

        Parameters, gradients and buffers keep their values. What a forward remembered
        is dropped. An optimizer that has the parameters moves its state at its next
        step.

        Raises
        ------
        CudaError
            If a GPU is asked for and cannot be used.
        """
        device = as_device(device)
        moves = device != self.device
        self.pack(device)
        for _, buffer in self.named_buffers():
            buffer.move(device)
        for _, layer in [("", self), *self._descendants()]:
            layer._device = device
            layer._saved = None
            if moves:
                layer._predictor = None
        return self

    def train(self, mode=True):
        """Set ``training`` here and in all layers below; returns the layer.

        :class:`~cycnn.nn.BatchNorm2d` and :class:`~cycnn.nn.Dropout` compute
        differently; ``backward`` works in either mode. Layers of your own may look at
        ``self.training``.
        """
        self.training = bool(mode)
        for _, layer in self._descendants():
            layer.training = self.training
        return self

    def eval(self):
        """The same as ``train(False)``."""
        return self.train(False)

    # weights

    def state_dict(self) -> dict:
        """Copies of parameters and buffers: ``{name: ndarray}``.

        float32, but int32 for a count such as BatchNorm2d's ``num_batches_tracked``.
        """
        return {name: value.data.numpy() for name, value in self._named_state()}

    def load_state_dict(self, state) -> None:
        """Overwrite parameters and buffers.

        Parameters
        ----------
        state : mapping of str to array_like or Tensor
            As :meth:`state_dict` gives it. float16, float64 and int64 are converted.

        Raises
        ------
        ValueError, ShapeError, TypeError
            If a name is missing or unknown, a shape differs, or numbers are not
            floating-point. The message names the first difference; nothing is written.
        """
        named = self._named_state()
        known = {name for name, _ in named}
        for name, value in named:
            if name not in state:
                raise ValueError(
                    f"{_kind(value)} {name} is missing: the model has "
                    f"{_listed(n for n, _ in named)}, given are {_listed(state)}"
                )
        for name in state:
            if name not in known:
                raise ValueError(
                    f"the model has no parameter {name}: it has "
                    f"{_listed(n for n, _ in named)}"
                )
        arrays = [
            _matching(f"{_kind(value)} {name}", value, state[name])
            for name, value in named
        ]
        for (_, value), array in zip(named, arrays):
            value.data.copy_(array)

    def save(self, path) -> None:
        """Write parameters and buffers to a safetensors file, as PyTorch users read it.

        A count is written as int64, which PyTorch has. The file appears whole or not at
        all.
        """
        state = self.state_dict()
        for name, array in state.items():
            if array.dtype.kind == "i":
                state[name] = array.astype(np.int64)
        weights.write(path, state)

    def load(self, path) -> None:
        """Read parameters and buffers that :meth:`save`, or another library, wrote.

        Raises
        ------
        DataError
            If the file is damaged or no safetensors file.
        ValueError, ShapeError, TypeError
            If it does not fit this model; nothing is changed then.
        """
        arrays, _ = weights.read(path)
        try:
            self.load_state_dict(arrays)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{path}: {error}") from None

    # copy.deepcopy and pickle

    def __getstate__(self):
        # a copy is a layer on its own that has seen no forward yet
        left_out = ("_saved", "_next", "_previous", "_predictor")
        return {k: v for k, v in vars(self).items() if k not in left_out}

    def __setstate__(self, state):
        vars(self).update(state)
        self.pack()

    # joining

    def connect(self, following):
        """Join ``following`` behind this layer; returns ``following``.

        ``a.connect(b).connect(c)``, then ``Sequential.from_connected(a)``.

        Raises
        ------
        ValueError
            If either end is taken, or the chain would close into a ring.
        """
        if not isinstance(following, Layer):
            raise TypeError(f"only a layer can be connected, got {following!r}")
        if self._next is not None and self._next is not following:
            raise ValueError(
                f"{self!r} is followed by {self._next!r} already; a layer is connected "
                f"to one layer"
            )
        previous = following._predecessor()
        if previous is not None and previous is not self:
            raise ValueError(
                f"{following!r} follows {previous!r} already; a layer follows one layer"
            )
        layer = following
        while layer is not None:
            if layer is self:
                raise ValueError(
                    f"connecting {following!r} behind {self!r} would close a ring"
                )
            layer = layer._next
        self._next = following
        # weak: a chain is held by its first layer, and no cycle keeps memory alive
        following._previous = weakref.ref(self)
        return following

    def _predecessor(self):
        return None if self._previous is None else self._previous()

    # for the layers themselves

    def _forget(self):
        """Drop what a forward remembered, here and in the layers inside."""
        self._saved = None
        for _, child in self._children():
            child._forget()

    def _remembered(self):
        saved = self._saved
        if saved is None:
            raise RuntimeError(
                f"{self!r}: backward without a forward before it. Each backward uses "
                f"up what the last forward remembered; call forward first"
            )
        return saved

    def _settings(self) -> str:
        """The constructor's arguments, for ``repr``."""
        return ""

    def __repr__(self):
        settings = self._settings()
        count = sum(parameter.size for _, parameter in self._walk())
        if not count:
            return f"{type(self).__name__}({settings})"
        return f"{type(self).__name__}({settings}, {count:,} parameters)"


def check_parts(layer, parts) -> None:
    """The parts of a layer that is made of others are layers, and each is given once.

    Parameters
    ----------
    layer : Layer
        Has the parts already.
    parts : iterable of (str, object)
        What to call each part, and the part.
    """
    for name, part in parts:
        if isinstance(part, type):
            raise TypeError(
                f"{name} is the class {part.__name__}, not a layer: "
                f"write {part.__name__}(...)"
            )
        if not isinstance(part, Layer):
            raise TypeError(f"{name} is {part!r}, expected a Layer")
    seen = {}
    for path, part in layer._descendants():
        if id(part) in seen:
            raise ValueError(
                f"layers {seen[id(part)]} and {path} are the same object, "
                f"{part!r}: a layer remembers one forward, so make a new one for "
                f"each place"
            )
        seen[id(part)] = path


def tree(layer) -> str:
    """``repr`` of a layer that is made of others, a line or more for each."""
    lines = []
    for name, part in layer._children():
        lines.append(f"  ({name}): " + repr(part).replace("\n", "\n  "))
    count = sum(parameter.size for _, parameter in layer._walk())
    return "\n".join(
        [
            f"{type(layer).__name__}(",
            *lines,
            f")  # {count:,} parameters on {layer.device}",
        ]
    )


def as_input(layer, x, device=None) -> Tensor:
    """``x`` as a layer computes with it: a float32 tensor on ``device``.

    Tensors are checked, anything else is converted. ``device`` None means that the
    layer has no parameters and works wherever ``x`` is.
    """
    if not isinstance(x, Tensor):
        return _converted(layer, x, "input", device or layer.device)
    _check(layer, x, "input", device)
    return x


def as_gradient(layer, dy, shape, device) -> Tensor:
    """The gradient given to ``backward``, checked against the output of forward."""
    if not isinstance(dy, Tensor):
        dy = _converted(layer, dy, "gradient", device)
    else:
        _check(layer, dy, "gradient", device)
    if dy.shape != shape:
        raise ShapeError(
            f"{layer!r}: the gradient has shape {dy.shape}, the output of forward had "
            f"{shape}"
        )
    return dy


def _check(layer, x, what, device):
    if x.dtype is not _FLOAT32 and x.dtype != _FLOAT32:
        raise TypeError(
            f"{layer!r}: the {what} is {x.dtype}, expected float32"
            + (" (divide bytes by 255 first)" if x.dtype == "uint8" else "")
        )
    if device is not None and x.device is not device and x.device != device:
        raise TypeError(
            f"{layer!r} is on {device}, its {what} on {x.device}: move one of them, "
            f"with layer.to('{x.device}') or tensor.to('{device}')"
        )


def _converted(layer, x, what, device) -> Tensor:
    return Tensor(as_floats(layer, x, what), device)


def as_floats(layer, x, what) -> np.ndarray:
    """An array of floating-point numbers, as they are; TypeError for any others."""
    array = np.asarray(x)
    if array.dtype.kind != "f":
        raise TypeError(
            f"{layer!r}: the {what} holds {array.dtype}, expected floating-point "
            f"numbers; convert (and scale) it first, for instance "
            f"x.astype('float32') / 255"
        )
    return array


def _kind(value) -> str:
    return "parameter" if isinstance(value, Parameter) else "buffer"


def _matching(what, value, given) -> np.ndarray:
    """``given`` as an array that a Parameter or Buffer can be overwritten with."""
    array = given.numpy() if isinstance(given, Tensor) else np.asarray(given)
    if array.shape != value.shape:
        raise ShapeError(f"{what} has shape {value.shape}, given is {array.shape}")
    if value.data.dtype != _FLOAT32:
        if array.dtype.kind not in "iu":
            raise TypeError(
                f"{what} is {value.data.dtype}, given is {array.dtype}, which is not "
                f"an integer type"
            )
        # numbers that do not fit are refused here, before anything is written
        return Tensor(array, "cpu").numpy()
    if array.dtype.kind != "f":
        raise TypeError(
            f"{what} is float32, given is {array.dtype}, which is not a floating-point "
            f"type"
        )
    return array


def _listed(names) -> str:
    names = list(names)
    if len(names) > 8:
        names = [*names[:8], f"... ({len(names)} in all)"]
    return ", ".join(names) or "none"
