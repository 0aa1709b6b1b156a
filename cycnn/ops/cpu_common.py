"""What the modules of CPU operations share: the loops, and checks of arguments."""

from __future__ import annotations

import importlib
import os

import numpy as np

from .. import shapes
from ..tensor import Tensor, from_array


def _with_threads_that_sleep(name):
    """Import a module, the first that needs GNU's OpenMP, whose threads soon sleep.

    When there is nothing to do they spin, by default for so long that two programs on
    the same cores take three times as long as one after the other. How long is read
    from the environment, once. Alone, a program is as fast either way.
    """
    chosen = {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if chosen:
        return importlib.import_module(name, __package__)
    os.environ["GOMP_SPINCOUNT"] = "1000"
    try:
        return importlib.import_module(name, __package__)
    finally:
        del os.environ["GOMP_SPINCOUNT"]


_cpu = _with_threads_that_sleep("._cpu")

_FLOAT32, _INT32, _UINT8 = (np.dtype(name) for name in ("float32", "int32", "uint8"))


def _array(name: str, x, dtype=_FLOAT32) -> np.ndarray:
    """The array behind a tensor, on the CPU and of ``dtype`` (None: of any)."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is a {type(x).__name__}: expected a Tensor; cycnn.Tensor({name}, "
            f"'cpu') makes one"
        )
    if x.device.is_cuda:
        raise TypeError(
            f"{name} is on {x.device}, the other tensors are on the CPU: move it with "
            f".to('cpu'), or them with .to('{x.device}')"
        )
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}: expected {dtype}")
    return x.array


def _optional(name: str, x):
    return None if x is None else _array(name, x)


def _flat(array):
    return None if array is None else array.reshape(-1)


def _shape(array):
    return None if array is None else array.shape


def _map(loop, x, *settings):
    """y of x, element by element."""
    x = _array("x", x)
    y = _cpu.empty(x.shape, _FLOAT32)
    if x.size:
        loop(_flat(x), _flat(y), *settings)
    return from_array(y)


def _map_backward(loop, dy, name, seen, *settings):
    """dx, element by element; the derivative is computed of ``seen``, named ``name``."""
    dy, seen = _array("dy", dy), _array(name, seen)
    shapes.check_same(**{name: seen.shape}, dy=dy.shape)
    dx = _cpu.empty(seen.shape, _FLOAT32)
    if seen.size:
        loop(_flat(dy), _flat(seen), _flat(dx), *settings)
    return from_array(dx)


def _map_rows(loop, x):
    """y (N, F) of x, row by row."""
    x = _array("x", x)
    n, f = shapes.check_scores("x", x.shape)
    y = _cpu.empty(x.shape, _FLOAT32)
    if n:
        loop(_flat(x), _flat(y), n, f)
    return from_array(y)


def _map_rows_backward(loop, dy, y):
    """dx (N, F), row by row."""
    dy, y = _array("dy", dy), _array("y", y)
    n, f = shapes.check_scores("y", y.shape)
    shapes.check_same(y=y.shape, dy=dy.shape)
    dx = _cpu.empty(y.shape, _FLOAT32)
    if n:
        loop(_flat(dy), _flat(y), _flat(dx), n, f)
    return from_array(dx)
