"""Losses of numbers against numbers: regression, autoencoders, yes-or-no answers."""

from __future__ import annotations

import math
import numbers

import numpy as np

from ..errors import ShapeError
from ..ops import for_device
from ..tensor import Tensor
from .loss import Constant, Loss, checked_reduction

_FLOAT32 = np.dtype("float32")


class ElementLoss(Loss):
    """A loss of each element of a prediction against that of a target.

    ``loss(prediction, target)`` with

    - prediction : float32 Tensor or array_like of floats, of any shape;
    - target : float32 Tensor on the same device, or numbers on the host, of the same
      shape: nothing is broadcast.

    Returns a float32 Tensor of shape () on the device. The mean of nothing is NaN.
    A :class:`~cycnn.Trainer` takes such targets from a
    :class:`~cycnn.data.TargetDataset`.

    Parameters
    ----------
    reduction : {"mean", "sum"}
        Mean over all elements, not only over the batch.

    Raises
    ------
    ShapeError, TypeError
        If the target has another shape, or is no float32 tensor of the same device.
    """

    def __init__(self, reduction="mean"):
        self.reduction = checked_reduction(reduction)

    @property
    def _mean(self):
        return self.reduction == "mean"

    def _operands(self, prediction, target):
        prediction = self._prediction(prediction, target)
        if not isinstance(target, Tensor):
            array = np.asarray(target)
            if array.dtype.kind not in "fiub":
                raise TypeError(
                    f"{self!r}: the target holds {array.dtype}, expected numbers"
                )
            target = Tensor(array.astype(_FLOAT32), prediction.device)
        elif target.dtype != _FLOAT32:
            raise TypeError(
                f"{self!r}: the target is {target.dtype}, expected float32"
                + (
                    "; class indices are for CrossEntropyLoss and NLLLoss"
                    if target.dtype == "int32"
                    else ""
                )
            )
        elif target.device != prediction.device:
            raise TypeError(
                f"{self!r}: the target is on {target.device}, the prediction on "
                f"{prediction.device}: use target.to('{prediction.device}')"
            )
        if target.shape != prediction.shape:
            raise ShapeError(
                f"{self!r}: the prediction has shape {prediction.shape}, the target "
                f"{target.shape}: reshape one of them, nothing is broadcast"
            )
        return prediction, target

    def forward(self, prediction, target):
        prediction, target = self._operands(prediction, target)
        value = self._value(for_device(prediction.device), prediction, target)
        self._saved = prediction, target
        return value

    def backward(self):
        """The gradient by the prediction; see the class for its formula."""
        prediction, target = self._remembered()
        return self._gradient(for_device(prediction.device), prediction, target)

    def _value(self, ops, prediction, target):
        raise NotImplementedError

    def _gradient(self, ops, prediction, target):
        raise NotImplementedError


class MSELoss(ElementLoss):
    """Mean squared error.

    ``loss(prediction, target)`` of two tensors of one shape, see
    :class:`~cycnn.nn.loss_regression.ElementLoss`.

    Parameters
    ----------
    reduction : {"mean", "sum"}

    Notes
    -----
    Formula: L = (1 / n) sum of (x - t)^2 over all n elements; gradient 2 (x - t) / n.
    """

    def _value(self, ops, prediction, target):
        return ops.mse_loss_forward(prediction, target, self._mean)

    def _gradient(self, ops, prediction, target):
        return ops.mse_loss_backward(prediction, target, self._mean)


class SmoothL1Loss(ElementLoss):
    """A parabola near zero, straight lines beyond: outliers do not pull harder.

    ``loss(prediction, target)`` of two tensors of one shape, see
    :class:`~cycnn.nn.loss_regression.ElementLoss`.

    Parameters
    ----------
    reduction : {"mean", "sum"}
    beta : float
        Where the parabola ends; 0 is :class:`L1Loss`.

    Notes
    -----
    Formula, with d = x - t: L is the mean of d^2 / (2 beta) where |d| < beta, and of
    |d| - beta / 2 elsewhere. Gradient: d / beta there, else the sign of d; over n.
    """

    def __init__(self, reduction="mean", beta=1.0):
        super().__init__(reduction)
        if isinstance(beta, bool) or not isinstance(beta, numbers.Real):
            raise TypeError(f"beta must be a number, got {beta!r}")
        if not 0 <= beta < math.inf:
            raise ValueError(f"beta must be finite and not negative, got {beta}")
        self.beta = float(beta)

    def _options(self):
        options = super()._options()
        if self.beta != 1:
            options["beta"] = self.beta
        return options

    def _value(self, ops, prediction, target):
        return ops.smooth_l1_loss_forward(prediction, target, self.beta, self._mean)

    def _gradient(self, ops, prediction, target):
        return ops.smooth_l1_loss_backward(prediction, target, self.beta, self._mean)


class L1Loss(ElementLoss):
    """Mean absolute error.

    ``loss(prediction, target)`` of two tensors of one shape, see
    :class:`~cycnn.nn.loss_regression.ElementLoss`.

    Parameters
    ----------
    reduction : {"mean", "sum"}

    Notes
    -----
    Formula: L = (1 / n) sum of |x - t|; gradient sign(x - t) / n, where the sign of 0
    is 0.
    """

    def _value(self, ops, prediction, target):
        return ops.smooth_l1_loss_forward(prediction, target, 0.0, self._mean)

    def _gradient(self, ops, prediction, target):
        return ops.smooth_l1_loss_backward(prediction, target, 0.0, self._mean)


class BCEWithLogitsLoss(ElementLoss):
    """Binary cross-entropy of logits: Sigmoid and the loss in one, safe for any size.

    ``loss(logits, target)`` of two tensors of one shape, see
    :class:`~cycnn.nn.loss_regression.ElementLoss`; targets are probabilities, from 0
    (no) to 1 (yes).

    Parameters
    ----------
    reduction : {"mean", "sum"}
    pos_weight : float or array_like, optional
        How much a yes counts against a no; an array must fit the last axes of the
        logits, as in NumPy's broadcasting.

    Notes
    -----
    Formula, with p = 1 / (1 + exp(-x)) and w = pos_weight: L is the mean of
    -(w t log(p) + (1 - t) log(1 - p)). Gradient: (1 - t) - (1 + (w - 1) t) (1 - p),
    which is p - t for w = 1; over n.
    """

    def __init__(self, reduction="mean", pos_weight=None):
        super().__init__(reduction)
        if pos_weight is not None:
            pos_weight = Constant("pos_weight", pos_weight)
        self._pos_weight = pos_weight

    @property
    def pos_weight(self):
        """The weights of positive targets, a float32 array, or None."""
        return None if self._pos_weight is None else self._pos_weight.array.copy()

    def _options(self):
        options = super()._options()
        if self._pos_weight is not None:
            options["pos_weight"] = self._pos_weight.array.tolist()
        return options

    def _weight_for(self, logits):
        """pos_weight, repeated to the shape of one row of logits: (period,)."""
        constant = self._pos_weight
        if constant is None:
            return None
        array = constant.array
        if array.size == 1:
            return constant.on(logits.device).reshape(1)
        row = logits.shape[1:]
        try:
            fits = np.broadcast_shapes(array.shape, row) == row
        except ValueError:
            fits = False
        if not fits:
            raise ShapeError(
                f"BCEWithLogitsLoss: pos_weight has shape {array.shape}, which does "
                f"not fit a row of logits, {row} (the logits are {logits.shape})"
            )
        return constant.on(logits.device, row).reshape(-1)

    def _value(self, ops, logits, target):
        return ops.bce_with_logits_forward(
            logits, target, self._weight_for(logits), self._mean
        )

    def _gradient(self, ops, logits, target):
        return ops.bce_with_logits_backward(
            logits, target, self._weight_for(logits), self._mean
        )
