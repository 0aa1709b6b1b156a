"""Random numbers of the library.

They are drawn on the host, whatever device they are for, so that a model starts
with the same weights on the CPU and on every GPU.
"""

from __future__ import annotations

import contextlib
import contextvars
import operator

_generator = None
# inside of seeded(): the generator of this thread
_scoped = contextvars.ContextVar("cycnn.random", default=None)


def manual_seed(seed: int) -> None:
    """Make everything random that follows depend on ``seed`` alone.

    Parameters
    ----------
    seed : int
        Any integer from 0 to 2**64 - 1.
    """
    global _generator
    made = _seeded_generator(seed)
    if _scoped.get() is None:
        _generator = made
    else:
        _scoped.set(made)


@contextlib.contextmanager
def seeded(seed: int):
    """Inside of the ``with``, what this thread draws depends on ``seed`` alone.

    Other threads, and what follows, draw as if it had not been.
    """
    token = _scoped.set(_seeded_generator(seed))
    try:
        yield
    finally:
        _scoped.reset(token)


def _seeded_generator(seed):
    import numpy as np

    return np.random.Generator(np.random.Philox(checked_seed(seed)))


def checked_seed(seed) -> int:
    """A seed as an int, from 0 to 2**64 - 1."""
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, got {seed!r}") from None
    if not 0 <= number < 2**64:
        raise ValueError(f"seed must be from 0 to 2**64 - 1, got {seed}")
    return number


def generator():
    """The library's ``numpy.random.Generator``; seeded by the system at first use."""
    global _generator
    scoped = _scoped.get()
    if scoped is not None:
        return scoped
    if _generator is None:
        import numpy as np

        _generator = np.random.Generator(np.random.Philox())
    return _generator


def draw_seed() -> int:
    """A seed for something that keeps its own, for instance a loader's order."""
    return int(generator().integers(0, 2**63))
