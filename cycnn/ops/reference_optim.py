"""The specification of the optimizers beyond the plain ones; see :mod:`.reference`.

``step`` is int32 (2,): the steps done so far, and what the GPU's blocks count with (0
between steps). A step that is given ``advance`` adds 1 to it at its end; where several
slabs are updated one after the other, the last one does.
"""

from __future__ import annotations

import numpy as np

from .. import shapes
from .reference_common import _f64


def check_step_count(lr_shape, step_shape, **slabs) -> None:
    """lr is (), the step (2,), and all slabs have one shape."""
    shapes.check_scalar("lr", lr_shape)
    if step_shape is not None:
        shapes.check_same(**{"a step count": (2,), "step": tuple(step_shape)})
    shapes.check_same(**slabs)


def _shape(x):
    return None if x is None else x.shape


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
    """One step of Adam, or with ``decoupled`` AdamW, in place.

    With t the number of this step, from 1::

        p = (1 - lr weight_decay) p     if decoupled, else  g = g + weight_decay p
        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        V = max(V, v)                   if there is a max_exp_avg_sq, else  V = v
        p = p - lr (m / c1) / (sqrt(V / c2) + eps),  c1 = 1 - beta1^t,  c2 = 1 - beta2^t

    m is the mean of t gradients with weights that sum to c1, which the division makes
    up for; likewise v and c2.

    Parameters
    ----------
    param, grad, exp_avg, exp_avg_sq : same shape
    max_exp_avg_sq : same shape, or None
    step : (2,) int32
    advance : bool
    lr : ()
    """
    check_step_count(
        np.shape(lr),
        step.shape,
        param=param.shape,
        grad=grad.shape,
        exp_avg=exp_avg.shape,
        exp_avg_sq=exp_avg_sq.shape,
        max_exp_avg_sq=_shape(max_exp_avg_sq),
    )
    t = int(step[0]) + 1
    p, g = _f64(param), _f64(grad)
    if decoupled:
        p = p * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * p
    exp_avg[...] = beta1 * _f64(exp_avg) + (1 - beta1) * g
    exp_avg_sq[...] = beta2 * _f64(exp_avg_sq) + (1 - beta2) * g * g
    largest = exp_avg_sq
    if max_exp_avg_sq is not None:
        np.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
        largest = max_exp_avg_sq
    root = np.sqrt(_f64(largest) / (1 - beta2**t)) + eps
    param[...] = p - lr * (_f64(exp_avg) / (1 - beta1**t)) / root
    step[0] += bool(advance)


def adagrad_step(
    param, grad, square_sum, step, advance, lr, lr_decay, eps, weight_decay
):
    """One step of Adagrad, in place. With t the number of this step, from 1::

    g = g + weight_decay p
    s = s + g^2
    p = p - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)
    """
    check_step_count(
        np.shape(lr),
        step.shape,
        param=param.shape,
        grad=grad.shape,
        square_sum=square_sum.shape,
    )
    g = _f64(grad) + weight_decay * _f64(param)
    square_sum += g * g
    rate = lr / (1 + int(step[0]) * lr_decay)
    param -= rate * g / (np.sqrt(_f64(square_sum)) + eps)
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
    """RMSProp by the standard deviation of the gradient, in place.

    As ``rmsprop_step``, but with a = alpha a + (1 - alpha) g the divisor is
    sqrt(v - a^2) + eps. v - a^2 is a variance; where rounding makes it negative it is
    taken as 0.
    """
    shapes.check_scalar("lr", np.shape(lr))
    shapes.check_same(
        param=param.shape,
        grad=grad.shape,
        square_avg=square_avg.shape,
        grad_avg=grad_avg.shape,
        momentum_buffer=_shape(momentum_buffer),
    )
    g = _f64(grad) + weight_decay * _f64(param)
    square_avg[...] = alpha * _f64(square_avg) + (1 - alpha) * g * g
    grad_avg[...] = alpha * _f64(grad_avg) + (1 - alpha) * g
    variance = _f64(square_avg) - _f64(grad_avg) ** 2
    u = g / (np.sqrt(np.maximum(variance, 0)) + eps)
    if momentum_buffer is not None:
        momentum_buffer[...] = momentum * _f64(momentum_buffer) + u
        u = momentum_buffer
    param -= lr * u


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
    """Gradient descent with a damped momentum, in place.

    As ``sgd_step``, but b = momentum b + (1 - dampening) g; the first step takes the
    whole gradient, b = g, as in PyTorch.
    """
    check_step_count(
        np.shape(lr),
        step.shape,
        param=param.shape,
        grad=grad.shape,
        momentum_buffer=momentum_buffer.shape,
    )
    share = 1 - dampening if step[0] else 1.0
    g = _f64(grad) + weight_decay * _f64(param)
    momentum_buffer[...] = momentum * _f64(momentum_buffer) + share * g
    b = _f64(momentum_buffer)
    param -= lr * (g + momentum * b if nesterov else b)
    step[0] += bool(advance)


def square_sums(x, out):
    """out[i] = the sum of the squares of part i of x.

    Parameters
    ----------
    x : (n,)
    out : (parts,)
        Part i is ``x[i * size : (i + 1) * size]`` with size = ceil(n / parts).
    """
    size = _part_size(x.shape, out.shape)
    for i in range(len(out)):
        out[i] = np.sum(_f64(x[i * size : (i + 1) * size]) ** 2)


def _part_size(x_shape, out_shape) -> int:
    """Elements of x (n,) that one of out (parts,) sums up."""
    if len(x_shape) != 1 or len(out_shape) != 1 or not out_shape[0]:
        raise shapes.ShapeError(
            f"x has shape {tuple(x_shape)} and out {tuple(out_shape)}: expected (n,) "
            f"and (parts,) with 1 part or more"
        )
    return shapes.ceil_div(x_shape[0], out_shape[0])


def clip_by_norm(x, sums, max_norm, norm):
    """Shorten x if a vector that it is part of is longer than ``max_norm``, in place.

    Parameters
    ----------
    x : (n,)
    sums : (parts,)
        Sums of squares, of the whole vector: its length is the root of their sum.
    max_norm : float
    norm : ()
        The length is written. x is multiplied by max_norm / (norm + 1e-6) if that is
        less than 1, or NaN.
    """
    shapes.check_scalar("norm", norm.shape)
    norm[...] = np.sqrt(np.sum(_f64(sums)))
    scale = max_norm / (_f64(norm) + 1e-6)
    if not scale >= 1:
        x *= scale


def ema_step(average, param, decay):
    """average = decay average + (1 - decay) param, in place."""
    shapes.check_same(param=param.shape, average=average.shape)
    average += (1 - decay) * (_f64(param) - _f64(average))


def swap(x, y):
    """Exchange the numbers of x and y."""
    shapes.check_same(x=x.shape, y=y.shape)
    x[...], y[...] = y.copy(), x.copy()
