"""Images with numbers to predict, in host memory."""

from __future__ import annotations

import numpy as np

from ..errors import DataError
from .dataset import (
    ArrayDataset,
    _as_images,
    _as_scales,
    _refuse_non_finite,
    _text,
)


class TargetDataset(ArrayDataset):
    """Images and what a model shall make of each: numbers, not a class.

    A loader yields (images, targets), and a :class:`~cycnn.Trainer` trains on them with
    a loss such as :class:`~cycnn.nn.MSELoss`; there is no accuracy then.

    Parameters
    ----------
    images : array_like
        As of :class:`ArrayDataset`.
    targets : array_like, shape (M, ...), optional
        Real numbers, kept as float32 (shared, not copied, where they are float32 and
        C-contiguous). ``targets[i]`` has the shape of the model's output for one image.
        None: the images themselves, scaled and shifted, as an autoencoder has it.
    scale, shift : float or sequence of C floats
        A loader yields ``images * scale + shift``; targets are not changed.

    Attributes
    ----------
    images : numpy.ndarray, uint8 or float32
    targets : numpy.ndarray of float32, or None
    scale, shift : float, or both tuples of C floats

    Raises
    ------
    DataError
        If there are not as many targets as images, or a number is NaN or infinite.
    TypeError
        If images or targets are not real numbers.
    """

    has_classes = False

    def __init__(self, images, targets=None, scale=1.0, shift=0.0):
        images = _as_images(images)
        if targets is None:
            targets = np.empty((len(images), 0), np.float32)
            self.own_images = True
        else:
            targets = _as_targets(targets)
            self.own_images = False
        if len(images) != len(targets):
            raise DataError(
                f"{len(images)} images but targets of shape {targets.shape}: expected "
                f"(M, ...), one target for each image"
            )
        scale, shift = _as_scales(scale, shift, images.shape[1])
        self._set(images, targets, scale, shift, 0)

    @property
    def targets(self):
        return None if self.own_images else self.labels

    def __getitem__(self, key) -> TargetDataset:
        made = super().__getitem__(key)
        made.own_images = self.own_images
        return made

    def __repr__(self):
        targets = "themselves" if self.own_images else f"shape {self.labels.shape[1:]}"
        return (
            f"TargetDataset({len(self)} images of shape {self.image_shape}, "
            f"{self.images.dtype}, targets: {targets}, "
            f"scale={_text(self.scale)}, shift={_text(self.shift)})"
        )


def _as_targets(targets) -> np.ndarray:
    targets = np.asarray(targets)
    if targets.dtype.kind not in "fiub":
        raise TypeError(f"targets of dtype {targets.dtype}: expected real numbers")
    if not targets.ndim:
        raise DataError("targets is a single number: expected shape (M, ...)")
    with np.errstate(over="ignore"):
        # aligned too, else np.take would copy all of them for every batch
        targets = np.require(targets, np.float32, ("C", "A"))
    _refuse_non_finite(targets, "target")
    return targets
