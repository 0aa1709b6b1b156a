"""Buffers: numbers that a layer keeps beside its parameters."""

from __future__ import annotations

from ..tensor import Tensor


class Buffer:
    """Numbers that a layer keeps from one forward to the next, without a gradient.

    They move with the layer. A kernel of a recorded training step may update them in
    place: they stay where they are until the layer moves to another device.

    Parameters
    ----------
    data : array_like
        Copied: floating-point numbers as float32, integers as int32.
    device : None, str or Device
        None is the default device.
    persistent : bool
        Whether it belongs to the layer's :meth:`~cycnn.nn.Layer.state_dict`. A
        checkpoint of :meth:`cycnn.Trainer.save` holds it in either case.

    Attributes
    ----------
    data : Tensor
        Write into it (``b.data.copy_(array)``).
    """

    __slots__ = ("_data", "persistent")

    def __init__(self, data, device=None, persistent=True):
        self._data = Tensor(data, device)
        self.persistent = persistent

    @property
    def data(self) -> Tensor:
        return self._data

    @property
    def shape(self) -> tuple:
        return self._data.shape

    @property
    def device(self):
        return self._data.device

    def move(self, device) -> None:
        """Live on ``device`` from now on, with these values."""
        if device != self._data.device:
            self._data = self._data.to(device)

    def __reduce__(self):
        # a copy gets memory of its own
        return Buffer, (self._data.numpy(), str(self.device), self.persistent)

    def __repr__(self):
        return f"Buffer(shape={self.shape}, device='{self.device}')"
