#!/usr/bin/env python3
"""A small ResNet on CIFAR-10, or on any folders of images shrunk to 32x32.

    python demo/resnet_cifar10.py --data cifar-10-batches-bin --precision tf32
    python demo/resnet_cifar10.py --data photos                  photos/train/cat/1.jpg
    python demo/resnet_cifar10.py --data cifar-10-batches-bin --device cpu \\
        --images 5000 --epochs 5 --width 16                      minutes on a CPU

CIFAR-10 is not downloaded: https://www.cs.toronto.edu/~kriz/cifar.html has its binary
version. Folders of images need Pillow: pip install pillow
"""

import sys
from pathlib import Path

import common  # first: it finds cycnn in a checkout
import numpy as np

import cycnn
from cycnn import data, nn, optim


def block(channels, out_channels, stride=1):
    """Two convolutions that correct their input, and a ReLU on the sum."""
    body = nn.Sequential(
        # no bias: the normalisation behind would take it away again
        nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
    )
    shortcut = None
    if stride != 1 or channels != out_channels:
        shortcut = nn.Sequential(
            nn.Conv2d(channels, out_channels, 1, stride, bias=False),
            nn.BatchNorm2d(out_channels),
        )
    return [nn.Residual(body, shortcut), nn.ReLU()]


def resnet(classes, width=32, depth=2):
    """Images (N, 3, 32, 32) to scores: three stages of ``depth`` blocks."""
    layers = [nn.Conv2d(3, width, 3, padding=1, bias=False)]
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    channels = width
    for stage in range(3):
        for number in range(depth):
            stride = 2 if stage and not number else 1
            layers += block(channels, width << stage, stride)
            channels = width << stage
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
    )


def load(folder):
    """(train, test, names of the classes) from either kind of folder."""
    try:
        if (folder / "train").is_dir():
            train, names = data.image_folder(folder / "train", size=32)
            test, _ = data.image_folder(folder / "test", size=32, classes=names)
            return train, test, names
        return *data.cifar10(folder), data.CIFAR10_CLASSES
    except (cycnn.DataError, ImportError, OSError) as error:
        sys.exit(f"{error}\n--data is a folder with CIFAR-10's binary files, or one "
                 f"with train/CLASS/*.jpg and test/CLASS/*.jpg")  # fmt: skip


def main(argv=None):
    parser = common.parser(__doc__, epochs=15)
    add = parser.add_argument
    add("--data", metavar="DIR", type=Path, required=True, help="either kind of folder")
    add(
        "--width", type=int, default=32, help="channels of the first stage; default: 32"
    )
    add("--depth", type=int, default=2, help="blocks a stage; default: 2")
    add("--lr", type=float, default=0.2, help="at the top of the cycle; default: 0.2")
    add("--save", metavar="FILE", help="write the weights")
    options, device = common.start(parser, argv)
    if min(options.width, options.depth) < 1 or options.lr <= 0:
        parser.error("--width and --depth must be at least 1, --lr more than 0")

    train, test, names = load(options.data)
    train = common.fewer(train, options)
    mean, std = data.channel_statistics(train)
    train, test = train.normalised(mean, std), test.normalised(mean, std)
    model = resnet(len(names), options.width, options.depth).to(device)
    print(
        f"{len(train):,} images to train on, {len(test):,} to test, {len(names)} "
        f"classes; {sum(p.size for p in model.parameters()):,} parameters"
    )
    trainer = cycnn.Trainer(
        model,
        nn.CrossEntropyLoss(label_smoothing=0.1),
        optim.SGD(
            model.parameters(),
            lr=options.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=5e-4,
        ),
        optim.schedules.one_cycle(),
    )
    trainer.fit(
        train,
        options.epochs,
        options.batch_size,
        seed=options.seed,
        test=test,
        augment=data.Augment(shift=4, flip=True),
        progress=True,
    )
    predicted = trainer.predict(test)
    print()
    for label, name in enumerate(names):
        of_class = test.labels == label
        if of_class.any():
            print(f"{name:<14} {np.mean(predicted[of_class] == label):7.2%} right")
    print(f"{'all':<14} {np.mean(predicted == test.labels):7.2%} right")
    if options.save:
        model.save(options.save)
        print(f"weights: {options.save}")


if __name__ == "__main__":
    common.run(main)
