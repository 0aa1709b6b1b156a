"""Layers, losses, initialisers and the reference network."""

from . import init
from .activation import LogSoftmax, ReLU, Sigmoid
from .conv import Conv2d
from .fuse import Objective, fuse
from .inference import Predictor
from .layer import Layer
from .linear import Linear
from .loss import CrossEntropyLoss, NLLLoss
from .loss_regression import BCEWithLogitsLoss, L1Loss, MSELoss, SmoothL1Loss
from .networks import reference_network
from .parameter import Parameter
from .pooling import MaxPool2d
from .reshape import Flatten
from .sequential import Sequential

__all__ = [
    "BCEWithLogitsLoss",
    "Conv2d",
    "CrossEntropyLoss",
    "Flatten",
    "L1Loss",
    "Layer",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool2d",
    "NLLLoss",
    "Objective",
    "Parameter",
    "Predictor",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "SmoothL1Loss",
    "fuse",
    "init",
    "reference_network",
]
