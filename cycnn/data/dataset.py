"""Images with labels, in host memory."""

from __future__ import annotations

import math
import operator

import numpy as np

from ..errors import DataError

_CHUNK = 1 << 22  # elements looked at in one go when searching for NaN


class ArrayDataset:
    """Images and their labels, checked once.

    Parameters
    ----------
    images : array_like, shape (M, C, H, W), (M, H, W) or (M, F)
        uint8 and float32 are kept as they are (and shared, not copied, where they are
        C-contiguous: do not change them afterwards). Other floats become float32;
        other integers uint8 where they all fit, else float32. Images of shape
        (M, H, W) have one channel and become (M, 1, H, W); (M, F) are plain vectors.
        A memory-mapped array that is kept stays mapped.
    labels : array_like of int, shape (M,)
        Class indices, never one-hot.
    scale, shift : float or sequence of C floats
        A loader yields ``images * scale + shift`` in float32; a sequence has a number
        for each channel. :meth:`normalised` finds them.
    classes : int, optional
        Number of classes; by default one more than the largest label.
    ignore_index : int, optional
        Label of images that have none, such as -100 or 255. A loss with the same
        ``ignore_index`` leaves them out, and so does the accuracy.

    Attributes
    ----------
    images : numpy.ndarray, uint8 or float32
    labels : numpy.ndarray, int32
    scale, shift : float, or both tuples of C floats
    classes : int
    ignore_index : int or None

    Raises
    ------
    DataError
        If the shapes do not fit each other, a label is neither in ``range(classes)``
        nor ``ignore_index``, or an image holds NaN or an infinity; the first such
        element is named.
    TypeError
        If images are not real numbers or labels not integers.

    Notes
    -----
    A set larger than memory comes from a file of C-contiguous uint8 or float32:
    ``ArrayDataset(np.load("images.npy", mmap_mode="r"), labels)``. A loader reads the
    rows of its batches from it and no more, also shuffled, unless the whole set fits
    the GPU; float32 is read through once more here, in search of NaN.
    ``numpy.lib.format.open_memmap`` writes such a file piece by piece. It must not
    become shorter while it is in use: the system ends a process that reads what is
    gone.
    """

    # whether labels are class indices, and not numbers to predict
    has_classes = True
    # whether a model shall make of an image the image itself
    own_images = False
    ignore_index = None

    def __init__(
        self, images, labels, scale=1.0, shift=0.0, classes=None, ignore_index=None
    ):
        images = _as_images(images)
        if ignore_index is not None:
            self.ignore_index = _as_ignore_index(ignore_index)
        labels, classes = _as_labels(labels, classes, self.ignore_index)
        if len(images) != len(labels):
            raise DataError(
                f"{len(images)} images but {len(labels)} labels: each image needs one"
            )
        scale, shift = _as_scales(scale, shift, images.shape[1])
        self._set(images, labels, scale, shift, classes)

    def _set(self, images, labels, scale, shift, classes):
        self.images, self.labels = images, labels
        self.scale, self.shift, self.classes = scale, shift, classes

    @property
    def image_shape(self) -> tuple:
        """Shape of one image: (C, H, W), or (F,) for vectors."""
        return self.images.shape[1:]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key) -> ArrayDataset:
        """A part of the set: ``dataset[a:b:c]``. Memory is shared where step is 1."""
        if not isinstance(key, slice):
            raise TypeError(
                f"a dataset is indexed by a slice, got {key!r}; single images are in "
                f".images and .labels, a DataLoader makes batches"
            )
        made = ArrayDataset.__new__(type(self))
        made._set(
            np.ascontiguousarray(self.images[key]),
            np.ascontiguousarray(self.labels[key]),
            self.scale,
            self.shift,
            self.classes,
        )
        made.ignore_index = self.ignore_index
        return made

    def subset(self, n: int) -> ArrayDataset:
        """The first ``n`` images, or all of them where there are fewer."""
        n = operator.index(n)
        if n < 0:
            raise ValueError(f"a subset has 0 or more images, got n={n}")
        return self[:n]

    def normalised(self, mean=None, std=None) -> ArrayDataset:
        """The same images, scaled so that each channel has mean 0 and deviation 1.

        Parameters
        ----------
        mean, std : sequence of C floats, optional
            From :func:`channel_statistics`, which is asked for this set if they are
            left out. A test set is given those of the training set.

        Returns
        -------
        ArrayDataset
            Of the same memory, with another scale and shift.

        Raises
        ------
        DataError
            If a standard deviation is 0 or less.

        Examples
        --------
        >>> mean, std = data.channel_statistics(train)
        >>> train, test = train.normalised(mean, std), test.normalised(mean, std)
        """
        if (mean is None) != (std is None):
            raise TypeError("mean and std are given both, or neither of them")
        if mean is None:
            from .statistics import channel_statistics

            mean, std = channel_statistics(self)
        mean, std = (np.asarray(v, np.float64).reshape(-1) for v in (mean, std))
        if not (std > 0).all():
            at = int((~(std > 0)).argmax())
            raise DataError(
                f"channel {at} has standard deviation {std[at]}: it cannot be scaled "
                f"to 1; leave the channel out, or give a std"
            )
        scale, shift = _as_scales(1 / std, -mean / std, self.images.shape[1])
        made = self[:]
        made.scale, made.shift = scale, shift
        return made

    def __repr__(self):
        ignored = ""
        if self.ignore_index is not None:
            ignored = f"ignore_index={self.ignore_index}, "
        return (
            f"ArrayDataset({len(self)} images of shape {self.image_shape}, "
            f"{self.images.dtype}, {self.classes} classes, {ignored}"
            f"scale={_text(self.scale)}, shift={_text(self.shift)})"
        )


def _finite(value, name) -> float:
    value = float(value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}")
    return value


def _as_scales(scale, shift, channels) -> tuple:
    """Two floats, or two tuples with a float for each channel."""
    if np.ndim(scale) == np.ndim(shift) == 0:
        return _finite(scale, "scale"), _finite(shift, "shift")
    found = []
    for name, value in ("scale", scale), ("shift", shift):
        values = [value] * channels if np.ndim(value) == 0 else list(value)
        if len(values) != channels:
            raise DataError(
                f"{name} has {len(values)} numbers: expected one, or one for each of "
                f"{channels} channels"
            )
        found.append(tuple(_finite(v, name) for v in values))
    return tuple(found)


def _text(value) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(f'{v:g}' for v in value)})"
    return f"{value:g}"


def _as_images(images) -> np.ndarray:
    images = np.asarray(images)
    if images.ndim not in (2, 3, 4):
        raise DataError(
            f"images of shape {images.shape}: expected (M, C, H, W), (M, H, W) "
            f"or (M, F)"
        )
    kind = images.dtype.kind
    if kind not in "fiub":
        raise TypeError(f"images of dtype {images.dtype}: expected real numbers")
    if kind == "f":
        # what float32 cannot hold becomes infinite here and is refused below
        with np.errstate(over="ignore"):
            # aligned too, else np.take would copy all images for every batch
            images = np.require(images, np.float32, ("C", "A"))
        _refuse_non_finite(images)
    else:
        fits = images.dtype == np.uint8 or not images.size
        fits = fits or (images.min() >= 0 and images.max() <= 255)
        images = np.ascontiguousarray(images, dtype=np.uint8 if fits else np.float32)
    if images.ndim == 3:
        images = images[:, None]
    return images


def _refuse_non_finite(images, name="image") -> None:
    flat = images.reshape(-1)
    # in pieces, so that a large set needs no second array of its size
    for start in range(0, flat.size, _CHUNK):
        bad = ~np.isfinite(flat[start : start + _CHUNK])
        if bad.any():
            at = start + int(bad.argmax())
            index = tuple(int(i) for i in np.unravel_index(at, images.shape))
            raise DataError(
                f"{name} {index[0]} holds {flat[at]} at {name}s{list(index)}: expected "
                f"finite numbers that fit float32"
            )


def _as_ignore_index(value) -> int:
    """A label of images that do not count."""
    value = operator.index(value)
    if not -(2**31) <= value < 2**31:
        raise ValueError(
            f"ignore_index is {value}: labels are int32, which cannot be that"
        )
    return value


def _as_labels(labels, classes, ignored=None) -> tuple:
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise DataError(
            f"labels of shape {labels.shape}: expected one class index an image, "
            f"shape (M,); argmax(axis=1) turns one-hot rows into that"
        )
    if labels.size and labels.dtype.kind not in "iu":
        raise TypeError(f"labels of dtype {labels.dtype}: expected integers")
    if ignored is None:
        counts = np.ones(labels.shape, bool)
    else:
        counts = labels != ignored
    if classes is None:
        classes = int(labels[counts].max()) + 1 if counts.any() else 0
    else:
        classes = operator.index(classes)
        if classes < 1:
            raise ValueError(f"classes must be 1 or more, got {classes}")
    outside = counts & ((labels < 0) | (labels >= classes))
    if outside.any():
        at = int(outside.argmax())
        limit = f"0 to {classes - 1}" if classes > 0 else "0 or more"
        raise DataError(f"label {at} is {labels[at]}: expected a class from {limit}")
    if classes > 2**31:
        raise DataError(f"labels up to {classes - 1} do not fit int32")
    return np.ascontiguousarray(labels, dtype=np.int32), classes
