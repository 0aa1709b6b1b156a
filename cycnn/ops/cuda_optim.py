"""Optimizers beyond the plain ones on tensors of a GPU; see :mod:`.cuda`."""

from __future__ import annotations

import math

from .. import shapes
from ..gpu.launch import Kernel
from . import reference_optim
from .cuda_common import _BLOCK, _get, _int32, _strided

_adam_step = Kernel("optim", "adam_step", "PPPPPPiPffffffffiq")
_adagrad_step = Kernel("optim", "adagrad_step", "PPPPiPfffq")
_centered_rmsprop_step = Kernel("optim", "centered_rmsprop_step", "PPPPPPfffffq")
_damped_sgd_step = Kernel("optim", "damped_sgd_step", "PPPPiPfffiq")
_square_sums = Kernel("optim", "square_sums", "PPqq")
_clip_by_norm = Kernel("optim", "clip_by_norm", "PPPifq")
_ema_step = Kernel("optim", "ema_step", "PPfq")
_swap = Kernel("optim", "swap", "PPq")


def _check(lr, step, **slabs):
    if step is not None:
        _int32("step", step)
    given = {name: None if x is None else x.shape for name, x in slabs.items()}
    reference_optim.check_step_count(
        lr.shape, None if step is None else step.shape, **given
    )


def _launch(kernel, n, on, *arguments):
    # a block counts the step even where there is nothing to update
    grid = max(1, _strided(n))
    kernel(_get(on.device.index).compute, grid, _BLOCK, *arguments, n)


def log_of(beta) -> float:
    """log(beta), of which kernels make 1 - beta^t = -expm1(t log(beta))."""
    return math.log(beta) if beta else -math.inf


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
    _check(
        lr,
        step,
        param=param,
        grad=grad,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        max_exp_avg_sq=max_exp_avg_sq,
    )
    _launch(
        _adam_step, param.size, param, param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq,
        step, int(advance), lr, beta1, 1 - beta1, log_of(beta1), beta2, 1 - beta2,
        log_of(beta2), eps, weight_decay, int(decoupled),
    )  # fmt: skip


def adagrad_step(
    param, grad, square_sum, step, advance, lr, lr_decay, eps, weight_decay
):
    _check(lr, step, param=param, grad=grad, square_sum=square_sum)
    _launch(
        _adagrad_step, param.size, param, param, grad, square_sum, step, int(advance),
        lr, lr_decay, eps, weight_decay,
    )  # fmt: skip


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
    _check(
        lr,
        None,
        param=param,
        grad=grad,
        square_avg=square_avg,
        grad_avg=grad_avg,
        momentum_buffer=momentum_buffer,
    )
    _launch(
        _centered_rmsprop_step, param.size, param, param, grad, square_avg, grad_avg,
        momentum_buffer, lr, alpha, 1 - alpha, eps, weight_decay, momentum,
    )  # fmt: skip


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
    _check(lr, step, param=param, grad=grad, momentum_buffer=momentum_buffer)
    _launch(
        _damped_sgd_step, param.size, param, param, grad, momentum_buffer, step,
        int(advance), lr, momentum, 1 - dampening, weight_decay, int(nesterov),
    )  # fmt: skip


def square_sums(x, out):
    size = reference_optim._part_size(x.shape, out.shape)
    _square_sums(_get(x.device.index).compute, out.size, _BLOCK, out, x, size, x.size)


def clip_by_norm(x, sums, max_norm, norm):
    shapes.check_scalar("norm", norm.shape)
    _launch(_clip_by_norm, x.size, x, x, norm, sums, sums.size, max_norm)


def ema_step(average, param, decay):
    shapes.check_same(param=param.shape, average=average.shape)
    _launch(_ema_step, param.size, param, average, param, 1 - decay)


def swap(x, y):
    shapes.check_same(x=x.shape, y=y.shape)
    _launch(_swap, x.size, x, x, y)
