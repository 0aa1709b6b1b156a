"""Parameters, and the slabs of memory that they lie in.

The parameters of a model lie side by side in one tensor, its *slab*, and their
gradients in a second tensor with the same layout. An optimizer then updates a whole
model with one operation, and sets all its gradients to zero with another, instead of
one for each parameter.
"""

from __future__ import annotations

import numpy as np

from ..tensor import Tensor, zeros

# 256 bytes of float32: what the GPU's allocator aligns to, hence every parameter may
# be read in the widest loads, as if it had an allocation of its own
ALIGNMENT = 64

_FLOAT32 = np.dtype("float32")


def padded(size: int) -> int:
    """``size`` elements rounded up to where the next parameter may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Slab:
    """Memory of some parameters: ``data`` and ``grad``, float32 of shape (size,).

    The elements between parameters are zero, and stay zero, since an update of zero
    by a gradient of zero is zero.

    Attributes
    ----------
    departures : int
        Counts how often parameters left for another slab. Who keeps views of the slab
        compares it with the count that it saw, rather than asking every parameter.
    """

    __slots__ = ("data", "grad", "departures", "__weakref__")

    def __init__(self, size, device):
        self.data = zeros((size,), device=device)
        self.grad = zeros((size,), device=device)
        self.departures = 0


class Parameter:
    """Numbers that a layer learns, and the gradient of the loss by them.

    Parameters
    ----------
    data : array_like or Tensor
        Copied, as float32.
    name : str
        Its name in the layer, for messages.
    device : None, str or Device
        None is the default device, or for a Tensor the one that it is on.

    Attributes
    ----------
    data, grad : Tensor
        float32, of the same shape. Write into them (``p.data.copy_(array)``); they
        cannot be replaced, because optimizers know where they lie.
    slab : Slab
        The memory that both lie in.
    offset : int
        Index of the first element in the slab, a multiple of 64.
    """

    __slots__ = ("name", "_shape", "_size", "_data", "_grad", "_slab", "_offset")

    def __init__(self, data, name="", device=None):
        if not isinstance(data, Tensor):
            data = Tensor(np.asarray(data, dtype=_FLOAT32), device)
        elif data.dtype != _FLOAT32:
            raise TypeError(f"a parameter is float32, got a tensor of {data.dtype}")
        elif device is not None:
            data = data.to(device)
        self.name = name
        self._shape, self._size = data.shape, data.size
        self._slab = None
        self._settle(Slab(padded(self._size), data.device), 0, data, None)

    @property
    def data(self) -> Tensor:
        return self._data

    @property
    def grad(self) -> Tensor:
        return self._grad

    @property
    def slab(self) -> Slab:
        return self._slab

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def shape(self) -> tuple:
        return self._shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._size

    @property
    def device(self):
        return self._data.device

    def _settle(self, slab, offset, data, grad):
        """Live in ``slab`` from now on, with these values."""
        end = offset + self._size
        new_data = slab.data[offset:end].reshape(self._shape)
        new_grad = slab.grad[offset:end].reshape(self._shape)
        new_data.copy_(data)
        if grad is not None:
            new_grad.copy_(grad)
        if self._slab is not None:
            self._slab.departures += 1
        self._slab, self._offset = slab, offset
        self._data, self._grad = new_data, new_grad

    def __reduce__(self):
        # A copy gets memory of its own. Copied field by field, its tensors would no
        # longer be views of its slab, and an optimizer would update other numbers than
        # the layer computes with.
        return _restored, (
            self._data.numpy(),
            self._grad.numpy(),
            self.name,
            str(self.device),
        )

    def __repr__(self):
        return f"Parameter({self.name!r}, shape={self._shape}, device='{self.device}')"


def _restored(data, grad, name, device) -> Parameter:
    parameter = Parameter(data, name, device)
    parameter.grad.copy_(grad)
    return parameter


def pack(parameters, device=None) -> None:
    """Put parameters side by side, in this order, into one slab.

    Values and gradients are kept. Parameters that lie so already, alone or amid others,
    stay where they are: a model that is wrapped, sliced or rewritten keeps its
    addresses.

    Parameters
    ----------
    parameters : list of Parameter
        Each once.
    device : None or Device
        Where to; None leaves them on the device that all of them are on.

    Raises
    ------
    ValueError
        If they are on several devices and none is asked for.
    """
    if not parameters:
        return
    first = parameters[0]
    if device is None:
        device = first.device
        for other in parameters:
            if other.device != device:
                raise ValueError(
                    f"{first.name or 'a parameter'} is on {device} and "
                    f"{other.name or 'another'} on {other.device}: move the layers to "
                    f"one device with .to(...) before joining them"
                )
    offsets, end = [], 0
    for parameter in parameters:
        offsets.append(end)
        end += padded(parameter.size)
    start = first.offset
    if first.device == device and all(
        parameter.slab is first.slab and parameter.offset == start + offset
        for parameter, offset in zip(parameters, offsets)
    ):
        return
    slab = Slab(end, device)
    for parameter, offset in zip(parameters, offsets):
        parameter._settle(slab, offset, parameter.data, parameter.grad)
