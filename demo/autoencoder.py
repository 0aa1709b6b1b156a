#!/usr/bin/env python3
"""An autoencoder of digits: 784 pixels through a few numbers and back.

    python demo/autoencoder.py --plot digits.png
    python demo/autoencoder.py --numbers 2 --epochs 20 --device cpu --plot digits.png

The picture (it needs matplotlib) has test digits above and, below each, what the
network made of it. The network sees no labels.
"""

import common  # first: it finds cycnn in a checkout
import numpy as np

import cycnn
from cycnn import data, nn, optim


def autoencoder(numbers):
    """(encoder, decoder): images (N, 1, 28, 28) to (N, numbers, 1, 1) and back.

    The decoder gives logits; their sigmoid is the brightness.
    """
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, numbers, 7),  # of all 7x7 places: the code
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.ConvTranspose2d(numbers, 32, 7), nn.BatchNorm2d(32), nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
    )  # fmt: skip
    return encoder, decoder


def brightness(logits):
    return 1 / (1 + np.exp(-logits))


def save_picture(path, images, made):
    """Digits above, what became of them below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(len(images), 2.2), layout="constrained")
    axes = figure.subplots(2, len(images), squeeze=False)
    for row, pictures in zip(axes, (images, made)):
        for place, picture in zip(row, pictures):
            place.imshow(picture[0], cmap="gray_r", vmin=0, vmax=1)
            place.axis("off")
    figure.savefig(path, dpi=100, format="png")


def main(argv=None):
    parser = common.parser(__doc__, epochs=5, batch_size=64)
    common.add_digits(parser)
    add = parser.add_argument
    add("--numbers", type=int, default=16, help="length of the code; default: 16")
    add("--plot", metavar="FILE", help="write a picture (PNG)")
    add("--save", metavar="FILE", help="write the weights of both halves")
    options, device = common.start(parser, argv)
    if options.numbers < 1:
        parser.error("--numbers must be at least 1")
    if options.plot:
        import plots

        plots.require()

    # brightness from 0 to 1; the target of an image is the image itself
    train, test = (
        data.TargetDataset(part.images, scale=1 / 255)
        for part in common.digits(options)
    )
    encoder, decoder = autoencoder(options.numbers)
    model = nn.Sequential(*encoder, *decoder).to(device)
    trainer = cycnn.Trainer(
        model,
        nn.BCEWithLogitsLoss(),
        optim.AdamW(model.parameters(), lr=5e-3),
        optim.schedules.one_cycle(),
        clip_grad_norm=1.0,
    )
    trainer.fit(
        train,
        options.epochs,
        options.batch_size,
        seed=options.seed,
        test=test,
        progress=True,
    )
    images = (test.images / 255).astype(np.float32)
    made = brightness(model.predict(images))
    error = np.mean((made - images) ** 2)
    # what a network could do that knows nothing of the image it is given
    mean = (train.images / 255).mean(axis=0)
    print(
        f"squared error a pixel on {len(test):,} test images: {error:.4f} from "
        f"{options.numbers} numbers; the mean digit in place of each: "
        f"{np.mean((mean - images) ** 2):.4f}"
    )
    if options.save:
        model.save(options.save)
        print(f"weights: {options.save}")
    if options.plot:
        save_picture(options.plot, images[:12], made[:12])
        print(f"picture: {options.plot}")


if __name__ == "__main__":
    common.run(main)
