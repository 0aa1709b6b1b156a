"""Networks with a name."""

from __future__ import annotations

from . import init as initialisers
from .activation import LogSoftmax, ReLU
from .conv import Conv2d
from .linear import Linear
from .pooling import MaxPool2d
from .reshape import Flatten
from .sequential import Sequential

_IMAGE = 28  # height and width that the reference network is made for


def reference_network(num_classes=10, relu_on_logits=False, init="default"):
    """The network that demo, tests and benchmarks train: for images (N, 1, 28, 28).

    ::

        conv 1->32 5x5, relu, maxpool 2, conv 32->64 5x5, relu, maxpool 2,
        conv 64->128 3x3, relu, fc 512->128, relu, fc 128->classes, log-softmax

    192,906 parameters with 10 classes. The last two options are for comparisons with
    the C++ program that the network is from, which trains worse with them than without.

    Parameters
    ----------
    num_classes : int
    relu_on_logits : bool
        Put a ReLU in front of the log-softmax. A logit that is negative for every image
        then gets no gradient any more.
    init : {"default", "image_xavier"}
        "image_xavier": Xavier-uniform weights and biases with fan_in = C H W and
        fan_out = K P Q of the image sizes, not of the filter's; for Linear the usual.

    Returns
    -------
    Sequential
    """
    if init not in ("default", "image_xavier"):
        raise ValueError(f"init must be 'default' or 'image_xavier', got {init!r}")
    layers = [
        Conv2d(1, 32, 5),
        ReLU(),
        MaxPool2d(2),
        Conv2d(32, 64, 5),
        ReLU(),
        MaxPool2d(2),
        Conv2d(64, 128, 3),
        ReLU(),
        Flatten(),
        Linear(512, 128),
        ReLU(),
        Linear(128, num_classes),
    ]
    if relu_on_logits:
        layers.append(ReLU())
    layers.append(LogSoftmax())
    if init == "image_xavier":
        _image_xavier(layers)
    return Sequential(*layers)


def _image_xavier(layers):
    """Redraw all parameters as the C++ program does."""
    size = _IMAGE
    for layer in layers:
        if isinstance(layer, MaxPool2d):
            size //= layer.kernel_size[0]
            continue
        if isinstance(layer, Conv2d):
            fan_in = layer.in_channels * size**2
            size -= layer.kernel_size[0] - 1
            fan_out = layer.out_channels * size**2
        elif isinstance(layer, Linear):
            fan_in, fan_out = layer.in_features, layer.out_features
        else:
            continue
        for parameter in layer.parameters():
            parameter.data.copy_(
                initialisers.xavier_uniform(
                    parameter.shape, fan_in=fan_in, fan_out=fan_out
                )
            )
