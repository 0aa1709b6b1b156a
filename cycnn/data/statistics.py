"""Mean and standard deviation of a set, for its normalisation."""

from __future__ import annotations

import math

import numpy as np

from ..errors import DataError

_CHUNK = 1 << 18  # elements in one go: as float64 they stay in the cache


def channel_statistics(dataset) -> tuple:
    """Mean and standard deviation of each channel.

    Parameters
    ----------
    dataset : ArrayDataset
        At least one image. Its images are read once, in order, in pieces, so a
        memory-mapped set need not fit the memory.

    Returns
    -------
    mean, std : numpy.ndarray, float64, shape (C,)
        Of the images as they are stored, before ``scale`` and ``shift``; over all M
        images and pixels (divided by their number, not one less).

    Raises
    ------
    DataError
        If the dataset is empty.

    Examples
    --------
    A set whose channels have mean 0 and standard deviation 1, and a test set that is
    treated alike:

    >>> mean, std = data.channel_statistics(train)
    >>> train, test = train.normalised(mean, std), test.normalised(mean, std)
    """
    images = dataset.images
    if not images.size:
        raise DataError(
            f"no statistics of {len(dataset)} images of shape {dataset.image_shape}"
        )
    rows = max(1, _CHUNK // math.prod(images.shape[1:]))
    axes = (0, *range(2, images.ndim))
    count, mean, squares = 0, 0.0, 0.0
    for start in range(0, len(images), rows):
        part = images[start : start + rows].astype(np.float64)
        n = part.size // part.shape[1]
        part_mean = part.mean(axes, keepdims=True)
        part -= part_mean
        # Sums of squares about means, joined (Chan, Golub, LeVeque 1979): the mean of
        # squares less the square of the mean would lose all digits of a large mean.
        step = part_mean.ravel() - mean
        squares = squares + np.square(part, out=part).sum(axes)
        squares = squares + step**2 * (count * n / (count + n))
        mean = mean + step * (n / (count + n))
        count += n
    return mean, np.sqrt(squares / count)
