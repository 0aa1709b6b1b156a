"""The losses beyond the plain ones on tensors of a GPU; see :mod:`.cuda`."""

from __future__ import annotations

from .. import shapes
from ..errors import ShapeError
from ..gpu.launch import Kernel
from ..shapes import ceil_div
from ..tensor import empty_on_gpu
from . import cuda
from .cuda_common import (
    _BLOCK,
    _FLOAT32,
    _INT32_MAX,
    _get,
    _int32,
    _of_rows,
    _strided,
)

_TERMS = 8 * _BLOCK  # that one block sums, if the blocks are not too many
_MOST_BLOCKS = 1024

_mse_sum = Kernel("loss", "mse_sum", "PPPq")
_mse_backward = Kernel("loss", "mse_backward", "PPPqf")
_smooth_l1_sum = Kernel("loss", "smooth_l1_sum", "PPPqf")
_smooth_l1_backward = Kernel("loss", "smooth_l1_backward", "PPPqff")
_bce_sum = Kernel("loss", "bce_sum", "PPPqPi")
_bce_backward = Kernel("loss", "bce_backward", "PPPqfPi")
_finish_loss = Kernel("loss", "finish_loss", "PPif")
_weighted_nll_terms = Kernel("loss", "weighted_nll_terms", "PPPPfiiii")
_finish_weighted_nll = Kernel("loss", "finish_weighted_nll", "PPPii")
_weighted_nll_backward = Kernel("loss", "weighted_nll_backward", "PPPPfiiii")
_weighted_cross_entropy_backward = Kernel(
    "loss", "weighted_cross_entropy_backward", "PPPPPfiiii"
)


def _check(x, target):
    shapes.check_same(x=x.shape, target=target.shape)


def _reduced(kernel, x, target, mean, *more):
    """The loss from a kernel that sums its terms, block by block."""
    _check(x, target)
    device, n = x.device, x.size
    stream = _get(device.index).compute
    blocks = min(ceil_div(n, _TERMS), _MOST_BLOCKS)
    partial = empty_on_gpu((blocks,), _FLOAT32, device)
    if n:
        kernel(stream, blocks, _BLOCK, partial, x, target, n, *more)
    loss = empty_on_gpu((), _FLOAT32, device)
    _finish_loss(stream, 1, _BLOCK, loss, partial, blocks, n if mean else 1)
    return loss


def _slopes(kernel, x, target, mean, *more):
    _check(x, target)
    device, n = x.device, x.size
    dx = empty_on_gpu(x.shape, _FLOAT32, device)
    if n:
        kernel(
            _get(device.index).compute, _strided(n), _BLOCK, dx, x, target, n,
            n if mean else 1, *more,
        )  # fmt: skip
    return dx


def mse_loss_forward(x, target, mean):
    return _reduced(_mse_sum, x, target, mean)


def mse_loss_backward(x, target, mean):
    return _slopes(_mse_backward, x, target, mean)


def smooth_l1_loss_forward(x, target, beta, mean):
    return _reduced(_smooth_l1_sum, x, target, mean, beta)


def smooth_l1_loss_backward(x, target, beta, mean):
    return _slopes(_smooth_l1_backward, x, target, mean, beta)


def _pos_weight(x, pos_weight):
    if pos_weight is None:
        return None, 1
    shapes.check_period("pos_weight", pos_weight.shape, x.shape)
    if pos_weight.size > _INT32_MAX:
        raise ShapeError(
            f"pos_weight has {pos_weight.size} numbers: the GPU's kernels number at "
            f"most {_INT32_MAX}"
        )
    return pos_weight, pos_weight.size


def bce_with_logits_forward(x, target, pos_weight, mean):
    return _reduced(_bce_sum, x, target, mean, *_pos_weight(x, pos_weight))


def bce_with_logits_backward(x, target, pos_weight, mean):
    return _slopes(_bce_backward, x, target, mean, *_pos_weight(x, pos_weight))


def _checked(log_probs, labels, weight, smoothing, ignore_index):
    """(N, F) and what the kernels are told of the options."""
    n, f = shapes.check_labels("log_probs", log_probs.shape, labels.shape)
    _int32("labels", labels)
    if weight is not None:
        shapes.check_same(weight=weight.shape, classes=(f,))
    ignores = ignore_index is not None
    return (n, f), (smoothing, int(ignores), ignore_index if ignores else 0, n, f)


def weighted_nll_loss_forward(log_probs, labels, weight, smoothing, ignore_index, mean):
    (n, _), options = _checked(log_probs, labels, weight, smoothing, ignore_index)
    device = log_probs.device
    stream = _get(device.index).compute
    terms = empty_on_gpu((2, n), _FLOAT32, device)
    if n:
        _weighted_nll_terms(
            stream, _of_rows(n), _BLOCK, terms, log_probs, labels, weight, *options
        )
    loss, total = (empty_on_gpu((), _FLOAT32, device) for _ in range(2))
    _finish_weighted_nll(stream, 1, _BLOCK, loss, total, terms, n, int(mean))
    return loss, total


def weighted_nll_loss_backward(
    log_probs, labels, weight, smoothing, ignore_index, total
):
    shape, options = _checked(log_probs, labels, weight, smoothing, ignore_index)
    shapes.check_scalar("total", total.shape)
    device = log_probs.device
    dlog_probs = empty_on_gpu(shape, _FLOAT32, device)
    if shape[0]:
        _weighted_nll_backward(
            _get(device.index).compute, _of_rows(shape[0]), _BLOCK, dlog_probs, labels,
            weight, total, *options,
        )  # fmt: skip
    return dlog_probs


def weighted_cross_entropy_forward(
    logits, labels, weight, smoothing, ignore_index, mean
):
    shapes.check_labels("logits", logits.shape, labels.shape)
    log_probs = cuda.log_softmax_forward(logits)
    loss, total = weighted_nll_loss_forward(
        log_probs, labels, weight, smoothing, ignore_index, mean
    )
    return loss, total, log_probs


def weighted_cross_entropy_backward(
    log_probs, labels, weight, smoothing, ignore_index, total
):
    shape, options = _checked(log_probs, labels, weight, smoothing, ignore_index)
    shapes.check_scalar("total", total.shape)
    device = log_probs.device
    dlogits = empty_on_gpu(shape, _FLOAT32, device)
    if shape[0]:
        _weighted_cross_entropy_backward(
            _get(device.index).compute, _of_rows(shape[0]), _BLOCK, dlogits, log_probs,
            labels, weight, total, *options,
        )  # fmt: skip
    return dlogits
