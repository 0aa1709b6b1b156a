"""The specification of what joins and pads: see :mod:`cycnn.ops.reference`."""

from __future__ import annotations

import numpy as np

from .. import shapes


def add_relu(x, y, out):
    """out = max(x + y, 0), as :func:`add` and :func:`relu_forward`; may be in place.

    With s = x + y, ds = dout where out > 0, else 0 (``relu_backward``), and ds is the
    gradient by x and by y.
    """
    shapes.check_same(x=x.shape, y=y.shape, out=out.shape)
    total = np.asarray(x, np.float64) + np.asarray(y, np.float64)
    out[...] = np.where(total <= 0, 0.0, total)


def concat_forward(parts):
    """The parts one behind the other along axis 1.

    Parameters
    ----------
    parts : sequence of (N, C_i, ...)

    Returns
    -------
    y : (N, sum of C_i, ...)
    """
    shapes.concat_output_shape(*[part.shape for part in parts])
    return np.concatenate([np.asarray(part, np.float64) for part in parts], axis=1)


def concat_backward(dy, channels):
    """Every element of y is one of a part, so dy is cut where y was joined.

    Parameters
    ----------
    dy : (N, sum of C_i, ...)
    channels : sequence of int
        The C_i.

    Returns
    -------
    list of (N, C_i, ...)
    """
    shapes.check_concat_backward(dy.shape, channels)
    cuts = np.cumsum(channels)[:-1]
    return [part.copy() for part in np.split(np.asarray(dy, np.float64), cuts, axis=1)]


def zero_pad2d_forward(x, padding):
    """y[n, c, h, w] = x[n, c, h - top, w - left], zero outside of x.

    Parameters
    ----------
    x : (N, C, H, W)
    padding : (left, right, top, bottom)

    Returns
    -------
    y : (N, C, top + H + bottom, left + W + right)
    """
    shapes.zero_pad2d_output_shape(x.shape, padding)
    left, right, top, bottom = padding
    around = (0, 0), (0, 0), (top, bottom), (left, right)
    return np.pad(np.asarray(x, np.float64), around)


def zero_pad2d_backward(dy, padding):
    """dx[n, c, h, w] = dy[n, c, h + top, w + left].

    Parameters
    ----------
    dy : (N, C, top + H + bottom, left + W + right)
    padding : (left, right, top, bottom)

    Returns
    -------
    dx : (N, C, H, W)
    """
    h, w = shapes.zero_pad2d_input_shape(dy.shape, padding)[2:]
    left, _, top, _ = padding
    inner = np.asarray(dy, np.float64)[:, :, top : top + h, left : left + w]
    return inner.copy()
