"""The losses beyond the plain ones on tensors in host memory; see :mod:`.cpu`.

Terms are float32, sums float64, both by NumPy: a loss is a small part of a step.
"""

from __future__ import annotations

import numpy as np

from .. import shapes
from ..tensor import from_array
from . import cpu, reference, reference_loss
from .cpu_common import _FLOAT32, _INT32, _array


def _operands(x, target):
    x, target = _array("x", x), _array("target", target)
    shapes.check_same(x=x.shape, target=target.shape)
    return x, target


def _reduced(terms, mean):
    total = terms.sum(dtype=np.float64)
    if mean:
        total = total / terms.size if terms.size else np.nan
    return _number(total)


def _number(value):
    return from_array(np.array(value, _FLOAT32))


def _scaled(slopes, mean):
    if mean and slopes.size:
        slopes /= _FLOAT32.type(slopes.size)
    return from_array(slopes)


def mse_loss_forward(x, target, mean):
    """loss () = the mean or the sum of (x - target)^2."""
    x, target = _operands(x, target)
    return _reduced(np.square(x - target), mean)


def mse_loss_backward(x, target, mean):
    """dx = 2 (x - target), over the number of elements for the mean."""
    x, target = _operands(x, target)
    return _scaled(np.asarray(2 * (x - target)), mean)


def smooth_l1_loss_forward(x, target, beta, mean):
    """loss () of d^2 / (2 beta) where |d| < beta, else |d| - beta / 2."""
    x, target = _operands(x, target)
    d = np.abs(x - target)
    beta = _FLOAT32.type(beta)
    # with beta 0 no d is below it: what it is divided by there does not matter
    inner = d * d * np.float32(0.5) / (beta or np.float32(1))
    return _reduced(np.where(d < beta, inner, d - np.float32(0.5) * beta), mean)


def smooth_l1_loss_backward(x, target, beta, mean):
    """dx = d / beta where |d| < beta, else the sign of d."""
    x, target = _operands(x, target)
    d = x - target
    beta = _FLOAT32.type(beta)
    inner = d / (beta or np.float32(1))
    return _scaled(np.where(np.abs(d) < beta, inner, np.sign(d)), mean)


def _factor(target, pos_weight):
    if pos_weight is None:
        return np.float32(1)
    pos_weight = _array("pos_weight", pos_weight)
    reference_loss.check_pos_weight(target.shape, pos_weight.shape)
    rows = target.reshape(-1, len(pos_weight))
    return (1 + (pos_weight - 1) * rows).reshape(target.shape)


def bce_with_logits_forward(x, target, pos_weight, mean):
    """loss () of (1 - t) x - (1 + (w - 1) t) log p."""
    x, target = _operands(x, target)
    cost = np.maximum(-x, 0) + np.log1p(np.exp(-np.abs(x)))
    return _reduced((1 - target) * x + _factor(target, pos_weight) * cost, mean)


def bce_with_logits_backward(x, target, pos_weight, mean):
    """dx = (1 - t) - (1 + (w - 1) t) (1 - p)."""
    x, target = _operands(x, target)
    e = np.exp(-np.abs(x))
    rest = np.where(x >= 0, e, np.float32(1)) / (1 + e)
    slopes = (1 - target) - _factor(target, pos_weight) * rest
    return _scaled(np.asarray(slopes), mean)


def _targets(log_probs, labels, weight, smoothing, ignore_index):
    """Arrays: log_probs, the rows that count and their labels, weight (F,)."""
    log_probs = _array("log_probs", log_probs)
    labels = _array("labels", labels, _INT32)
    _, f = shapes.check_labels("log_probs", log_probs.shape, labels.shape)
    rows = np.arange(len(labels))
    if ignore_index is not None:
        rows = np.flatnonzero(labels != ignore_index)
    reference.check_label_range(labels[rows], f)
    if weight is None:
        weight = np.ones(f, _FLOAT32)
    else:
        weight = _array("weight", weight)
        shapes.check_same(weight=weight.shape, classes=(f,))
    return log_probs, rows, labels[rows], weight


def weighted_nll_loss_forward(log_probs, labels, weight, smoothing, ignore_index, mean):
    """(loss (), total ()): of classes with weights and smoothed labels."""
    log_probs, rows, labels, weight = _targets(
        log_probs, labels, weight, smoothing, ignore_index
    )
    of_row = weight[labels]
    terms = (1 - smoothing) * of_row * -log_probs[rows, labels]
    value = terms.sum(dtype=np.float64)
    if smoothing:
        smooth = (weight * -log_probs[rows]).sum(dtype=np.float64)
        value += smoothing / len(weight) * smooth
    total = of_row.sum(dtype=np.float64) if mean else np.float64(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return _number(value / total), _number(total)


def _row_targets(shape, rows, labels, weight, smoothing):
    """q (rows, F)"""
    q = np.empty((len(rows), shape[1]), _FLOAT32)
    q[...] = np.float32(smoothing / shape[1]) * weight
    q[np.arange(len(rows)), labels] += np.float32(1 - smoothing) * weight[labels]
    return q


def weighted_nll_loss_backward(
    log_probs, labels, weight, smoothing, ignore_index, total
):
    """dlog_probs = -q / total, and 0 in rows that do not count."""
    log_probs, rows, labels, weight = _targets(
        log_probs, labels, weight, smoothing, ignore_index
    )
    dlog_probs = np.zeros_like(log_probs)
    q = _row_targets(log_probs.shape, rows, labels, weight, smoothing)
    with np.errstate(invalid="ignore", divide="ignore"):
        dlog_probs[rows] = -q / _array("total", total)
    return from_array(dlog_probs)


def weighted_cross_entropy_forward(
    logits, labels, weight, smoothing, ignore_index, mean
):
    """(loss (), total (), log_probs (N, F))."""
    shapes.check_labels("logits", logits.shape, labels.shape)
    log_probs = cpu.log_softmax_forward(logits)
    loss, total = weighted_nll_loss_forward(
        log_probs, labels, weight, smoothing, ignore_index, mean
    )
    return loss, total, log_probs


def weighted_cross_entropy_backward(
    log_probs, labels, weight, smoothing, ignore_index, total
):
    """dlogits = (softmax Q - q) / total, and 0 in rows that do not count."""
    log_probs, rows, labels, weight = _targets(
        log_probs, labels, weight, smoothing, ignore_index
    )
    dlogits = np.zeros_like(log_probs)
    q = _row_targets(log_probs.shape, rows, labels, weight, smoothing)
    made = np.exp(log_probs[rows]) * q.sum(axis=1, keepdims=True) - q
    with np.errstate(invalid="ignore", divide="ignore"):
        dlogits[rows] = made / _array("total", total)
    return from_array(dlogits)
