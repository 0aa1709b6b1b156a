"""The operations on tensors in host memory.

Each computes in float32 what the function of the same name in
:mod:`cycnn.ops.reference` specifies, which is where the shapes, the errors and the
derivations are written down. This module checks arguments and makes the results; the
loops are in ``_cpu.pyx`` and run on OMP_NUM_THREADS threads with the same result for
any number of them.
"""

from __future__ import annotations

import numpy as np

from .. import shapes
from ..tensor import Tensor, from_array
from . import reference
from .cpu_activation import (  # noqa: F401
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
from .cpu_batch_norm import (  # noqa: F401
    batch_norm2d_backward,
    batch_norm2d_forward,
    batch_norm2d_inference,
)
from .cpu_common import (
    _FLOAT32,
    _INT32,
    _UINT8,
    _array,
    _cpu,
    _flat,
    _map,
    _map_backward,
    _map_rows,
    _map_rows_backward,
    _optional,
    _shape,
)
from .cpu_dropout import dropout_backward, dropout_forward  # noqa: F401
from .cpu_layer_norm import (  # noqa: F401
    layer_norm_backward,
    layer_norm_forward,
)
from .cpu_loss import (  # noqa: F401
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
from .cpu_optim import (  # noqa: F401
    adagrad_step,
    adam_step,
    centered_rmsprop_step,
    clip_by_norm,
    damped_sgd_step,
    ema_step,
    square_sums,
    swap,
)
from .cpu_pooling import (  # noqa: F401
    avgpool2d_backward,
    avgpool2d_forward,
    global_avgpool2d_backward,
    global_avgpool2d_forward,
)

# after _cpu, which sets how the threads wait
from . import _cpu_depthwise  # isort: skip


def _labels(name: str, scores, labels) -> tuple:
    """Arrays of (N, F) scores and (N,) labels that are in range."""
    scores, labels = _array(name, scores), _array("labels", labels, _INT32)
    _, f = shapes.check_labels(name, scores.shape, labels.shape)
    reference.check_label_range(labels, f)
    return scores, labels


# elementwise


def fill(x, value):
    """Set every element to ``value``, in place; any dtype."""
    _array("x", x, None)[...] = value


def add(x, y, out):
    """out = x + y; ``out`` may be ``x`` or ``y``."""
    x, y, out = _array("x", x), _array("y", y), _array("out", out)
    shapes.check_same(x=x.shape, y=y.shape, out=out.shape)
    if x.size:
        _cpu.add(_flat(x), _flat(y), _flat(out))


def relu_forward(x):
    """y = max(x, 0)."""
    return _map(_cpu.relu, x)


def relu_backward(dy, y):
    """dx = dy where y > 0, else 0."""
    return _map_backward(_cpu.relu_gradient, dy, "y", y)


def sigmoid_forward(x):
    """y = 1 / (1 + exp(-x))."""
    return _map(_cpu.sigmoid, x)


def sigmoid_backward(dy, y):
    """dx = dy y (1 - y)."""
    return _map_backward(_cpu.sigmoid_gradient, dy, "y", y)


# linear


def linear_forward(x, weight, bias):
    """y (N, O) = x (N, I) weight^T (I, O) + bias (O,)."""
    x, weight, bias = _array("x", x), _array("weight", weight), _optional("bias", bias)
    shape = shapes.linear_output_shape(x.shape, weight.shape, _shape(bias))
    y = _cpu.empty(shape, _FLOAT32)
    if y.size:
        n, inputs = x.shape
        _cpu.linear(_flat(x), _flat(weight), bias, _flat(y), n, inputs, shape[1])
    return from_array(y)


def linear_backward(dy, x, weight, dweight, dbias, need_dx=True, accumulate=False):
    """dx (N, I) or None; dweight (O, I) and dbias (O,) are written or added to."""
    dy, x, weight = _array("dy", dy), _array("x", x), _array("weight", weight)
    dweight, dbias = _array("dweight", dweight), _optional("dbias", dbias)
    shapes.check_linear_backward(
        dy.shape, x.shape, weight.shape, dweight.shape, _shape(dbias)
    )
    if not dy.size:
        _no_gradients(dweight, dbias, accumulate)
        return from_array(np.zeros_like(x)) if need_dx else None
    (n, inputs), outputs = x.shape, dy.shape[1]
    _cpu.linear_gradient_weight(
        _flat(dy), _flat(x), _flat(dweight), dbias, n, inputs, outputs, accumulate
    )
    if not need_dx:
        return None
    dx = _cpu.empty(x.shape, _FLOAT32)
    _cpu.linear_gradient_x(_flat(dy), _flat(weight), _flat(dx), n, inputs, outputs)
    return from_array(dx)


def _no_gradients(dweight, dbias, accumulate):
    """What an empty batch gives: gradients of zero."""
    if not accumulate:
        dweight[...] = 0
        if dbias is not None:
            dbias[...] = 0


# convolution and pooling


def _convolution(x_shape, w_shape, y_shape, stride, padding, dilation, groups):
    """The loops for a geometry."""
    depthwise = groups > 1 and w_shape[1] == 1
    kind = _cpu_depthwise.Depthwise if depthwise else _cpu.Convolution
    return kind(x_shape, w_shape, y_shape, stride, padding, dilation, groups)


def conv2d_forward(
    x, weight, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
):
    """y (N, K, P, Q) of x (N, C, H, W) and weight (K, C / groups, R, S)."""
    x, weight, bias = _array("x", x), _array("weight", weight), _optional("bias", bias)
    shape = shapes.conv2d_output_shape(
        x.shape, weight.shape, stride, padding, dilation, groups, _shape(bias)
    )
    y = _cpu.empty(shape, _FLOAT32)
    if y.size:
        conv = _convolution(
            x.shape, weight.shape, shape, stride, padding, dilation, groups
        )
        conv.forward(_flat(x), _flat(weight), bias, _flat(y))
    return from_array(y)


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
    """dx (N, C, H, W) or None; dweight and dbias are written or added to."""
    dy, x, weight = _array("dy", dy), _array("x", x), _array("weight", weight)
    dweight, dbias = _array("dweight", dweight), _optional("dbias", dbias)
    shapes.check_conv2d_backward(
        dy.shape,
        x.shape,
        weight.shape,
        dweight.shape,
        _shape(dbias),
        stride,
        padding,
        dilation,
        groups,
    )
    if not dy.size:
        _no_gradients(dweight, dbias, accumulate)
        return from_array(np.zeros_like(x)) if need_dx else None
    conv = _convolution(
        x.shape, weight.shape, dy.shape, stride, padding, dilation, groups
    )
    conv.gradient_weight(_flat(dy), _flat(x), _flat(dweight), dbias, accumulate)
    if not need_dx:
        return None
    dx = _cpu.empty(x.shape, _FLOAT32)
    conv.gradient_x(_flat(dy), _flat(weight), _flat(dx))
    return from_array(dx)


def maxpool2d_forward(
    x, kernel_size, stride, padding=(0, 0), ceil_mode=False
):
    """y and int32 positions (N, C, P, Q) of the maximum of each window of x."""
    x = _array("x", x)
    shape = shapes.pool2d_output_shape(
        x.shape, kernel_size, stride, padding, ceil_mode
    )
    y, positions = _cpu.empty(shape, _FLOAT32), _cpu.empty(shape, _INT32)
    if y.size:
        _cpu.maxpool2d(
            _flat(x),
            _flat(y),
            _flat(positions),
            x.shape,
            shape,
            kernel_size,
            stride,
            padding,
        )
    return from_array(y), from_array(positions)


def maxpool2d_backward(
    dy, positions, x_shape, kernel_size, stride, padding=(0, 0), ceil_mode=False
):
    """dx of shape ``x_shape``: each dy goes to the maximum of its window."""
    dy, positions = _array("dy", dy), _array("positions", positions, _INT32)
    shapes.check_maxpool2d_backward(
        dy.shape, positions.shape, x_shape, kernel_size, stride, padding, ceil_mode
    )
    dx = _cpu.empty(x_shape, _FLOAT32)
    if dx.size:
        _cpu.maxpool2d_gradient(
            _flat(dy),
            _flat(positions),
            _flat(dx),
            x_shape,
            dy.shape,
            kernel_size,
            stride,
            padding,
        )
    return from_array(dx)


# softmax and losses


def log_softmax_forward(x):
    """y (N, F) = x - log sum_f exp(x)."""
    return _map_rows(_cpu.log_softmax, x)


def log_softmax_backward(dy, y):
    """dx (N, F) = dy - exp(y) sum_f dy."""
    return _map_rows_backward(_cpu.log_softmax_gradient, dy, y)


def _mean_loss(log_probs, labels):
    n = len(labels)
    if not n:
        return from_array(np.array(np.nan, np.float32))
    picked = log_probs[np.arange(n), labels]
    return from_array(np.array(-picked.mean(dtype=np.float64), np.float32))


def nll_loss_forward(log_probs, labels):
    """loss () = the mean over N of -log_probs[n, labels[n]]; NaN for N = 0."""
    return _mean_loss(*_labels("log_probs", log_probs, labels))


def nll_loss_backward(log_probs, labels):
    """dlog_probs (N, F): -1/N at the label, 0 elsewhere."""
    log_probs, labels = _labels("log_probs", log_probs, labels)
    n = len(labels)
    dlog_probs = np.zeros_like(log_probs)
    dlog_probs[np.arange(n), labels] = -1.0 / max(n, 1)
    return from_array(dlog_probs)


def cross_entropy_forward(logits, labels):
    """(loss (), log_probs (N, F)): log-softmax and the loss in one."""
    _, labels_array = _labels("logits", logits, labels)
    log_probs = log_softmax_forward(logits)
    return _mean_loss(log_probs.array, labels_array), log_probs


def cross_entropy_backward(log_probs, labels):
    """dlogits (N, F) = (exp(log_probs) - onehot(labels)) / N."""
    log_probs, labels = _labels("log_probs", log_probs, labels)
    n = len(labels)
    dlogits = np.exp(log_probs)
    dlogits[np.arange(n), labels] -= 1
    dlogits *= np.float32(1 / max(n, 1))
    return from_array(dlogits)


def argmax(x):
    """Index of the first maximum of each row of x (N, F): int32 (N,)."""
    x = _array("x", x)
    n, f = shapes.check_scores("x", x.shape)
    out = _cpu.empty((n,), _INT32)
    if n:
        _cpu.argmax(_flat(x), out, n, f)
    return from_array(out)


def tally(losses, scores, labels, loss_sum, hits):
    """loss_sum += mean of losses; hits += rows of scores whose argmax is the label."""
    reference.tally(*_tally_arrays(losses, scores, labels, loss_sum, hits))


def _tally_arrays(losses, scores, labels, loss_sum, hits):
    return (
        _array("losses", losses),
        _array("scores", scores),
        _array("labels", labels, _INT32),
        _array("loss_sum", loss_sum),
        _array("hits", hits, _INT32),
    )


# optimizer steps


def rmsprop_step(
    param, grad, square_avg, momentum_buffer, lr, alpha, eps, weight_decay, momentum
):
    """One step of RMSProp, in place."""
    param, grad = _array("param", param), _array("grad", grad)
    square_avg, lr = _array("square_avg", square_avg), _array("lr", lr)
    buffer = _optional("momentum_buffer", momentum_buffer)
    reference.check_step(param, grad, buffer, lr, momentum, square_avg)
    if param.size:
        _cpu.rmsprop(
            _flat(param),
            _flat(grad),
            _flat(square_avg),
            _flat(buffer) if momentum else None,
            lr.item(),
            alpha,
            eps,
            weight_decay,
            momentum,
        )


def sgd_step(param, grad, momentum_buffer, lr, momentum, weight_decay, nesterov):
    """One step of gradient descent, in place."""
    param, grad, lr = _array("param", param), _array("grad", grad), _array("lr", lr)
    buffer = _optional("momentum_buffer", momentum_buffer)
    reference.check_step(param, grad, buffer, lr, momentum)
    if param.size:
        _cpu.sgd(
            _flat(param),
            _flat(grad),
            _flat(buffer) if momentum else None,
            lr.item(),
            momentum,
            weight_decay,
            nesterov,
        )


# data


def permutation(count, seed, epoch, device):
    """0 .. count - 1 as int32, in an order that depends on (seed, epoch) alone."""
    return from_array(reference.permutation(count, seed, epoch, device))


def gather_images(images, index, scale, shift):
    """images[index] * scale + shift, float32; images are uint8 or float32."""
    as_bytes = isinstance(images, Tensor) and images.dtype == _UINT8
    images = _array("images", images, _UINT8 if as_bytes else _FLOAT32)
    index = _array("index", index, _INT32)
    shape = shapes.gather_output_shape(images.shape, index.shape)
    reference.check_index_range(index, len(images))
    out = _cpu.empty(shape, _FLOAT32)
    if out.size:
        gather = _cpu.gather_bytes if as_bytes else _cpu.gather_floats
        gather(_flat(images), index, _flat(out), scale, shift)
    return from_array(out)


def gather_labels(labels, index):
    """labels[index]: int32 (N,)."""
    labels, index = _array("labels", labels, _INT32), _array("index", index, _INT32)
    shapes.gather_output_shape(labels.shape, index.shape)
    reference.check_index_range(index, len(labels))
    return from_array(labels[index])


def begin_step(feed):
    """Lay out the next batch and the learning rate of its step."""
    reference.begin_step(_feed_arrays(feed))


def end_step(losses, scores, labels, loss_sum, hits, feed):
    """The tally of a step, its learning rate, and the batch of the next one."""
    if scores is None:
        given = _array("losses", losses), None, None, _array("loss_sum", loss_sum), None
    else:
        given = _tally_arrays(losses, scores, labels, loss_sum, hits)
    reference.end_step(*given, _feed_arrays(feed))


def _feed_arrays(feed):
    return feed._make(x if x is None else x.array for x in feed)


# operations of other modules, which take their helpers from this one

from .cpu_augment import (  # noqa: F401
    augment_images,
    augment_key,
    samples_of_step,
)
from .cpu_blocks import (  # noqa: F401
    add_relu,
    concat_backward,
    concat_forward,
    zero_pad2d_backward,
    zero_pad2d_forward,
)
from .cpu_conv_transpose import (  # noqa: F401
    conv_transpose2d_backward,
    conv_transpose2d_forward,
)
