"""What the modules of the specification share."""

from __future__ import annotations

import numpy as np


def _f64(x):
    return np.asarray(x, np.float64)


def _write(out, value, accumulate):
    if accumulate:
        out += value
    else:
        out[...] = value
