"""Checks of constructor arguments, with messages that name the layer."""

from __future__ import annotations

import math
import numbers

import numpy as np

from ..errors import ShapeError
from ..shapes import pair


def count(value, layer, name) -> int:
    """A positive integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{layer}: {name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{layer}: {name} must be at least 1, got {value}")
    return int(value)


def flag(value, layer, name) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{layer}: {name} must be True or False, got {value!r}")
    return bool(value)


def check_real(value, layer, name) -> None:
    """``value`` is a number, maybe infinite or NaN."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{layer}: {name} must be a number, got {value!r}")


def number(value, layer, name, most=math.inf) -> float:
    """A finite number from 0 to ``most``."""
    check_real(value, layer, name)
    if not (0 <= value <= most and math.isfinite(value)):
        wanted = "0 or more" if most == math.inf else f"from 0 to {most}"
        raise ValueError(f"{layer}: {name} must be {wanted}, got {value}")
    return float(value)


def pair_from(least, value, layer, name) -> tuple:
    """``(height, width)``, both at least ``least``, from an integer or a pair."""
    found = pair(value, f"{layer}: {name}")
    if min(found) < least:
        raise ShapeError(f"{layer}: {name} must be at least {least}, got {value!r}")
    return found
