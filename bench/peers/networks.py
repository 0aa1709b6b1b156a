"""What everybody runs: networks, starting weights, data, recipes and settings."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

PRECISIONS = ("fp32", "tf32", "bf16")
KINDS = ("cycnn", "cycnn-eager", "torch-eager", "torch-graph", "torch-compile",
         "jax-scan")
CONTESTANTS = [f"{kind}-{precision}" for kind in KINDS for precision in PRECISIONS]

# ---------------------------------------------------------------------------------
# Networks. A ReLU follows every layer but the last of the network, which log-softmax
# follows, and the last of each of a block's two ways.


class Conv(NamedTuple):
    """A convolution.

    ``pool``: with a max pool of 2 x 2 behind its ReLU; ``norm``: with a BatchNorm ahead
    of it, and without a bias; ``groups``: as many as inputs make it depth-wise.
    """

    inputs: int
    outputs: int
    size: int
    padding: int = 0
    pool: bool = False
    stride: int = 1
    norm: bool = False
    groups: int = 1


class Residual(NamedTuple):
    """What the convolutions of ``body`` and of ``shortcut`` give, added.

    Without a shortcut the block's input is added.
    """

    body: tuple
    shortcut: tuple = ()


class Linear(NamedTuple):
    """A linear layer; ``mean``: of the means over all pixels of each channel."""

    inputs: int
    outputs: int
    mean: bool = False


def block(inputs, outputs, stride=1):
    """ResNet's basic block."""
    body = (
        Conv(inputs, outputs, 3, 1, stride=stride, norm=True),
        Conv(outputs, outputs, 3, 1, norm=True),
    )
    if inputs == outputs:
        return Residual(body)
    return Residual(body, (Conv(inputs, outputs, 1, stride=stride, norm=True),))


def separable(inputs, outputs, stride=1):
    """MobileNet's depth-wise convolution, and the 1x1 that mixes its channels."""
    return (
        Conv(inputs, inputs, 3, 1, stride=stride, norm=True, groups=inputs),
        Conv(inputs, outputs, 1, norm=True),
    )


@dataclass(frozen=True)
class Network:
    """Layers, the data that they classify, and how they are trained.

    Attributes
    ----------
    layers : tuple of Conv, Residual and Linear
    data : {"mnist", "patterns"}
    optimizer : {"rmsprop", "sgd"}
    rate : float
        What the learning rate starts at; it falls linearly to 0 over the whole run.
    spread : float
        Weights start uniform in +-sqrt(spread / fan-in): 1 is what PyTorch and cycnn
        do by themselves, 6 is He's for ReLU, without which deep networks start slowly.
    learned : float
        The test accuracy without which a training does not count.
    """

    layers: tuple
    data: str = "mnist"
    optimizer: str = "rmsprop"
    rate: float = 0.003
    spread: float = 1.0
    learned: float = 0.97


NETWORKS = {
    "reference": Network((
        Conv(1, 32, 5, pool=True), Conv(32, 64, 5, pool=True), Conv(64, 128, 3),
        Linear(512, 128), Linear(128, 10),
    )),
    "lenet": Network((
        Conv(1, 6, 5, padding=2, pool=True), Conv(6, 16, 5, pool=True),
        Linear(400, 120), Linear(120, 84), Linear(84, 10),
    )),
    "vgg": Network(
        (
            Conv(3, 64, 3, 1), Conv(64, 64, 3, 1, pool=True),
            Conv(64, 128, 3, 1), Conv(128, 128, 3, 1, pool=True),
            Conv(128, 256, 3, 1), Conv(256, 256, 3, 1, pool=True),
            Conv(256, 256, 3, 1, pool=True),
            Linear(1024, 256), Linear(256, 10),
        ),
        # three times this, and some runs fall back to chance
        data="patterns", optimizer="sgd", rate=0.0025, spread=6.0, learned=0.9,
    ),
    "resnet": Network(
        (
            Conv(3, 32, 3, 1, norm=True), block(32, 32), block(32, 32),
            block(32, 64, 2), block(64, 64), block(64, 128, 2), block(128, 128),
            Linear(128, 10, mean=True),
        ),
        data="patterns", optimizer="sgd", rate=0.02, spread=6.0, learned=0.9,
    ),
    "separable": Network(
        (
            Conv(3, 32, 3, 1, norm=True),
            *separable(32, 64), *separable(64, 128, 2), *separable(128, 128),
            *separable(128, 256, 2), *separable(256, 256),
            Linear(256, 10, mean=True),
        ),
        # the resnet's rate is too low for 75 steps: three epochs in batches of 512
        data="patterns", optimizer="sgd", rate=0.1, spread=6.0, learned=0.9,
    ),
}

ALPHA, EPS, ACCUMULATOR = 0.99, 1e-10, 1e-3  # of RMSprop
MOMENTUM = 0.9  # of SGD
DECAY = 1e-4  # L2, of both


def build(network, nn, residual):
    """The network out of the layers of ``torch.nn`` or ``cycnn.nn``.

    ``residual``: the layer that adds a body and a shortcut (None for the input).
    """

    def made(layers):
        found, flat = [], False
        for layer in layers:
            if isinstance(layer, Conv):
                found.append(
                    nn.Conv2d(
                        layer.inputs, layer.outputs, layer.size, layer.stride,
                        layer.padding, groups=layer.groups, bias=not layer.norm,
                    )
                )
                found += [nn.BatchNorm2d(layer.outputs)] * layer.norm
            elif isinstance(layer, Residual):
                body, shortcut = map(made, layer)
                found.append(
                    residual(
                        nn.Sequential(*body),
                        nn.Sequential(*shortcut) if shortcut else None,
                    )
                )
            else:
                found += [nn.AdaptiveAvgPool2d(1)] * layer.mean
                found += [] if flat else [nn.Flatten()]
                found.append(nn.Linear(layer.inputs, layer.outputs))
                flat = True
            found += [nn.ReLU()] * (layer is not layers[-1])
            found += [nn.MaxPool2d(2)] * getattr(layer, "pool", False)
        return found

    return nn.Sequential(*made(network.layers), nn.LogSoftmax(1))


def weighted(layers):
    """The convolutions and linear layers, those of a block's body first."""
    for layer in layers:
        if isinstance(layer, Residual):
            yield from weighted(layer.body + layer.shortcut)
        else:
            yield layer


def starting_weights(network) -> list:
    """In PyTorch's order and layouts; always the same.

    Of each layer the weight, then its bias, or its BatchNorm's weight and bias.
    """
    rng, made = np.random.default_rng(0), []
    for layer in weighted(network.layers):
        shape = layer.outputs, layer.inputs
        if isinstance(layer, Conv):
            shape = layer.outputs, layer.inputs // layer.groups, layer.size, layer.size
        fan_in = math.prod(shape[1:])
        bound = (network.spread / fan_in) ** 0.5
        made.append(rng.uniform(-bound, bound, shape).astype(np.float32))
        if getattr(layer, "norm", False):
            made.append(np.ones(layer.outputs, np.float32))
            made.append(np.zeros(layer.outputs, np.float32))
        else:
            bound = fan_in**-0.5
            bias = rng.uniform(-bound, bound, layer.outputs)
            made.append(bias.astype(np.float32))
    return made


# ---------------------------------------------------------------------------------
# Data


class Images(NamedTuple):
    """uint8 images (M, C, H, W) and their classes, int32 (M,)."""

    images: np.ndarray
    labels: np.ndarray

    def floats(self) -> np.ndarray:
        """The images as the networks see them: float32, -0.5 to 0.5."""
        return self.images * np.float32(1 / 255) - np.float32(0.5)


def mnist_files(folder):
    """Paths of the images and the labels, to train and to test, not compressed."""
    return [
        (folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte")
        for part in ("train", "t10k")
    ]


def read_mnist(folder) -> list:
    """[train, test] as Images. A few lines, for peers that live without cycnn."""
    found = []
    for images, labels in mnist_files(Path(folder)):
        count, height, width = np.fromfile(images, ">i4", 3, offset=4)
        pixels = np.fromfile(images, np.uint8, offset=16)
        classes = np.fromfile(labels, np.uint8, offset=8).astype(np.int32)
        found.append(Images(pixels.reshape(count, 1, height, width), classes))
    return found


def patterns(count, seed) -> Images:
    """Ten classes of coloured 32x32 images that can be learned, and need to be.

    Each class is a coarse pattern; an image shows it shifted by up to four pixels each
    way (the rest wraps around), of a contrast of its own, under noise.
    """
    coarse = np.random.default_rng(0).normal(0, 1, (10, 3, 8, 8)).astype(np.float32)
    drawings = np.kron(coarse, np.ones((4, 4), np.float32))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.int32)
    shifts = rng.integers(-4, 5, (count, 2))
    rows = (np.arange(32) - shifts[:, :1]) % 32
    columns = (np.arange(32) - shifts[:, 1:]) % 32
    images = drawings[
        labels[:, None, None, None],
        np.arange(3)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]
    images *= rng.uniform(40, 72, (count, 1, 1, 1)).astype(np.float32)
    images += rng.standard_normal(images.shape, np.float32) * 24
    return Images(np.clip(images + 128, 0, 255).astype(np.uint8), labels)


def load(network, folder, count=None) -> list:
    """[train, test] as Images; ``count``: the first so many of each only."""
    if network.data == "mnist":
        found = read_mnist(folder)
    else:
        # as many as are asked for: the noise takes a second
        found = [
            patterns(min(size, count or size), seed)
            for size, seed in ((12_800, 1), (2_000, 2))
        ]
    return [Images(part.images[:count], part.labels[:count]) for part in found]


# ---------------------------------------------------------------------------------
# Settings


# an eager epoch takes a second and more, so in all precisions only once
_USUAL = ("cycnn-*", "torch-eager-tf32", "torch-graph-*", "jax-*")
# which takes half a minute to compile, so in one precision and not everywhere
_AND_COMPILED = (*_USUAL, "torch-compile-tf32")


@dataclass(frozen=True)
class Setting:
    """What is timed.

    Attributes
    ----------
    task : {"train", "predict", "start"}
        Epochs of training; scores of images; a process that trains to an accuracy.
    network : str
    batch : int
    epochs : int
        Timed epochs of "train", all epochs of "start".
    learned : float
        The accuracy without which the figure does not count.
    unit : str
        Of the figures in the table; ``scale`` makes it from seconds.
    text : str
        Its heading there.
    resident : bool
        For "predict": the images lie on the device; else they come from the host.
    contestants : tuple of str
        Patterns of those who take part if nobody else is asked for.
    """

    task: str
    network: str
    batch: int
    text: str
    epochs: int = 0
    learned: float = 0.97
    unit: str = "ms"
    scale: float = 1e3
    resident: bool = False
    contestants: tuple = _USUAL


def _training(network, batch, epochs, text, **more):
    text += f", batch {batch}: a training epoch"
    learned = NETWORKS[network].learned
    return Setting("train", network, batch, text, epochs, learned, **more)


_REFERENCE = "reference network, MNIST"
_VGG = "VGG-style network, 12,800 images of 3x32x32"
_RESNET = "ResNet-style network, 12,800 images of 3x32x32"
_SEPARABLE = "MobileNet-style network, 12,800 images of 3x32x32"
SETTINGS = {
    "reference-128": _training(
        "reference", 128, 5, _REFERENCE,
        contestants=(*_AND_COMPILED, "torch-eager-*"),
    ),
    "reference-32": _training("reference", 32, 2, _REFERENCE),
    "reference-1024": _training("reference", 1024, 9, _REFERENCE),
    "lenet-128": _training("lenet", 128, 3, "LeNet-5, MNIST"),
    "vgg-128": _training("vgg", 128, 4, _VGG, contestants=_AND_COMPILED),
    "vgg-512": _training("vgg", 512, 4, _VGG, contestants=_AND_COMPILED),
    "resnet-128": _training("resnet", 128, 3, _RESNET, contestants=_AND_COMPILED),
    "resnet-512": _training("resnet", 512, 3, _RESNET, contestants=_AND_COMPILED),
    "separable-128": _training(
        "separable", 128, 3, _SEPARABLE, contestants=_AND_COMPILED
    ),
    "separable-512": _training(
        "separable", 512, 3, _SEPARABLE, contestants=_AND_COMPILED
    ),
    "predict-10000": Setting(
        "predict", "reference", 10_000,
        f"{_REFERENCE}: scores of 10,000 images, from host array to host array",
    ),
    "predict-10000-resident": Setting(
        "predict", "reference", 10_000,
        f"{_REFERENCE}: scores of 10,000 images, all on the device",
        resident=True,
    ),
    "predict-1": Setting(
        "predict", "reference", 1,
        f"{_REFERENCE}: scores of one image, from host array to host array",
        unit="us", scale=1e6,
    ),
    # peers in one precision only: their processes take seconds to start
    "start": Setting(
        "start", "reference", 128,
        "from the start of a process, warm caches, to 99% on MNIST's test set",
        epochs=3, learned=0.99, unit="s", scale=1,
        contestants=("cycnn-fp32", "cycnn-tf32", "cycnn-bf16", "torch-graph-tf32",
                     "jax-scan-tf32"),
    ),
}
