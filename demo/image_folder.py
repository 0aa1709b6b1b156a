#!/usr/bin/env python3
"""A classifier of one's own images: a folder for each class.

    python demo/image_folder.py                       circles, squares and triangles
    python demo/image_folder.py --data photos --save photos.safetensors
    python demo/image_folder.py --load photos.safetensors --predict new/*.jpg

photos/ holds photos/cat/1.jpg, photos/dog/1.jpg ..., of which one in five is kept to
test on; or photos/train/cat/1.jpg ... and photos/test/cat/1.jpg ... Without --data the
demo draws images for itself. Needs Pillow: pip install pillow
"""

import json
import sys
import tempfile
from pathlib import Path

import common  # first: it finds cycnn in a checkout
import numpy as np

import cycnn
from cycnn import data, nn, optim


def network(classes, width):
    """Colour images of any size from 8x8 on to scores."""
    layers, channels = [], 3
    for out_channels in (width, 2 * width, 4 * width):
        layers += [
            nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels), nn.ReLU(), nn.MaxPool2d(2),
        ]  # fmt: skip
        channels = out_channels
    return nn.Sequential(
        *layers,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(channels, classes),
    )  # fmt: skip


def draw(folder, count=600, size=48, seed=0):
    """Files of circles, squares and triangles, dark on light, of any place and size."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    names = ("circle", "square", "triangle")
    for name in names:
        (folder / name).mkdir(parents=True)
    for number in range(count):
        name = names[number % len(names)]
        ground = tuple(map(int, rng.integers(160, 256, 3)))
        colour = tuple(map(int, rng.integers(0, 120, 3)))
        image = Image.new("RGB", (size, size), ground)
        radius = rng.uniform(size / 5, size / 3)
        x, y = rng.uniform(radius, size - radius, 2)
        box = (x - radius, y - radius, x + radius, y + radius)
        pen = ImageDraw.Draw(image)
        if name == "circle":
            pen.ellipse(box, fill=colour)
        elif name == "square":
            pen.rectangle(box, fill=colour)
        else:
            pen.polygon([(x, box[1]), (box[0], box[3]), (box[2], box[3])], fill=colour)
        image.save(folder / name / f"{number}.png")


def load(folder, size, seed):
    """(train, test, names of the classes)."""
    if (folder / "train").is_dir():
        train, names = data.image_folder(folder / "train", size=size)
        test, _ = data.image_folder(folder / "test", size=size, classes=names)
        return train, test, names
    whole, names = data.image_folder(folder, size=size)
    order = np.random.default_rng(seed).permutation(len(whole))
    for_test = max(1, len(whole) // 5)
    test, train = order[:for_test], order[for_test:]
    return common.pick(whole, train), common.pick(whole, test), names


def read(path, size):
    """One file as the images of :func:`data.image_folder` are: uint8 (1, 3, H, W)."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image).convert("RGB")
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)[None]


def predict(model, settings, paths):
    """Print what the files are thought to show."""
    mean, std = (np.reshape(settings[name], (3, 1, 1)) for name in ("mean", "std"))
    for path in paths:
        try:
            image = (read(path, settings["size"]) - mean) / std
        except OSError as error:
            sys.exit(f"--predict: {error}")
        scores = model.predict(image.astype(np.float32))[0]
        sureness = np.exp(scores - scores.max())
        sureness /= sureness.sum()
        best = np.argsort(-sureness)[:3]
        guesses = (f"{settings['classes'][i]} {sureness[i]:.1%}" for i in best)
        print(f"{path}: {', '.join(guesses)}")


def train(options, device):
    """(model, settings): the network, and what else is needed to use it."""
    try:
        with tempfile.TemporaryDirectory() as drawn:
            if options.data is None:
                draw(Path(drawn))
            found = load(options.data or Path(drawn), options.size, options.seed)
    except (cycnn.DataError, ImportError, OSError) as error:
        sys.exit(f"{error}\n--data is a folder with a folder of images for each class; "
                 f"reading them needs Pillow: pip install pillow")  # fmt: skip
    images, test, classes = found
    images = common.fewer(images, options)
    # the test images are scaled by what is known from the others
    mean, std = data.channel_statistics(images)
    images, test = images.normalised(mean, std), test.normalised(mean, std)
    print(
        f"{len(images):,} images to train on, {len(test):,} to test; "
        f"{len(classes)} classes: {', '.join(classes)}"
    )
    model = network(len(classes), options.width).to(device)
    trainer = cycnn.Trainer(
        model,
        nn.CrossEntropyLoss(),
        optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2),
        optim.schedules.one_cycle(),
    )
    trainer.fit(
        images,
        options.epochs,
        options.batch_size,
        seed=options.seed,
        test=test,
        augment=data.Augment(shift=options.size // 8, flip=True, rotation=10, zoom=0.1),
        progress=True,
    )
    settings = {
        "classes": classes,
        "size": options.size,
        "width": options.width,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }
    return model, settings


def main(argv=None):
    parser = common.parser(__doc__, epochs=15, batch_size=32)
    add = parser.add_argument
    add("--data", metavar="DIR", type=Path, help="a folder for each class in it")
    add("--size", type=int, default=32, help="side of the images, shrunk and cut to it")
    add("--width", type=int, default=16, help="channels of the first layer")
    add("--save", metavar="FILE", help="write weights, and FILE.json with the classes")
    add("--load", metavar="FILE", help="do not train: take what --save wrote")
    add("--predict", metavar="IMAGE", nargs="+", default=(), help="say what these show")
    options, device = common.start(parser, argv)
    if options.size < 8 or options.width < 1:
        parser.error("--size must be at least 8, --width at least 1")
    if options.load and not options.predict:
        parser.error("--load needs --predict: there is nothing else to do")

    if options.load:
        try:
            settings = json.loads(Path(f"{options.load}.json").read_text())
            model = network(len(settings["classes"]), settings["width"]).to(device)
            model.load(options.load)
        except (cycnn.DataError, OSError, ValueError) as error:
            sys.exit(f"--load: {error}")
    else:
        model, settings = train(options, device)
    if options.save:
        model.save(options.save)
        Path(f"{options.save}.json").write_text(json.dumps(settings, indent=1))
        print(f"weights: {options.save}, the rest: {options.save}.json")
    predict(model, settings, options.predict)


if __name__ == "__main__":
    common.run(main)
