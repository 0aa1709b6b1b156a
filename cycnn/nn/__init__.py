"""Layers, losses, initialisers and the reference network."""

from . import init
from .activation import LogSoftmax, ReLU, Sigmoid
from .blocks import Concat, Residual
from .conv import Conv2d
from .conv_transpose import ConvTranspose2d
from .fuse import Objective, fuse
from .inference import Predictor
from .layer import Layer
from .linear import Linear
from .loss import CrossEntropyLoss, NLLLoss
from .networks import reference_network
from .padding import ZeroPad2d
from .parameter import Parameter
from .pooling import MaxPool2d
from .reshape import Flatten
from .sequential import Sequential

__all__ = [
    "Concat",
    "Conv2d",
    "ConvTranspose2d",
    "CrossEntropyLoss",
    "Flatten",
    "Layer",
    "Linear",
    "LogSoftmax",
    "MaxPool2d",
    "NLLLoss",
    "Objective",
    "Parameter",
    "Predictor",
    "ReLU",
    "Residual",
    "Sequential",
    "Sigmoid",
    "ZeroPad2d",
    "fuse",
    "init",
    "reference_network",
]
