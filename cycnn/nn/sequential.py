"""Layers one after the other."""

from __future__ import annotations

from ..tensor import Tensor
from .layer import Layer, as_input, check_parts, tree


class Sequential(Layer):
    """Layers, each fed with the output of the one before.

    Parameters
    ----------
    *layers : Layer
        Each object once. Their parameters are put into one slab of memory, and named
        by position: ``0.weight``, ``0.bias``, ``3.weight``.

    Raises
    ------
    TypeError
        If an argument is no layer.
    ValueError
        If a layer, or a parameter, occurs twice, or the layers are on several devices.

    Notes
    -----
    The chain rule, and nothing else: with y = f2(f1(x)), ``backward`` takes dL/dy,
    gets dL/df1 from the backward of f2, and hands that to the backward of f1.
    """

    def __init__(self, *layers):
        if any(isinstance(layer, (list, tuple)) for layer in layers):
            raise TypeError("layers are given one by one: Sequential(*layers)")
        self._layers = layers
        check_parts(self, ((f"layer {i}", layer) for i, layer in enumerate(layers)))
        self.pack()
        self._replace(layers)

    def _replace(self, layers) -> None:
        """Be made of these layers from now on."""
        self._layers = tuple(layers)
        # The gradients in front of the first parameter are of use only for the input.
        self._first = next(
            (i for i, layer in enumerate(layers) if layer._walk()),
            max(len(layers) - 1, 0),
        )

    @classmethod
    def from_connected(cls, first) -> Sequential:
        """The layers that :meth:`Layer.connect` joined behind ``first``.

        Raises
        ------
        ValueError
            If ``first`` itself follows another layer.
        """
        if not isinstance(first, Layer):
            raise TypeError(f"expected the first layer of a chain, got {first!r}")
        previous = first._predecessor()
        if previous is not None:
            raise ValueError(
                f"{first!r} follows {previous!r}: begin with the chain's first layer"
            )
        layers = []
        while first is not None:
            layers.append(first)
            first = first._next
        return cls(*layers)

    def _children(self):
        return [(str(i), layer) for i, layer in enumerate(self._layers)]

    def forward(self, x):
        """The output of the last layer.

        Parameters
        ----------
        x : Tensor or array_like
            Of the shape that the first layer takes.
        """
        if not isinstance(x, Tensor):
            x = as_input(self, x)
        for layer in self._layers:
            x = layer.forward(x)
        return x

    def backward(self, dy, input_grad=True, accumulate=False):
        """Fill the gradients of all parameters.

        Parameters
        ----------
        dy : Tensor or array_like
            Gradient of the loss by the output.
        input_grad : bool
            Whether the gradient by the input is wanted; training does not need it, and
            for a first convolution it is costly.
        accumulate : bool
            Add to the gradients instead of overwriting them.

        Returns
        -------
        Tensor or None
            Gradient by the input; None if not ``input_grad``.
        """
        layers = self._layers
        if not layers:
            return dy if input_grad else None
        last = 0 if input_grad else self._first
        for i in range(len(layers) - 1, last, -1):
            dy = layers[i].backward(dy, True, accumulate)
        dx = layers[last].backward(dy, input_grad, accumulate)
        for i in range(last):
            layers[i]._forget()
        return dx

    def __len__(self):
        return len(self._layers)

    def __iter__(self):
        return iter(self._layers)

    def __getitem__(self, key):
        """A layer, or for a slice a Sequential of the same layers."""
        if isinstance(key, slice):
            return Sequential(*self._layers[key])
        return self._layers[key]

    def __repr__(self):
        return tree(self)
