"""The operations in NumPy and float64: the specification of the other two modules.

Written to be read. Each backward carries its derivation; L is the loss, and for an
array z, dz stands for dL/dz, which has the shape of z.

Functions take and return arrays; floating-point input is computed with in float64.
Arguments that the contract writes into (``out``, ``dweight``, ``param`` ...) are arrays
that are written in place.
"""

from __future__ import annotations

import numpy as np

from .. import shapes
from ..errors import DataError
from .reference_activation import (  # noqa: F401
    gelu_backward,
    gelu_forward,
    hardtanh_backward,
    hardtanh_forward,
    leaky_relu_backward,
    leaky_relu_forward,
    silu_backward,
    silu_forward,
    softmax_backward,
    softmax_forward,
    tanh_backward,
    tanh_forward,
)
from .reference_batch_norm import (  # noqa: F401
    batch_norm2d_backward,
    batch_norm2d_forward,
    batch_norm2d_inference,
)
from .reference_common import _f64, _write
from .reference_dropout import dropout_backward, dropout_forward  # noqa: F401
from .reference_layer_norm import (  # noqa: F401
    layer_norm_backward,
    layer_norm_forward,
)
from .reference_loss import (  # noqa: F401
    bce_with_logits_backward,
    bce_with_logits_forward,
    mse_loss_backward,
    mse_loss_forward,
    smooth_l1_loss_backward,
    smooth_l1_loss_forward,
    weighted_cross_entropy_backward,
    weighted_cross_entropy_forward,
    weighted_nll_loss_backward,
    weighted_nll_loss_forward,
)
from .reference_optim import (  # noqa: F401
    adagrad_step,
    adam_step,
    centered_rmsprop_step,
    clip_by_norm,
    damped_sgd_step,
    ema_step,
    square_sums,
    swap,
)
from .reference_pooling import (  # noqa: F401
    avgpool2d_backward,
    avgpool2d_forward,
    global_avgpool2d_backward,
    global_avgpool2d_forward,
)


def check_label_range(labels: np.ndarray, classes: int) -> None:
    """Labels are in 0 .. classes - 1, else DataError with the first that is not."""
    bad = (labels < 0) | (labels >= classes)
    if bad.any():
        at = int(bad.argmax())
        raise DataError(
            f"label {int(labels[at])} at index {at} is out of range: expected class "
            f"indices 0 to {classes - 1}"
        )


def check_index_range(index: np.ndarray, length: int) -> None:
    """Row numbers are in 0 .. length - 1, else DataError with the first that is not."""
    bad = (index < 0) | (index >= length)
    if bad.any():
        at = int(bad.argmax())
        raise DataError(
            f"index[{at}] is {int(index[at])}: expected row numbers 0 to {length - 1} "
            f"of a source with {length} rows"
        )


# elementwise


def fill(x, value):
    """Set every element of ``x`` to ``value``, in place."""
    x[...] = value


def add(x, y, out):
    """out = x + y; ``out`` may be ``x`` or ``y``."""
    shapes.check_same(x=x.shape, y=y.shape, out=out.shape)
    out[...] = _f64(x) + _f64(y)


def relu_forward(x):
    """y = max(x, 0). NaN stays NaN; zero of either sign and below give +0."""
    x = _f64(x)
    return np.where(x <= 0, 0.0, x)


def relu_backward(dy, y):
    """dx = dy where y > 0, else 0.

    y = x has slope 1 where x > 0, y = 0 slope 0 elsewhere, and y > 0 exactly where
    x > 0. At x = 0 and at NaN the slope is taken as 0.
    """
    shapes.check_same(y=y.shape, dy=dy.shape)
    return np.where(_f64(y) > 0, _f64(dy), 0.0)


def sigmoid_forward(x):
    """y = 1 / (1 + exp(-x)).

    With e = exp(-|x|), which cannot overflow: 1 / (1 + e) where x >= 0, and
    e / (1 + e), the same multiplied through by exp(x), where x < 0.
    """
    x = _f64(x)
    e = np.exp(-np.abs(x))
    return np.where(x < 0, e, 1.0) / (1.0 + e)


def sigmoid_backward(dy, y):
    """dx = dy y (1 - y).

    dy/dx = exp(-x) / (1 + exp(-x))^2 = y (1 - y), as 1 - y = exp(-x) / (1 + exp(-x)).
    """
    shapes.check_same(y=y.shape, dy=dy.shape)
    y = _f64(y)
    return _f64(dy) * y * (1.0 - y)


# linear


def linear_forward(x, weight, bias):
    """y[n, o] = sum_i x[n, i] weight[o, i] + bias[o].

    Parameters
    ----------
    x : (N, I)
    weight : (O, I)
    bias : (O,) or None

    Returns
    -------
    y : (N, O)
    """
    shapes.linear_output_shape(
        x.shape, weight.shape, None if bias is None else bias.shape
    )
    y = _f64(x) @ _f64(weight).T
    return y if bias is None else y + _f64(bias)


def linear_backward(dy, x, weight, dweight, dbias, need_dx=True, accumulate=False):
    """Gradients of :func:`linear_forward`.

    x[n, i] enters every y[n, o] with factor weight[o, i]; weight[o, i] enters every
    y[n, o] with factor x[n, i]; bias[o] enters every y[n, o] with factor 1. So

        dx = dy weight,    dweight = dy^T x,    dbias[o] = sum_n dy[n, o].

    Parameters
    ----------
    dy : (N, O)
    x : (N, I)
    weight : (O, I)
    dweight : (O, I), written, or added to if ``accumulate``
    dbias : (O,) likewise, or None
    need_dx : bool
        False leaves dx out, for the first layer of a model.

    Returns
    -------
    dx : (N, I) or None
    """
    shapes.check_linear_backward(
        dy.shape,
        x.shape,
        weight.shape,
        dweight.shape,
        None if dbias is None else dbias.shape,
    )
    dy = _f64(dy)
    _write(dweight, dy.T @ _f64(x), accumulate)
    if dbias is not None:
        _write(dbias, dy.sum(axis=0), accumulate)
    return dy @ _f64(weight) if need_dx else None


# convolution


def _taps(x_padded, filter_shape, out_shape, stride, dilation, groups):
    """For each filter position (r, s) the elements of x that it meets.

    Yields r, s and a view of shape (N, groups, C / groups, P, Q) with
    view[n, g, c, p, q] = x_padded[n, (g, c), p stride + r dilation, ...].
    """
    n, c = x_padded.shape[:2]
    p, q = out_shape
    for r in range(filter_shape[0]):
        for s in range(filter_shape[1]):
            top, left = r * dilation[0], s * dilation[1]
            view = x_padded[
                :,
                :,
                top : top + (p - 1) * stride[0] + 1 : stride[0],
                left : left + (q - 1) * stride[1] + 1 : stride[1],
            ]
            # splitting an axis makes a view of a view, never a copy
            yield r, s, view.reshape(n, groups, c // groups, p, q)


def _pad(x, padding):
    h, w = padding
    return np.pad(_f64(x), ((0, 0), (0, 0), (h, h), (w, w)))


def conv2d_forward(
    x, weight, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
):
    """Cross-correlation of images with filters.

    y[n, k, p, q] = bias[k] + sum_{c, r, s} weight[k, c, r, s]
                    x[n, c, p stride - padding + r dilation, q ...]

    with zeros outside of x. With groups, output channel k of group g sees only the
    input channels of group g.

    Parameters
    ----------
    x : (N, C, H, W)
    weight : (K, C / groups, R, S)
    bias : (K,) or None
    stride, padding, dilation : (height, width)

    Returns
    -------
    y : (N, K, P, Q)
    """
    n, k, p, q = shapes.conv2d_output_shape(
        x.shape,
        weight.shape,
        stride,
        padding,
        dilation,
        groups,
        None if bias is None else bias.shape,
    )
    filters = _f64(weight).reshape(groups, k // groups, *weight.shape[1:])
    y = np.zeros((n, groups, k // groups, p, q))
    taps = _taps(_pad(x, padding), weight.shape[2:], (p, q), stride, dilation, groups)
    for r, s, seen in taps:
        y += np.einsum("ngcpq,gkc->ngkpq", seen, filters[..., r, s])
    y = y.reshape(n, k, p, q)
    return y if bias is None else y + _f64(bias)[:, None, None]


def conv2d_backward(
    dy,
    x,
    weight,
    dweight,
    dbias,
    stride=(1, 1),
    padding=(0, 0),
    dilation=(1, 1),
    groups=1,
    need_dx=True,
    accumulate=False,
):
    """Gradients of :func:`conv2d_forward`.

    For a fixed filter position (r, s), y is linear in weight[:, :, r, s] and in the
    elements of x that this position meets, u[n, c, p, q] = x[n, c, p stride - padding +
    r dilation, ...]: y[n, k, p, q] += sum_c weight[k, c, r, s] u[n, c, p, q]. So

        dweight[k, c, r, s] = sum_{n, p, q} dy[n, k, p, q] u[n, c, p, q]
        du[n, c, p, q]      = sum_k weight[k, c, r, s] dy[n, k, p, q]
        dbias[k]            = sum_{n, p, q} dy[n, k, p, q]

    and dx gathers the du of every (r, s) at the element that u was read from. What
    falls on the padding is dropped.

    Parameters
    ----------
    dy : (N, K, P, Q)
    x, weight, stride, padding, dilation, groups
        As given to the forward.
    dweight : (K, C / groups, R, S), written, or added to if ``accumulate``
    dbias : (K,) likewise, or None
    need_dx : bool
        False leaves dx out, for the first layer of a model.

    Returns
    -------
    dx : (N, C, H, W) or None
    """
    shapes.check_conv2d_backward(
        dy.shape,
        x.shape,
        weight.shape,
        dweight.shape,
        None if dbias is None else dbias.shape,
        stride,
        padding,
        dilation,
        groups,
    )
    n, k, p, q = dy.shape
    h, w = x.shape[2:]
    filters = _f64(weight).reshape(groups, k // groups, *weight.shape[1:])
    dy = _f64(dy).reshape(n, groups, k // groups, p, q)
    x_padded = _pad(x, padding)
    dx_padded = np.zeros_like(x_padded)
    dfilters = np.empty_like(filters)
    where = weight.shape[2:], (p, q), stride, dilation, groups
    for (r, s, seen), (_, _, du) in zip(
        _taps(x_padded, *where), _taps(dx_padded, *where)
    ):
        dfilters[..., r, s] = np.einsum("ngkpq,ngcpq->gkc", dy, seen)
        if need_dx:
            du += np.einsum("gkc,ngkpq->ngcpq", filters[..., r, s], dy)
    _write(dweight, dfilters.reshape(weight.shape), accumulate)
    if dbias is not None:
        _write(dbias, dy.sum(axis=(0, 3, 4)).reshape(k), accumulate)
    if not need_dx:
        return None
    top, left = padding
    return dx_padded[:, :, top : top + h, left : left + w].copy()


# pooling


def maxpool2d_forward(
    x, kernel_size, stride, padding=(0, 0), ceil_mode=False
):
    """The maximum of each window, and where it lies.

    Padding counts as -inf and is never chosen. Of equal maxima the first in row-major
    order wins; NaN wins over numbers, the first NaN over later ones.

    Parameters
    ----------
    x : (N, C, H, W)
    kernel_size, stride : (height, width)
    padding : (height, width) or (top, left, bottom, right)
        At most half the window, or on each side less than the window.
    ceil_mode : bool
        Whether a last window may reach over the end of the padding.

    Returns
    -------
    y : (N, C, P, Q)
    positions : (N, C, P, Q) int32
        h W + w of the maximum in its plane of x.
    """
    n, c, p, q = shapes.pool2d_output_shape(
        x.shape, kernel_size, stride, padding, ceil_mode
    )
    x = _f64(x)
    h, w = x.shape[2:]
    best = np.full((n, c, p, q), -np.inf)
    positions = np.full((n, c, p, q), -1, np.int32)
    for r in range(kernel_size[0]):
        for s in range(kernel_size[1]):
            row = np.arange(p) * stride[0] - padding[0] + r
            column = np.arange(q) * stride[1] - padding[1] + s
            inside = ((row >= 0) & (row < h))[:, None] & ((column >= 0) & (column < w))
            # indices outside are moved to a real element and masked out again
            row, column = row.clip(0, h - 1)[:, None], column.clip(0, w - 1)
            value = x[:, :, row, column]
            wins = (value > best) | (np.isnan(value) & ~np.isnan(best))
            wins = inside & (wins | (positions < 0))
            best = np.where(wins, value, best)
            positions = np.where(wins, row * w + column, positions)
    return best, positions.astype(np.int32)


def maxpool2d_backward(
    dy, positions, x_shape, kernel_size, stride, padding=(0, 0), ceil_mode=False
):
    """dx[n, c, h, w] = sum of dy[n, c, p, q] over windows with positions = h W + w.

    Near a point without ties y[p, q] = x[positions[p, q]], so each dy goes to the
    element that was the maximum; windows overlap where the stride is smaller than the
    window, so an element may gather from several.

    Parameters
    ----------
    dy : (N, C, P, Q)
    positions : (N, C, P, Q) int32
    x_shape : tuple
        (N, C, H, W).
    kernel_size, stride, padding, ceil_mode
        As given to the forward.

    Returns
    -------
    dx : (N, C, H, W)
    """
    shapes.check_maxpool2d_backward(
        dy.shape, positions.shape, x_shape, kernel_size, stride, padding, ceil_mode
    )
    n, c, h, w = x_shape
    dx = np.zeros((n * c, h * w))
    plane = np.repeat(np.arange(n * c), dy.shape[2] * dy.shape[3])
    np.add.at(dx, (plane, positions.ravel()), _f64(dy).ravel())
    return dx.reshape(x_shape)


# softmax and losses


def log_softmax_forward(x):
    """y[n, f] = x[n, f] - log sum_j exp(x[n, j]).

    The maximum m of a row is taken out first, so that nothing overflows:
    log sum_j exp(x_j) = m + log sum_j exp(x_j - m).

    Parameters
    ----------
    x : (N, F)

    Returns
    -------
    y : (N, F)
    """
    shapes.check_scores("x", x.shape)
    x = _f64(x)
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def log_softmax_backward(dy, y):
    """dx[n, f] = dy[n, f] - exp(y[n, f]) sum_j dy[n, j].

    dy_j/dx_f = [j = f] - exp(x_f) / sum_i exp(x_i) = [j = f] - exp(y_f); multiplied
    with dy_j and summed over j.
    """
    shapes.check_scores("y", y.shape)
    shapes.check_same(y=y.shape, dy=dy.shape)
    dy = _f64(dy)
    return dy - np.exp(_f64(y)) * dy.sum(axis=1, keepdims=True)


def nll_loss_forward(log_probs, labels):
    """loss = -1/N sum_n log_probs[n, labels[n]]; NaN for an empty batch (0 / 0).

    Parameters
    ----------
    log_probs : (N, F)
    labels : (N,) int32 class indices

    Returns
    -------
    loss : ()

    Raises
    ------
    DataError
        If a label is not in 0 .. F - 1.
    """
    n, f = shapes.check_labels("log_probs", log_probs.shape, labels.shape)
    check_label_range(labels, f)
    if n == 0:
        return np.array(np.nan)
    return np.array(-_f64(log_probs)[np.arange(n), labels].sum() / n)


def nll_loss_backward(log_probs, labels):
    """dlog_probs[n, f] = -1/N at f = labels[n], 0 elsewhere: the loss is linear."""
    n, f = shapes.check_labels("log_probs", log_probs.shape, labels.shape)
    check_label_range(labels, f)
    dlog_probs = np.zeros((n, f))
    dlog_probs[np.arange(n), labels] = -1.0 / max(n, 1)
    return dlog_probs


def cross_entropy_forward(logits, labels):
    """:func:`nll_loss_forward` of :func:`log_softmax_forward`.

    Returns
    -------
    loss : ()
    log_probs : (N, F)
        What the backward needs.
    """
    shapes.check_labels("logits", logits.shape, labels.shape)
    log_probs = log_softmax_forward(logits)
    return nll_loss_forward(log_probs, labels), log_probs


def cross_entropy_backward(log_probs, labels):
    """dlogits = (softmax - onehot(labels)) / N.

    Put dy = -onehot / N of the loss into :func:`log_softmax_backward`: each row of dy
    sums to -1/N, so dx = -onehot / N + exp(log_probs) / N.
    """
    n, f = shapes.check_labels("log_probs", log_probs.shape, labels.shape)
    check_label_range(labels, f)
    dlogits = np.exp(_f64(log_probs))
    dlogits[np.arange(n), labels] -= 1.0
    return dlogits / max(n, 1)


def argmax(x):
    """Index of the first maximum of each row, int32; NaN counts as the maximum."""
    shapes.check_scores("x", x.shape)
    return np.argmax(x, axis=1).astype(np.int32)


def tally(losses, scores, labels, loss_sum, hits):
    """Add a batch to the figures of its epoch, in place.

    Parameters
    ----------
    losses : () or (N,)
        The batch's loss, or the terms that it is the mean of.
    scores : (N, F)
    labels : (N,) int32
        Those of no column are never hit.
    loss_sum : ()
        The batch's loss is added.
    hits : () int32
        The number of rows of ``scores`` whose argmax is the label is added.
    """
    shapes.check_tally(
        losses.shape, scores.shape, labels.shape, loss_sum.shape, hits.shape
    )
    loss_sum += np.mean(losses) if losses.size else np.nan
    hits += np.count_nonzero(argmax(scores) == labels)


# optimizer steps


def rmsprop_step(
    param, grad, square_avg, momentum_buffer, lr, alpha, eps, weight_decay, momentum
):
    """One step of RMSProp, in place on param, square_avg and momentum_buffer.

    g = grad + weight_decay param;  v = alpha v + (1 - alpha) g^2;  u = g / (sqrt(v) +
    eps);  with momentum b = momentum b + u and u = b;  param -= lr u.

    Parameters
    ----------
    param, grad, square_avg : same shape
    momentum_buffer : same shape, or None where momentum is 0
    lr : ()
    """
    check_step(param, grad, momentum_buffer, lr, momentum, square_avg)
    g = _f64(grad) + weight_decay * _f64(param)
    square_avg[...] = alpha * _f64(square_avg) + (1 - alpha) * g * g
    u = g / (np.sqrt(_f64(square_avg)) + eps)
    if momentum:
        momentum_buffer[...] = momentum * _f64(momentum_buffer) + u
        u = momentum_buffer
    param -= lr * u


def sgd_step(param, grad, momentum_buffer, lr, momentum, weight_decay, nesterov):
    """One step of gradient descent, in place on param and momentum_buffer.

    g = grad + weight_decay param;  with momentum b = momentum b + g, and then
    g = g + momentum b if nesterov else b;  param -= lr g. b starts at 0.

    Parameters
    ----------
    param, grad : same shape
    momentum_buffer : same shape, or None where momentum is 0
    lr : ()
    """
    check_step(param, grad, momentum_buffer, lr, momentum)
    g = _f64(grad) + weight_decay * _f64(param)
    if momentum:
        momentum_buffer[...] = momentum * _f64(momentum_buffer) + g
        b = _f64(momentum_buffer)
        g = g + momentum * b if nesterov else b
    param -= lr * g


def check_step(param, grad, momentum_buffer, lr, momentum, square_avg=None):
    if momentum and momentum_buffer is None:
        raise ValueError(
            f"momentum is {momentum} and needs a momentum_buffer, got None"
        )
    shapes.check_scalar("lr", np.shape(lr))
    shapes.check_same(
        param=param.shape,
        grad=grad.shape,
        square_avg=None if square_avg is None else square_avg.shape,
        momentum_buffer=None if momentum_buffer is None else momentum_buffer.shape,
    )


# data


def _mix32(x):
    """The finaliser of murmur3: a bijection of uint32 that mixes every bit."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x85EBCA6B)
    x = x ^ (x >> np.uint32(13))
    x = x * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _u32(value):
    return np.array([value & 0xFFFFFFFF], np.uint32)


def permutation(count, seed, epoch, device):
    """The numbers 0 .. count - 1 in an order drawn from (seed, epoch).

    A Feistel network of six rounds is a bijection of numbers of 2 b bits, whatever its
    round function: (L, R) -> (R, L ^ f(R)) is undone by (L, R) -> (R ^ f(L), L). With
    4^b >= count, applying it again while the result is not below count (walking the
    cycle) makes it a bijection of 0 .. count - 1, and each element is computed alone,
    so the order is the same on every device.

    Parameters
    ----------
    count : int
        0 to 2^31 - 1.
    seed : int
        64 bits.
    epoch : int
        32 bits.
    device : ignored here

    Returns
    -------
    (count,) int32
    """
    count = shapes.check_count(count)
    seed = int(seed)
    # wraps only in arrays: scalars of NumPy warn when uint32 overflows
    keys = [
        _mix32(_u32(seed + 0x9E3779B9 * (i + 1)))
        ^ _mix32(_u32((seed >> 32) + 0x7F4A7C15 * (int(epoch) + 1) + i))
        for i in range(6)
    ]
    bits = max(1, shapes.ceil_div(max(count - 1, 0).bit_length(), 2))
    half, mask = np.uint32(bits), np.uint32((1 << bits) - 1)

    def encrypt(x):
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix32(right + key) & mask)
        return (left << half) | right

    order = encrypt(np.arange(count, dtype=np.uint32))
    while True:
        outside = np.flatnonzero(order >= count)
        if not outside.size:
            return order.astype(np.int32)
        order[outside] = encrypt(order[outside])


def gather_images(images, index, scale, shift):
    """images[index] * scale + shift.

    Parameters
    ----------
    images : (M, ...) uint8 or float
    index : (N,) int32 row numbers
    scale, shift : float

    Returns
    -------
    (N, ...)
    """
    shapes.gather_output_shape(images.shape, index.shape)
    check_index_range(index, len(images))
    return _f64(images[index]) * scale + shift


def begin_step(feed):
    """Lay out the next batch of an epoch, and the learning rate of its step.

    Parameters
    ----------
    feed : cycnn.ops.Feed
        All but its order, classes and rates is written. A rate beyond the end of the
        rates is not.
    """
    _lay_out_batch(feed)
    _lay_out_rate(feed)


def _lay_out_batch(feed):
    first = int(feed.position[0])
    index = feed.order[first : first + len(feed.index)]
    for found, room in ((index, feed.index), (feed.classes[index], feed.labels)):
        room[: len(index)] = found
        room[len(index) :] = -1
    feed.position[:] += len(feed.index), 1


def _lay_out_rate(feed):
    step = int(feed.position[1]) - 1
    if feed.rates is not None and 0 <= step < len(feed.rates):
        feed.lr[...] = feed.rates[step]


def end_step(losses, scores, labels, loss_sum, hits, feed):
    """:func:`tally` of a step, its learning rate, and the batch of the next one.

    For when the gradients are made and the parameters not updated yet. ``labels`` may
    lie in those of the feed. Without classes ``scores``, ``labels`` and ``hits`` are
    None, and the loss () is all that is added.
    """
    if scores is None:
        loss_sum += losses
    else:
        tally(losses, scores, labels, loss_sum, hits)
    _lay_out_rate(feed)
    _lay_out_batch(feed)


def gather_labels(labels, index):
    """labels[index]: (N,) int32 of labels (M,) and row numbers (N,)."""
    shapes.gather_output_shape(labels.shape, index.shape)
    check_index_range(index, len(labels))
    return labels[index].astype(np.int32)


# operations of other modules, which take their helpers from this one

from .reference_augment import (  # noqa: F401
    augment_images,
    augment_key,
    check_augment,
    check_drawn,
    samples_of_step,
)
from .reference_blocks import (  # noqa: F401
    add_relu,
    concat_backward,
    concat_forward,
    zero_pad2d_backward,
    zero_pad2d_forward,
)
from .reference_conv_transpose import (  # noqa: F401
    conv_transpose2d_backward,
    conv_transpose2d_forward,
)
