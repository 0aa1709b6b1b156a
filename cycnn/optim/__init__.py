"""Optimizers and learning-rate schedules."""

from . import schedules
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .averaging import EMA
from .optimizer import Optimizer
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = [
    "Adagrad",
    "Adam",
    "AdamW",
    "EMA",
    "Optimizer",
    "RMSprop",
    "SGD",
    "schedules",
]
