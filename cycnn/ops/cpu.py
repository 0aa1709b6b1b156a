"""The operations on tensors in host memory.

Each computes what the function of the same name in :mod:`cycnn.ops.reference`
specifies; here by calling it and rounding to float32.
"""

from __future__ import annotations

import numpy as np

from ..tensor import Tensor, from_array
from . import reference


def _in(x):
    return x.array if isinstance(x, Tensor) else x


def _out(y):
    if isinstance(y, tuple):
        return tuple(map(_out, y))
    if y is None:
        return None
    dtype = np.int32 if y.dtype.kind in "iu" else np.float32
    return from_array(np.asarray(y, dtype, order="C"))


def fill(x, value):
    reference.fill(_in(x), _in(value))


def add(x, y, out):
    reference.add(_in(x), _in(y), _in(out))


def relu_forward(x):
    return _out(reference.relu_forward(_in(x)))


def relu_backward(dy, y):
    return _out(reference.relu_backward(_in(dy), _in(y)))


def sigmoid_forward(x):
    return _out(reference.sigmoid_forward(_in(x)))


def sigmoid_backward(dy, y):
    return _out(reference.sigmoid_backward(_in(dy), _in(y)))


def linear_forward(x, weight, bias):
    return _out(reference.linear_forward(_in(x), _in(weight), _in(bias)))


def linear_backward(dy, x, weight, dweight, dbias, need_dx=True, accumulate=False):
    return _out(
        reference.linear_backward(
            _in(dy),
            _in(x),
            _in(weight),
            _in(dweight),
            _in(dbias),
            _in(need_dx),
            _in(accumulate),
        )
    )


def conv2d_forward(
    x, weight, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
):
    return _out(
        reference.conv2d_forward(
            _in(x),
            _in(weight),
            _in(bias),
            _in(stride),
            _in(padding),
            _in(dilation),
            _in(groups),
        )
    )


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
    return _out(
        reference.conv2d_backward(
            _in(dy),
            _in(x),
            _in(weight),
            _in(dweight),
            _in(dbias),
            _in(stride),
            _in(padding),
            _in(dilation),
            _in(groups),
            _in(need_dx),
            _in(accumulate),
        )
    )


def maxpool2d_forward(x, kernel_size, stride, padding=(0, 0)):
    return _out(
        reference.maxpool2d_forward(_in(x), _in(kernel_size), _in(stride), _in(padding))
    )


def maxpool2d_backward(dy, positions, x_shape, kernel_size, stride, padding=(0, 0)):
    return _out(
        reference.maxpool2d_backward(
            _in(dy),
            _in(positions),
            _in(x_shape),
            _in(kernel_size),
            _in(stride),
            _in(padding),
        )
    )


def log_softmax_forward(x):
    return _out(reference.log_softmax_forward(_in(x)))


def log_softmax_backward(dy, y):
    return _out(reference.log_softmax_backward(_in(dy), _in(y)))


def nll_loss_forward(log_probs, labels):
    return _out(reference.nll_loss_forward(_in(log_probs), _in(labels)))


def nll_loss_backward(log_probs, labels):
    return _out(reference.nll_loss_backward(_in(log_probs), _in(labels)))


def cross_entropy_forward(logits, labels):
    return _out(reference.cross_entropy_forward(_in(logits), _in(labels)))


def cross_entropy_backward(log_probs, labels):
    return _out(reference.cross_entropy_backward(_in(log_probs), _in(labels)))


def argmax(x):
    return _out(reference.argmax(_in(x)))


def count_correct(scores, labels, total):
    reference.count_correct(_in(scores), _in(labels), _in(total))


def rmsprop_step(
    param, grad, square_avg, momentum_buffer, lr, alpha, eps, weight_decay, momentum
):
    reference.rmsprop_step(
        _in(param),
        _in(grad),
        _in(square_avg),
        _in(momentum_buffer),
        _in(lr),
        _in(alpha),
        _in(eps),
        _in(weight_decay),
        _in(momentum),
    )


def sgd_step(param, grad, momentum_buffer, lr, momentum, weight_decay, nesterov):
    reference.sgd_step(
        _in(param),
        _in(grad),
        _in(momentum_buffer),
        _in(lr),
        _in(momentum),
        _in(weight_decay),
        _in(nesterov),
    )


def permutation(count, seed, epoch, device):
    return _out(reference.permutation(_in(count), _in(seed), _in(epoch), _in(device)))


def gather_images(images, index, scale, shift):
    return _out(
        reference.gather_images(_in(images), _in(index), _in(scale), _in(shift))
    )


def gather_labels(labels, index):
    return _out(reference.gather_labels(_in(labels), _in(index)))
