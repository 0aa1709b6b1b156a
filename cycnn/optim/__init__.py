"""Optimizers and learning-rate schedules."""

from . import schedules
from .optimizer import Optimizer
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["Optimizer", "RMSprop", "SGD", "schedules"]
