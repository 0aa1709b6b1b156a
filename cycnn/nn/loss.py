"""Losses: one number that says how wrong a batch is, and where the gradients begin."""

from __future__ import annotations

import numpy as np

from ..errors import DataError, ShapeError
from ..ops import for_device
from ..tensor import Tensor
from .layer import as_input

_INT32 = np.dtype("int32")


class Loss:
    """What the losses share: the labels, and one backward for each forward.

    ``value = loss(scores, labels)``, then ``loss.backward()``.
    """

    _saved = None

    def __call__(self, scores, labels):
        return self.forward(scores, labels)

    @property
    def device(self):
        """Where arrays are converted to when neither argument is a tensor."""
        from ..devices import default_device

        return default_device()

    def _operands(self, scores, labels):
        if not isinstance(scores, Tensor):
            device = labels.device if isinstance(labels, Tensor) else None
            scores = as_input(self, scores, device)
        else:
            as_input(self, scores)
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
            wrong = np.flatnonzero((array < 0) | (array >= classes))
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

    def _remembered(self):
        saved = self._saved
        if saved is None:
            raise RuntimeError(
                f"{self!r}: backward without a forward before it. Each backward uses "
                f"up one call of the loss"
            )
        self._saved = None
        return saved

    def __repr__(self):
        return f"{type(self).__name__}()"


class NLLLoss(Loss):
    """Mean negative log-likelihood of the right classes.

    Use behind LogSoftmax. ``loss(log_probs, labels)`` with

    - log_probs : Tensor or array_like, float32 (N, F);
    - labels : int32 Tensor on the same device, or integers on the host, (N,), each
      from 0 to F - 1.

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
    Formula: L = -(1 / N) sum over n of log_probs[n, labels[n]].
    """

    def forward(self, log_probs, labels):
        log_probs, labels = self._operands(log_probs, labels)
        value = for_device(log_probs.device).nll_loss_forward(log_probs, labels)
        self._saved = (log_probs, labels)
        return value

    def backward(self):
        """The gradient by log_probs: -1 / N at [n, labels[n]], 0 elsewhere.

        L is linear in log_probs, and these are its coefficients.
        """
        log_probs, labels = self._remembered()
        return for_device(log_probs.device).nll_loss_backward(log_probs, labels)


class CrossEntropyLoss(Loss):
    """LogSoftmax and NLLLoss in one, for models that end in plain scores (logits).

    ``loss(logits, labels)``: arguments, value and errors as of :class:`NLLLoss`.

    Notes
    -----
    Formula: L = -(1 / N) sum over n of log_softmax(logits[n])[labels[n]].
    """

    def forward(self, logits, labels):
        logits, labels = self._operands(logits, labels)
        value, log_probs = for_device(logits.device).cross_entropy_forward(
            logits, labels
        )
        self._saved = (log_probs, labels)
        return value

    def backward(self):
        """The gradient by the logits: (softmax(logits) - onehot(labels)) / N.

        Into dx = dy - softmax sum(dy), the backward of LogSoftmax, put the dy of
        NLLLoss, whose rows are -1 / N at the label and sum to -1 / N.
        """
        log_probs, labels = self._remembered()
        return for_device(log_probs.device).cross_entropy_backward(log_probs, labels)
