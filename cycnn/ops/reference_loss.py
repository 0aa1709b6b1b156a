"""The specification of the losses beyond the plain ones; see :mod:`.reference`."""

from __future__ import annotations

import numpy as np

from .. import shapes
from . import reference
from .reference_common import _f64


def _operands(x, target):
    shapes.check_same(x=x.shape, target=target.shape)
    return _f64(x), _f64(target)


def _reduced(terms, mean):
    if not mean:
        return np.array(terms.sum())
    return np.array(terms.sum() / terms.size if terms.size else np.nan)


def _scaled(slopes, mean):
    return slopes / max(slopes.size, 1) if mean else slopes


def mse_loss_forward(x, target, mean):
    """loss = the mean, or the sum, of (x - target)^2; the mean of nothing is NaN.

    Parameters
    ----------
    x, target : same shape
    mean : bool

    Returns
    -------
    loss : ()
    """
    x, target = _operands(x, target)
    return _reduced((x - target) ** 2, mean)


def mse_loss_backward(x, target, mean):
    """dx = 2 (x - target), over the number of elements for the mean."""
    x, target = _operands(x, target)
    return _scaled(2 * (x - target), mean)


def smooth_l1_loss_forward(x, target, beta, mean):
    """The mean, or the sum, of d^2 / (2 beta) where |d| < beta, else |d| - beta / 2.

    d = x - target. Value and slope of the two pieces agree at |d| = beta; beta = 0
    leaves |d|.
    """
    x, target = _operands(x, target)
    d = np.abs(x - target)
    inner = d < beta
    return _reduced(
        np.where(inner, d * d / (2 * beta if beta else 1), d - beta / 2), mean
    )


def smooth_l1_loss_backward(x, target, beta, mean):
    """dx = d / beta where |d| < beta, else the sign of d, which is 0 for d = 0."""
    x, target = _operands(x, target)
    d = x - target
    inner = np.abs(d) < beta
    return _scaled(np.where(inner, d / (beta or 1), np.sign(d)), mean)


def bce_with_logits_forward(x, target, pos_weight, mean):
    """The mean, or the sum, of -(w t log p + (1 - t) log(1 - p)), p = 1 / (1 + e^-x).

    With log(1 - p) = log p - x and c = 1 + (w - 1) t a term is (1 - t) x - c log p,
    where -log p = log(1 + e^-x) = max(-x, 0) + log(1 + e^-|x|) cannot overflow.

    Parameters
    ----------
    x, target : same shape
    pos_weight : (period,) or None
        w of element i is ``pos_weight[i % period]``, else 1.
    mean : bool
    """
    x, target = _operands(x, target)
    cost = np.maximum(-x, 0) + np.log1p(np.exp(-np.abs(x)))
    return _reduced((1 - target) * x + _factor(target, pos_weight) * cost, mean)


def bce_with_logits_backward(x, target, pos_weight, mean):
    """dx = (1 - t) - c (1 - p), since d(log(1 + e^-x))/dx = -e^-x / (1 + e^-x)."""
    x, target = _operands(x, target)
    e = np.exp(-np.abs(x))
    rest = np.where(x >= 0, e, 1) / (1 + e)
    return _scaled((1 - target) - _factor(target, pos_weight) * rest, mean)


def _factor(target, pos_weight):
    if pos_weight is None:
        return np.ones(target.shape)
    check_pos_weight(target.shape, pos_weight.shape)
    repeats = target.size // pos_weight.size
    w = np.tile(_f64(pos_weight), repeats).reshape(target.shape)
    return 1 + (w - 1) * target


def check_pos_weight(x_shape, shape) -> None:
    """Weights (period,) repeat a whole number of times over the elements of x."""
    shapes.check_period("pos_weight", shape, x_shape)


def weighted_nll_loss_forward(log_probs, labels, weight, smoothing, ignore_index, mean):
    """loss = -1/D sum_n sum_f q_f log_probs[n, f] over the rows that count.

    q_f = (1 - smoothing) weight[y] [f = y] + smoothing weight[f] / F with y the label
    of the row. D is the sum of weight[y] over the rows for the mean, else 1. A row
    whose label is ``ignore_index`` does not count; if none does, it is 0 / 0, NaN.

    Parameters
    ----------
    log_probs : (N, F)
    labels : (N,) int32
    weight : (F,) or None
        None is 1 for all.
    smoothing : float
    ignore_index : int or None
    mean : bool

    Returns
    -------
    loss : ()
    total : ()
        D, for the backward.

    Raises
    ------
    DataError
        If a label is neither in 0 .. F - 1 nor ``ignore_index``.
    """
    q, of_row = _targets(log_probs, labels, weight, smoothing, ignore_index)
    total = of_row.sum() if mean else 1.0
    value = -np.sum(q * np.where(q == 0, 0, _f64(log_probs)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.array(np.divide(value, total)), np.array(total)


def weighted_nll_loss_backward(
    log_probs, labels, weight, smoothing, ignore_index, total
):
    """dlog_probs = -q / D, and 0 in rows that do not count: the loss is linear."""
    q, _ = _targets(log_probs, labels, weight, smoothing, ignore_index)
    counts = _counts(labels, ignore_index)
    dlog_probs = np.zeros(q.shape)
    with np.errstate(invalid="ignore", divide="ignore"):
        dlog_probs[counts] = -q[counts] / total
    return dlog_probs


def weighted_cross_entropy_forward(
    logits, labels, weight, smoothing, ignore_index, mean
):
    """(loss, total, log_probs): the log-softmax, and the loss of that."""
    shapes.check_labels("logits", logits.shape, labels.shape)
    log_probs = reference.log_softmax_forward(logits)
    loss, total = weighted_nll_loss_forward(
        log_probs, labels, weight, smoothing, ignore_index, mean
    )
    return loss, total, log_probs


def weighted_cross_entropy_backward(
    log_probs, labels, weight, smoothing, ignore_index, total
):
    """dlogits = (softmax Q - q) / D with Q = sum_f q_f; 0 in rows that do not count.

    Put dy = -q / D into the backward of log-softmax, dx = dy - softmax sum_f dy.
    """
    dy = weighted_nll_loss_backward(
        log_probs, labels, weight, smoothing, ignore_index, total
    )
    return reference.log_softmax_backward(dy, log_probs)


def _counts(labels, ignore_index):
    if ignore_index is None:
        return np.ones(labels.shape, bool)
    return labels != ignore_index


def _targets(log_probs, labels, weight, smoothing, ignore_index):
    """q (N, F) and weight[y] (N,), both 0 in rows that do not count."""
    n, f = shapes.check_labels("log_probs", log_probs.shape, labels.shape)
    counts = _counts(labels, ignore_index)
    reference.check_label_range(np.where(counts, labels, 0), f)
    if weight is None:
        weight = np.ones(f)
    shapes.check_same(weight=weight.shape, classes=(f,))
    weight = _f64(weight)
    rows = np.flatnonzero(counts)
    q = np.zeros((n, f))
    q[rows] = smoothing * weight / f
    q[rows, labels[rows]] += (1 - smoothing) * weight[labels[rows]]
    of_row = np.zeros(n)
    of_row[rows] = weight[labels[rows]]
    return q, of_row
