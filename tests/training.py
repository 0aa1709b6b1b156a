"""What the tests of training share: tiny data sets and trainers."""

import hashlib

import numpy as np

import cycnn
from cycnn import data, nn, optim

CLASSES = 4


def patterns(count=200, side=6, classes=CLASSES, seed=0, noise=0.2):
    """Noise with one bright pixel in the top row that tells the class.

    uint8, to be scaled to about -1 .. 1: a linear model can learn them.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count).astype(np.int32)
    pixels = rng.normal(0, noise, (count, 1, side, side))
    pixels[np.arange(count), 0, 0, labels] += 1
    images = np.clip(pixels * 127 + 128, 0, 255).astype(np.uint8)
    return data.ArrayDataset(images, labels, 1 / 127, -128 / 127, classes)


def write_mnist(folder, train_count=1280, test_count=256):
    """Four IDX files that stand in for MNIST; returns the folder.

    Ten random patterns of 28x28 black and white squares, and some noise.
    """
    rng = np.random.default_rng(0)
    drawings = np.kron(rng.integers(0, 2, (10, 7, 7)), np.ones((4, 4)))
    for part, count in (("train", train_count), ("t10k", test_count)):
        labels = rng.integers(0, 10, count)
        images = 200 * drawings[labels] + rng.normal(28, 14, (count, 28, 28))
        images = np.clip(images, 0, 255).astype(np.uint8)
        data.write_idx(folder / f"{part}-images-idx3-ubyte", images)
        data.write_idx(folder / f"{part}-labels-idx1-ubyte", labels.astype(np.uint8))
    return folder


def make_model(seed=0, device="cpu"):
    cycnn.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
        nn.LogSoftmax(),
    ).to(device)


def make_trainer(schedule=optim.schedules.linear(), lr=0.01, device="cpu", **settings):
    model = make_model(device=device)
    optimizer = optim.RMSprop(model.parameters(), lr=lr, **settings)
    return cycnn.Trainer(model, nn.NLLLoss(), optimizer, schedule)


def digest(trainer) -> str:
    """Of every bit of the parameters and the optimizer's state."""
    found = hashlib.sha256()
    for state in (trainer.model.state_dict(), trainer.optimizer.state_dict()):
        for name, value in sorted(state.items()):
            found.update(f"{name} {np.asarray(value).tobytes().hex()}\n".encode())
    return found.hexdigest()


def figures(history):
    """The records but for what a clock measured."""
    clocks = ("seconds", "images_per_second")
    return [
        {name: value for name, value in row.items() if name not in clocks}
        for row in history.to_list()
    ]
