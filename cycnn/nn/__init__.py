"""Layers, losses, initialisers and the reference network."""

from . import init
from .activation import (
    GELU,
    Hardtanh,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
)
from .blocks import Concat, Residual
from .buffer import Buffer
from .conv import Conv2d
from .conv_transpose import ConvTranspose2d
from .dropout import Dropout
from .fold import fold_batch_norm
from .fuse import Objective, fuse
from .inference import Predictor
from .layer import Layer
from .linear import Linear
from .loss import CrossEntropyLoss, NLLLoss
from .loss_regression import BCEWithLogitsLoss, L1Loss, MSELoss, SmoothL1Loss
from .networks import reference_network
from .normalisation import BatchNorm2d, LayerNorm
from .padding import ZeroPad2d
from .parameter import Parameter
from .pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from .reshape import Flatten
from .sequential import Sequential

__all__ = [
    "GELU",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BCEWithLogitsLoss",
    "BatchNorm2d",
    "Buffer",
    "Concat",
    "Conv2d",
    "ConvTranspose2d",
    "CrossEntropyLoss",
    "Dropout",
    "Flatten",
    "Hardtanh",
    "L1Loss",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MSELoss",
    "MaxPool2d",
    "NLLLoss",
    "Objective",
    "Parameter",
    "Predictor",
    "ReLU",
    "ReLU6",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "SmoothL1Loss",
    "Softmax",
    "Tanh",
    "ZeroPad2d",
    "fold_batch_norm",
    "fuse",
    "init",
    "reference_network",
]
