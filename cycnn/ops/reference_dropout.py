"""Dropout: the specification, as of :mod:`cycnn.ops.reference`.

Random numbers come from Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), a function of
a counter and a key: every number is computed alone, so the mask is the same on every
device, whatever the threads, and backward computes it again instead of keeping it.
"""

from __future__ import annotations

import numpy as np

from .. import shapes
from .reference_common import _f64

_FACTORS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = np.uint64(0xFFFFFFFF)


def _philox(counters, key):
    """Four words each: uint64 arrays that hold 32 bits.

    A round takes (a, b, c, d) to (high(F1 c) ^ b ^ k0, low(F1 c), high(F0 a) ^ d ^ k1,
    low(F0 a)), and adds constants to the key (k0, k1). There are ten.
    """
    a, b, c, d = counters
    k0, k1 = (int(k) & 0xFFFFFFFF for k in key)
    for _ in range(10):
        left, right = a * np.uint64(_FACTORS[0]), c * np.uint64(_FACTORS[1])
        a, c = (
            (right >> np.uint64(32)) ^ b ^ np.uint64(k0),
            (left >> np.uint64(32)) ^ d ^ np.uint64(k1),
        )
        b, d = right & _LOW, left & _LOW
        k0, k1 = ((k + s) & 0xFFFFFFFF for k, s in zip((k0, k1), _KEY_STEPS))
    return a, b, c, d


def _threshold(p) -> int:
    """The 32-bit number below which a random word drops its element."""
    return min(round(p * 2**32), 2**32 - 1)


def _scale(p) -> float:
    """What the elements that stay are multiplied with."""
    return 0.0 if p == 1 else 1 / (1 - p)


def _masked(x, used, p):
    index = np.arange(shapes.ceil_div(x.size, 4), dtype=np.uint64)
    seed_low, seed_high, step = (int(word) & 0xFFFFFFFF for word in used[:3])
    counters = index & _LOW, index >> np.uint64(32), np.uint64(step), np.uint64(0)
    words = np.stack(_philox(counters, (seed_low, seed_high)), axis=-1)
    stays = words.reshape(-1)[: x.size].reshape(x.shape) >= _threshold(p)
    return np.where(stays, _f64(x) * _scale(p), 0.0)


def dropout_forward(x, state, p):
    """y = 0 with probability p, else x / (1 - p), each element for itself.

    The expected value of y is x. Element i is dropped if a word of 32 bits is below p
    2^32: word i mod 4 of Philox, of the counter (i div 4, step) and the key seed.

    Parameters
    ----------
    x : any shape
    state : (4,) int32
        The seed's low and high half, the step, and 0. 1 is added to the step, unless x
        is empty.
    p : float
        From 0 to 1.

    Returns
    -------
    y : the shape of x
    used : (4,) int32
        The state that the mask was made of.
    """
    shapes.check_dropout_state(state.shape)
    used = state.copy()
    if x.size:
        # wraps around in arrays: scalars of NumPy warn
        state[2:3] += np.ones(1, np.int32)
    return _masked(x, used, p), used


def dropout_backward(dy, used, p):
    """dx = 0 where the element was dropped, else dy / (1 - p): y is linear in x.

    Parameters
    ----------
    dy : any shape
    used : (4,) int32
        As the forward returned it.
    p : float
    """
    shapes.check_dropout_state(used.shape)
    return _masked(dy, used, p)
