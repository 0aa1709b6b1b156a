"""Dropout."""

from __future__ import annotations

import numpy as np

from .. import random
from ..ops import for_device
from .arguments import number
from .buffer import Buffer
from .layer import Layer, as_gradient, as_input


class Dropout(Layer):
    """Sets elements to 0 at random in training mode, and nothing in evaluation mode.

    Parameters
    ----------
    p : float
        Probability that an element is dropped, from 0 to 1.

    Attributes
    ----------
    random_state : Buffer (4,) int32
        A seed of 64 bits, drawn from :func:`cycnn.manual_seed`'s generator when the
        layer is made, the number of batches that were dropped from, and 0. Not in the
        state_dict, but in a checkpoint: a resumed run goes on with the same numbers.

    Notes
    -----
    Formula: y = 0 with probability p, else x / (1 - p), each element for itself. The
    expected value of y is x, so that evaluation needs no factor.

    Which elements are dropped depends on the seed, the number of the batch and the
    place of the element, and on nothing else: it is the same on the CPU and on a GPU,
    and in a recorded step, which counts its batches on the device.
    """

    def __init__(self, p=0.5):
        self.p = number(p, type(self).__name__, "p", 1)
        seed = random.draw_seed()
        words = np.array([seed & 0xFFFFFFFF, seed >> 32, 0, 0], np.uint32)
        self.random_state = Buffer(words.view(np.int32), persistent=False)

    def forward(self, x):
        state = self.random_state.data
        x = as_input(self, x, state.device)
        used = None
        y = x
        if self.training and self.p:
            y, used = for_device(x.device).dropout_forward(x, state, self.p)
        self._saved = (x.shape, x.device, used)
        return y

    def backward(self, dy, input_grad=True, accumulate=False):
        """dx = 0 where the element was dropped, else dy / (1 - p): y is linear in x.

        The mask is not kept but computed again, of the state that forward used.
        """
        shape, device, used = self._remembered()
        dx = None
        if input_grad:
            dx = as_gradient(self, dy, shape, device)
            if used is not None:
                dx = for_device(device).dropout_backward(dx, used, self.p)
        self._saved = None
        return dx

    def _settings(self):
        return f"p={self.p}"
