"""Losses: one number that says how wrong a batch is, and where the gradients begin."""

from __future__ import annotations

import numbers
import operator

import numpy as np

from ..errors import DataError, ShapeError
from ..ops import for_device
from ..tensor import Tensor
from .layer import as_input

_INT32 = np.dtype("int32")


class Loss:
    """What the losses share: one backward for each forward, and a reduction.

    ``value = loss(scores, labels)``, then ``loss.backward()``.
    """

    _saved = None
    reduction = "mean"

    def __call__(self, scores, labels):
        return self.forward(scores, labels)

    @property
    def device(self):
        """Where arrays are converted to when neither argument is a tensor."""
        from ..devices import default_device

        return default_device()

    def _prediction(self, x, target):
        """``x`` as a float32 tensor; from the host it goes to that of the target."""
        if isinstance(x, Tensor) or not isinstance(target, Tensor):
            return as_input(self, x)
        return as_input(self, x, target.device)

    def _remembered(self):
        saved = self._saved
        if saved is None:
            raise RuntimeError(
                f"{self!r}: backward without a forward before it. Each backward uses "
                f"up one call of the loss"
            )
        self._saved = None
        return saved

    def _options(self) -> dict:
        """Arguments of the constructor that are not at their defaults."""
        return {} if self.reduction == "mean" else {"reduction": self.reduction}

    def __repr__(self):
        options = ", ".join(f"{k}={v!r}" for k, v in self._options().items())
        return f"{type(self).__name__}({options})"


class Constant:
    """Numbers that a loss was given, put on a device when they are first needed there.

    Parameters
    ----------
    name : str
        For messages.
    values : array_like
        Finite numbers, not negative; float32 is made of them.
    """

    def __init__(self, name, values):
        array = np.asarray(values)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name} holds {array.dtype}: expected numbers")
        array = np.array(array, np.float32)
        if not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(f"{name} must be finite and not negative, got {values!r}")
        self.name, self.array = name, array
        self._placed = {}

    def on(self, device, shape=None) -> Tensor:
        """The numbers on ``device``, repeated to ``shape`` if that is given."""
        key = device, shape
        found = self._placed.get(key)
        if found is None:
            array = self.array
            if shape is not None:
                array = np.broadcast_to(array, shape)
            found = self._placed[key] = Tensor(np.ascontiguousarray(array), device)
        return found

    def __reduce__(self):
        return Constant, (self.name, self.array)


def checked_reduction(reduction) -> str:
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
    return reduction


class ClassLoss(Loss):
    """A loss of scores (N, F) against class indices (N,).

    Parameters
    ----------
    weight : array_like of float, shape (F,), optional
        How much each class counts; not negative.
    ignore_index : int, optional
        Rows with this label do not count.
    reduction : {"mean", "sum"}
    """

    smoothing = 0.0

    def __init__(self, weight=None, ignore_index=None, reduction="mean"):
        if weight is not None:
            weight = Constant("weight", weight)
            if weight.array.ndim != 1:
                raise ShapeError(
                    f"weight has shape {weight.array.shape}, expected (F,): a number "
                    f"for each class"
                )
        if ignore_index is not None:
            ignore_index = operator.index(ignore_index)
            if not -(2**31) <= ignore_index < 2**31:
                raise ValueError(
                    f"ignore_index is {ignore_index}: labels are int32, which cannot "
                    f"be that"
                )
        self._weight = weight
        self.ignore_index = ignore_index
        self.reduction = checked_reduction(reduction)

    @property
    def weight(self):
        """The weights of the classes, a float32 array, or None."""
        return None if self._weight is None else self._weight.array.copy()

    @property
    def is_plain(self) -> bool:
        """Whether all options are at their defaults, as fused kernels have it."""
        return not self._options()

    def _options(self):
        options = {}
        if self._weight is not None:
            options["weight"] = self._weight.array.tolist()
        if self.ignore_index is not None:
            options["ignore_index"] = self.ignore_index
        return options | super()._options()

    def _arguments(self, scores):
        """What the operations are told: weight, smoothing, ignore_index."""
        weight = self._weight
        if weight is not None:
            if len(weight.array) != scores.shape[1]:
                raise ShapeError(
                    f"{type(self).__name__}: weight has {len(weight.array)} numbers, "
                    f"but there are {scores.shape[1]} scores a row: it needs one for "
                    f"each class"
                )
            weight = weight.on(scores.device)
        return weight, self.smoothing, self.ignore_index

    def _operands(self, scores, labels):
        scores = self._prediction(scores, labels)
        if not isinstance(labels, Tensor):
            labels = self._checked_labels(labels, scores)
        elif labels.ndim == 2:
            raise self._one_hot(labels.shape)
        elif labels.dtype != _INT32:
            raise TypeError(
                f"{self!r}: labels are {labels.dtype}, expected int32 class indices"
            )
        elif labels.device != scores.device:
            raise TypeError(
                f"{self!r}: labels are on {labels.device}, scores on {scores.device}: "
                f"use labels.to('{scores.device}')"
            )
        if scores.ndim != 2 or labels.shape != scores.shape[:1]:
            raise ShapeError(
                f"{self!r}: scores of shape {scores.shape} and labels of shape "
                f"{labels.shape}, expected (N, classes) and (N,)"
            )
        return scores, labels

    def _checked_labels(self, labels, scores) -> Tensor:
        """Labels from the host, where looking at them costs nothing."""
        array = np.asarray(labels)
        if array.ndim == 2:
            raise self._one_hot(array.shape)
        if array.size == 0:
            array = array.astype(_INT32)
        if array.dtype.kind not in "iu":
            raise TypeError(
                f"{self!r}: labels are {array.dtype}, expected integer class indices"
            )
        if scores.ndim == 2:
            classes = scores.shape[1]
            wrong = (array < 0) | (array >= classes)
            if self.ignore_index is not None:
                wrong &= array != self.ignore_index
            wrong = np.flatnonzero(wrong)
            if wrong.size:
                raise DataError(
                    f"{self!r}: label {wrong[0]} is {array.flat[wrong[0]]}, expected "
                    f"0 to {classes - 1}, since there are {classes} scores a row "
                    f"({wrong.size} of {array.size} labels are out of range)"
                )
        return Tensor(array.astype(_INT32), scores.device)

    def _one_hot(self, shape):
        return ShapeError(
            f"{self!r}: labels have shape {shape}, expected (N,): they are class "
            f"indices, not one-hot rows; labels.argmax(axis=1) converts those"
        )


class NLLLoss(ClassLoss):
    """Mean negative log-likelihood of the right classes.

    Use behind LogSoftmax. ``loss(log_probs, labels)`` with

    - log_probs : Tensor or array_like, float32 (N, F);
    - labels : int32 Tensor on the same device, or integers on the host, (N,), each
      from 0 to F - 1, or ``ignore_index``.

    Parameters
    ----------
    weight : array_like of float, shape (F,), optional
        How much each class counts, for instance the less the more images it has.
    ignore_index : int, optional
        Rows with this label do not count: no part of the value, gradient 0. Nor do
        they in the accuracy of a :class:`~cycnn.Trainer`, unless it is one of the
        classes: the accuracy is then that over all images. A data set may have labels
        below 0 or above its classes if it is told so, too: ``ArrayDataset(...,
        ignore_index=-100)``. (PyTorch's default is -100; here every label counts unless
        asked otherwise.)
    reduction : {"mean", "sum"}
        With weights the mean is the weighted one: divided by the sum of the weights of
        the labels. If no row counts it is NaN, and all gradients are 0.

    Returns a float32 Tensor of shape () on the device; nothing waits for it until it
    is read with ``float(value)``. The mean over an empty batch is NaN.

    Raises
    ------
    DataError
        If a label is out of range: from the host always, in a tensor on the CPU too. On
        a GPU the value becomes NaN, because asking would mean waiting.
    ShapeError, TypeError
        If labels are one-hot, of another length, or not int32.

    Notes
    -----
    Formula: L = -(1 / N) sum over n of log_probs[n, labels[n]]; with weights
    L = -(1 / D) sum over n of weight[labels[n]] log_probs[n, labels[n]], where D is the
    sum of weight[labels[n]].
    """

    def forward(self, log_probs, labels):
        log_probs, labels = self._operands(log_probs, labels)
        ops = for_device(log_probs.device)
        if self.is_plain:
            self._saved = log_probs, labels, None
            return ops.nll_loss_forward(log_probs, labels)
        value, total = ops.weighted_nll_loss_forward(
            log_probs, labels, *self._arguments(log_probs), self.reduction == "mean"
        )
        self._saved = log_probs, labels, total
        return value

    def backward(self):
        """The gradient by log_probs: -1 / N at [n, labels[n]], 0 elsewhere.

        L is linear in log_probs, and these are its coefficients; with weights they are
        -weight[labels[n]] / D.
        """
        log_probs, labels, total = self._remembered()
        ops = for_device(log_probs.device)
        if total is None:
            return ops.nll_loss_backward(log_probs, labels)
        return ops.weighted_nll_loss_backward(
            log_probs, labels, *self._arguments(log_probs), total
        )


class CrossEntropyLoss(ClassLoss):
    """LogSoftmax and NLLLoss in one, for models that end in plain scores (logits).

    ``loss(logits, labels)``: arguments, value and errors as of :class:`NLLLoss`.

    Parameters
    ----------
    weight, ignore_index, reduction
        As of :class:`NLLLoss`.
    label_smoothing : float
        From 0 to 1: the share of each target that is spread evenly over all classes,
        which keeps a model from becoming too sure of itself. (For a model that ends in
        LogSoftmax, too: the log-softmax of log-probabilities is these themselves.)

    Notes
    -----
    Formula: L = -(1 / N) sum over n of log_softmax(logits[n])[labels[n]]. In general,
    with w the weights, s the smoothing and y = labels[n], the target of row n is
    q[f] = (1 - s) w[y] [f = y] + s w[f] / F, and (as in PyTorch)
    L = -(1 / D) sum over n, f of q[f] log_softmax(logits[n])[f], D being the sum over n
    of w[y].
    """

    def __init__(
        self, weight=None, ignore_index=None, reduction="mean", label_smoothing=0.0
    ):
        super().__init__(weight, ignore_index, reduction)
        if isinstance(label_smoothing, bool) or not (
            isinstance(label_smoothing, numbers.Real) and 0 <= label_smoothing <= 1
        ):
            raise ValueError(
                f"label_smoothing must be a number from 0 to 1, got {label_smoothing!r}"
            )
        self.smoothing = float(label_smoothing)

    @property
    def label_smoothing(self) -> float:
        return self.smoothing

    def _options(self):
        options = super()._options()
        if self.smoothing:
            options["label_smoothing"] = self.smoothing
        return options

    def forward(self, logits, labels):
        logits, labels = self._operands(logits, labels)
        ops = for_device(logits.device)
        if self.is_plain:
            value, log_probs = ops.cross_entropy_forward(logits, labels)
            total = None
        else:
            value, total, log_probs = ops.weighted_cross_entropy_forward(
                logits, labels, *self._arguments(logits), self.reduction == "mean"
            )
        self._saved = log_probs, labels, total
        return value

    def backward(self):
        """The gradient by the logits: (softmax(logits) - onehot(labels)) / N.

        Into dx = dy - softmax sum(dy), the backward of LogSoftmax, put the dy of
        NLLLoss, whose rows are -1 / N at the label and sum to -1 / N. In general, with
        Q = sum over f of q[f], the rows are -q / D and sum to -Q / D, hence
        (softmax(logits) Q - q) / D.
        """
        log_probs, labels, total = self._remembered()
        ops = for_device(log_probs.device)
        if total is None:
            return ops.cross_entropy_backward(log_probs, labels)
        return ops.weighted_cross_entropy_backward(
            log_probs, labels, *self._arguments(log_probs), total
        )
