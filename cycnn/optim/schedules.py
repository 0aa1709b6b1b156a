"""Learning rates that change during training.

A schedule says by what the base learning rate is multiplied::

    schedule = linear()
    optimizer.lr = base * schedule(step, total_steps)

where ``step`` counts the updates made so far, from 0. Schedules hold no state, so that
training which is cut off and resumed goes on as if it had not been. Two are equal if
they are of one kind with the same arguments, and their ``repr`` is what one writes to
make them, which a checkpoint can keep.

The classes have lower-case names because they are used like functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


def _progress(step, total_steps):
    """How much of the run is done, from 0 to 1; 1 also when training goes on after."""
    if step < 0 or total_steps < 1:
        raise ValueError(
            f"a schedule needs step >= 0 and total_steps >= 1, got step={step} and "
            f"total_steps={total_steps}"
        )
    return min(step / total_steps, 1.0)


def _check_fraction(name, value):
    if not (isinstance(value, (int, float)) and 0 <= value <= 1):
        raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


@dataclass(frozen=True)
class constant:
    """The base learning rate, always."""

    def __call__(self, step, total_steps):
        _progress(step, total_steps)
        return 1.0


@dataclass(frozen=True)
class linear:
    """From 1 at the first update down a straight line.

    Parameters
    ----------
    end : float
        Where the line arrives when all updates are made; 0 falls to zero. The last
        update is one step short of it.
    """

    end: float = 0.0

    def __post_init__(self):
        _check_fraction("end", self.end)

    def __call__(self, step, total_steps):
        return 1 - (1 - self.end) * _progress(step, total_steps)


@dataclass(frozen=True)
class cosine:
    """From 1 down half a cosine: slow at first, fast in the middle, slow at the end.

    Parameters
    ----------
    end : float
        Where the curve arrives when all updates are made.
    """

    end: float = 0.0

    def __post_init__(self):
        _check_fraction("end", self.end)

    def __call__(self, step, total_steps):
        return _half_cosine(1.0, self.end, _progress(step, total_steps))


@dataclass(frozen=True)
class one_cycle:
    """Up to 1 along half a cosine, then down along another, below where it began.

    PyTorch's OneCycleLR with its default, two phases: the base learning rate is its
    ``max_lr`` (Smith and Topin, 2018). Its momentum stays as it is.

    Parameters
    ----------
    peak : float
        Where in the run it is 1, as a fraction.
    start : float
        Where it begins.
    end : float
        Where the last update is.
    """

    peak: float = 0.3
    start: float = 1 / 25
    end: float = 1 / 250_000

    def __post_init__(self):
        for name in ("peak", "start", "end"):
            _check_fraction(name, getattr(self, name))

    def __call__(self, step, total_steps):
        _progress(step, total_steps)
        last = max(total_steps - 1, 1)
        top = min(max(self.peak * total_steps - 1, 0), last)
        if step < top:
            return _half_cosine(self.start, 1.0, step / top)
        if top == last:
            return 1.0
        return _half_cosine(1.0, self.end, min((step - top) / (last - top), 1.0))


def _half_cosine(start, end, part):
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


@dataclass(frozen=True)
class step:
    """Multiplied by ``gamma`` each time that another ``every`` of the run is done.

    Parameters
    ----------
    every : float
        A fraction of the run, since a schedule knows no epochs: every 10 of 30 epochs
        is ``step(10 / 30)``.
    gamma : float
        The factor, from 0 to 1.
    """

    every: float = 1 / 3
    gamma: float = 0.1

    def __post_init__(self):
        _check_fraction("every", self.every)
        _check_fraction("gamma", self.gamma)
        if not self.every:
            raise ValueError("every must be more than 0")

    def __call__(self, step, total_steps):
        # 20 / 30 is a little less than 2 * (10 / 30) in floating point
        done = math.floor(_progress(step, total_steps) / self.every + 1e-9)
        return self.gamma**done


@dataclass(frozen=True)
class warmup:
    """Up to 1 in equal parts during the first updates, then another schedule.

    Parameters
    ----------
    steps : int
        How many updates: the first gets 1 / steps, the last of them 1.
    after : callable
        The schedule of the updates that remain, counted from 0 again.
    """

    steps: int
    after: object = field(default_factory=constant)

    def __post_init__(self):
        if isinstance(self.steps, bool) or not isinstance(self.steps, int):
            raise TypeError(f"steps must be an integer, got {self.steps!r}")
        if self.steps < 0:
            raise ValueError(f"steps must not be negative, got {self.steps}")
        if not callable(self.after):
            raise TypeError(f"after must be a schedule, got {self.after!r}")

    def __call__(self, step, total_steps):
        _progress(step, total_steps)
        if step < self.steps:
            return (step + 1) / self.steps
        return self.after(step - self.steps, max(total_steps - self.steps, 1))
