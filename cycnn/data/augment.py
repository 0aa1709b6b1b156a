"""Random changes to the images of a training set, made on the device."""

from __future__ import annotations

import math
import operator

from ..ops import Augmentation
from ..shapes import pair


class Augment:
    """Images moved, mirrored, turned, zoomed and cut at random while batches are made.

    Given to :meth:`cycnn.Trainer.fit` or to a :class:`DataLoader`. What happens to an
    image depends on the seed, the epoch and the number of the image in its set alone:
    it is the same on every device, in batches of any size and in any order.

    Parameters
    ----------
    shift : int or (int, int)
        Most rows and columns that an image moves, up or down, left or right. What comes
        in from outside is 0, as stored: black.
    flip : bool
        Whether one image of two is mirrored, left to right.
    rotation : float
        Most degrees that an image is turned about its middle, either way; up to 90.
    zoom : float
        Most that its size changes, either way, as a fraction; up to 0.9.
    cutout : int
        Side of a square whose middle is anywhere in the image, and which becomes 0
        after normalisation: the mean of a normalised set. 0 cuts nothing.

    Raises
    ------
    TypeError, ValueError
        If a number makes no sense.

    Notes
    -----
    Places between pixels are interpolated between the four around them. Each number is
    drawn uniformly.

    Examples
    --------
    What is common for CIFAR-10:

    >>> trainer.fit(train, 30, 128, augment=data.Augment(shift=4, flip=True))
    """

    def __init__(self, shift=0, flip=False, rotation=0.0, zoom=0.0, cutout=0):
        self.shift = pair(shift, "Augment: shift")
        if min(self.shift) < 0:
            raise ValueError(f"Augment: shift must be 0 or more, got {shift!r}")
        if not isinstance(flip, bool):
            raise TypeError(f"Augment: flip must be True or False, got {flip!r}")
        self.flip = flip
        self.rotation = _between(rotation, "rotation", 90)
        self.zoom = _between(zoom, "zoom", 0.9)
        try:
            self.cutout = operator.index(cutout)
        except TypeError:
            raise TypeError(
                f"Augment: cutout must be an integer, got {cutout!r}"
            ) from None
        if self.cutout < 0:
            raise ValueError(f"Augment: cutout must be 0 or more, got {cutout!r}")
        if max(*self.shift, self.cutout) >= 2**20:
            raise ValueError(f"{self!r}: a shift or cutout of a million pixels or more")

    @property
    def ways(self) -> Augmentation:
        """The same as the operations take it."""
        return Augmentation(
            self.shift, self.flip, math.radians(self.rotation), self.zoom, self.cutout
        )

    def __repr__(self):
        return (
            f"Augment(shift={self.shift}, flip={self.flip}, "
            f"rotation={self.rotation:g}, zoom={self.zoom:g}, cutout={self.cutout})"
        )


def _between(value, name, most) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"Augment: {name} must be a number, got {value!r}") from None
    if not 0 <= found <= most:
        raise ValueError(f"Augment: {name} must be from 0 to {most}, got {value!r}")
    return found
