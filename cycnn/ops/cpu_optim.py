"""Optimizers beyond the plain ones on tensors in host memory; see :mod:`.cpu`."""

from __future__ import annotations

import math

import numpy as np

from .. import shapes
from . import reference_optim
from .cpu_common import _array, _flat, _optional, _shape

# behind cpu_common, which sees to the threads of OpenMP
from . import _cpu_optim as _loops  # isort: skip

_INT32 = np.dtype("int32")


def _slabs(**given):
    """Flat arrays of slabs, some of which may be None."""
    return [_flat(_optional(name, x)) for name, x in given.items()]


def _counted(lr, step, **slabs):
    """The learning rate, the array of the step and the slabs, checked."""
    lr, step = _array("lr", lr), _array("step", step, _INT32)
    shapes_of = {name: _shape(_optional(name, x)) for name, x in slabs.items()}
    reference_optim.check_step_count(lr.shape, step.shape, **shapes_of)
    return lr.item(), step, _slabs(**slabs)


def adam_step(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    step,
    advance,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled,
):
    """One step of Adam or AdamW, in place."""
    lr, step, slabs = _counted(
        lr,
        step,
        param=param,
        grad=grad,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        max_exp_avg_sq=max_exp_avg_sq,
    )
    t = int(step[0]) + 1
    _loops.adam(
        *slabs,
        lr,
        1 - beta1**t,
        math.sqrt(1 - beta2**t),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        weight_decay,
        decoupled,
    )
    step[0] += bool(advance)


def adagrad_step(
    param, grad, square_sum, step, advance, lr, lr_decay, eps, weight_decay
):
    """One step of Adagrad, in place."""
    lr, step, slabs = _counted(lr, step, param=param, grad=grad, square_sum=square_sum)
    rate = lr / (1 + int(step[0]) * lr_decay)
    _loops.adagrad(*slabs, rate, eps, weight_decay)
    step[0] += bool(advance)


def centered_rmsprop_step(
    param,
    grad,
    square_avg,
    grad_avg,
    momentum_buffer,
    lr,
    alpha,
    eps,
    weight_decay,
    momentum,
):
    """One step of RMSProp by the standard deviation of the gradient, in place."""
    lr = _array("lr", lr)
    given = {
        "param": param,
        "grad": grad,
        "square_avg": square_avg,
        "grad_avg": grad_avg,
        "momentum_buffer": momentum_buffer,
    }
    slabs = _slabs(**given)
    shapes.check_scalar("lr", lr.shape)
    shapes.check_same(
        **{name: x if x is None else x.shape for name, x in given.items()}
    )
    _loops.centered_rmsprop(
        *slabs, lr.item(), alpha, 1 - alpha, eps, weight_decay, momentum
    )


def damped_sgd_step(
    param,
    grad,
    momentum_buffer,
    step,
    advance,
    lr,
    momentum,
    dampening,
    weight_decay,
    nesterov,
):
    """One step of gradient descent with a damped momentum, in place."""
    lr, step, slabs = _counted(
        lr, step, param=param, grad=grad, momentum_buffer=momentum_buffer
    )
    share = 1 - dampening if step[0] else 1.0
    _loops.damped_sgd(*slabs, lr, momentum, share, weight_decay, nesterov)
    step[0] += bool(advance)


def square_sums(x, out):
    """out[i] = the sum of the squares of part i of x."""
    x, out = _array("x", x), _array("out", out)
    size = reference_optim._part_size(x.shape, out.shape)
    _loops.square_sums(x, out, size)


def clip_by_norm(x, sums, max_norm, norm):
    """Shorten x if the vector that it is part of is longer than ``max_norm``."""
    x, sums, norm = (_array(*p) for p in (("x", x), ("sums", sums), ("norm", norm)))
    shapes.check_scalar("norm", norm.shape)
    norm[...] = np.sqrt(sums.sum(dtype=np.float64))
    scale = np.float32(max_norm) / (norm[()] + np.float32(1e-6))
    if not scale >= 1:
        _loops.scale(x, scale)


def ema_step(average, param, decay):
    """average = decay average + (1 - decay) param, in place."""
    average, param = _array("average", average), _array("param", param)
    shapes.check_same(param=param.shape, average=average.shape)
    _loops.ema(_flat(average), _flat(param), 1 - decay)


def swap(x, y):
    """Exchange the numbers of x and y."""
    x, y = _array("x", x), _array("y", y)
    shapes.check_same(x=x.shape, y=y.shape)
    x[...], y[...] = y.copy(), x.copy()
