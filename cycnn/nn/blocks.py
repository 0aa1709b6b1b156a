"""Layers side by side: residual blocks and joined branches."""

from __future__ import annotations

from ..errors import ShapeError
from ..ops import for_device
from ..tensor import Tensor, empty
from .layer import Layer, as_gradient, as_input, check_parts, tree


class Residual(Layer):
    """A layer that computes a correction to its input: y = body(x) + shortcut(x).

    Parameters
    ----------
    body : Layer
        Most often a Sequential.
    shortcut : Layer, optional
        What the input goes through on its other way, such as a 1 x 1 convolution where
        the body changes the number of channels. Default: nothing, the input itself.

    Raises
    ------
    TypeError
        If either is no layer.
    ValueError
        If a layer, or a parameter, occurs in both, or they are on several devices.

    Notes
    -----
    Shapes: body and shortcut give the same one, which is that of y. Parameters are
    named ``body.0.weight``, ``shortcut.weight``.
    """

    def __init__(self, body, shortcut=None):
        self.body = body
        self.shortcut = shortcut
        parts = [("body", body)]
        if shortcut is not None:
            parts.append(("shortcut", shortcut))
        check_parts(self, parts)
        self.pack()

    def forward(self, x):
        x = _input_of(self, x)
        y = self.body(x)
        other = x if self.shortcut is None else self.shortcut(x)
        if y.shape != other.shape:
            raise _unequal(x.shape, y.shape, self.shortcut, other.shape)
        return self._sum(y, other)

    def backward(self, dy, input_grad=True, accumulate=False):
        """A sum passes its gradient on to both terms; x is in both, so theirs add up.

        With y = f(x) + g(x) and the Jacobians F and G of the two ways::

            dx = (F + G)^T dy = F^T dy + G^T dy

        and without a shortcut G is the identity: dx = F^T dy + dy.
        """
        dy = self._gradient_of_sum(dy)
        dx = self.body.backward(dy, input_grad, accumulate)
        other = dy
        if self.shortcut is not None:
            other = self.shortcut.backward(dy, input_grad, accumulate)
        self._saved = None
        if not input_grad:
            return None
        # not in place: dx may be dy, which belongs to the caller
        out = empty(dx.shape, device=dx.device)
        for_device(dx.device).add(dx, other, out)
        return out

    def _sum(self, y, other):
        """The output, from those of both ways."""
        # not in place: the body's last layer may remember its output, and a body that
        # only reshapes gives x itself
        out = empty(y.shape, device=y.device)
        for_device(y.device).add(y, other, out)
        self._saved = out.shape, out.device
        return out

    def _gradient_of_sum(self, dy):
        """The gradient by the sum, from that by the output: they are the same here."""
        return as_gradient(self, dy, *self._remembered())

    def __repr__(self):
        return tree(self)


class Concat(Layer):
    """Branches that get the same input; their outputs lie one behind the other.

    Parameters
    ----------
    *branches : Layer
        One or more. An empty Sequential passes its input on, as in a dense block:
        ``Concat(Sequential(), Sequential(Conv2d(16, 8, 3, padding=1), ReLU()))``.

    Raises
    ------
    TypeError
        If an argument is no layer, or there is none.
    ValueError
        If a layer, or a parameter, occurs twice, or they are on several devices.

    Notes
    -----
    Shapes: branch i gives (N, C_i, ...), all alike but for C_i; the output is
    (N, C_1 + C_2 + ..., ...). Parameters are named by position: ``0.weight``,
    ``1.0.weight``.
    """

    def __init__(self, *branches):
        if not branches:
            raise TypeError("Concat takes one branch or more, got none")
        if any(isinstance(branch, (list, tuple)) for branch in branches):
            raise TypeError("branches are given one by one: Concat(*branches)")
        self._branches = branches
        check_parts(self, ((f"branch {i}", b) for i, b in enumerate(branches)))
        self.pack()

    def _children(self):
        return [(str(i), branch) for i, branch in enumerate(self._branches)]

    def forward(self, x):
        x = _input_of(self, x)
        parts = [branch(x) for branch in self._branches]
        try:
            y = for_device(x.device).concat_forward(parts)
        except ShapeError as error:
            raise ShapeError(f"Concat, for an input of {x.shape}: {error}") from None
        self._saved = [part.shape[1] for part in parts], y.shape, y.device
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """Each branch gets the gradient by its own channels; x is in all of them.

        So dx is the sum of what the branches give, added from the first to the last.
        """
        channels, shape, device = self._remembered()
        ops = for_device(device)
        parts = ops.concat_backward(as_gradient(self, dy, shape, device), channels)
        dx = out = None
        for branch, part in zip(self._branches, parts):
            more = branch.backward(part, input_grad, accumulate)
            if dx is None:
                dx = more
            elif input_grad:
                # not into the first: it may be a gradient that its branch was given
                out = empty(dx.shape, device=device) if out is None else out
                ops.add(dx, more, out)
                dx = out
        self._saved = None
        return dx

    def __len__(self):
        return len(self._branches)

    def __iter__(self):
        return iter(self._branches)

    def __getitem__(self, index):
        return self._branches[index]

    def __repr__(self):
        return tree(self)


def _input_of(layer, x):
    """The input, once for all branches; they check it against their own device."""
    return x if isinstance(x, Tensor) else as_input(layer, x)


def _unequal(x_shape, body_shape, shortcut, other_shape) -> ShapeError:
    if shortcut is None:
        return ShapeError(
            f"Residual: the body gives {body_shape} for an input of {x_shape}, and the "
            f"two are added: they must be the same; give the body padding, or the block "
            f"a shortcut that gives {body_shape}, such as a Conv2d of kernel size 1"
        )
    return ShapeError(
        f"Residual, for an input of {x_shape}: the body gives {body_shape} and the "
        f"shortcut {other_shape}, and the two are added: they must be the same"
    )
