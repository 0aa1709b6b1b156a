#!/usr/bin/env python3
"""A network goes from PyTorch to cycnn, learns something new there, and goes back.

    python demo/from_pytorch.py --device cpu
    python demo/from_pytorch.py --weights net.safetensors        without PyTorch

1. A torch.nn.Sequential learns the digits 0 to 4. Its weights, a safetensors file,
   load into the same layers of cycnn: names and layouts are equal, so is the output.
2. Its body sees the digits 5 to 9, which are new to it; a new last part learns from
   what it makes of them, with few images. The body stays as it is.
3. All of it learns on together, the body ten times as slowly.
4. The result loads into PyTorch again, and goes to an ONNX file and back.

PyTorch (pip install torch) makes the weights of step 1, unless --weights names a file
of them; without it the way back is left out. ONNX needs pip install 'cycnn[onnx]'.
"""

import sys
import tempfile
from pathlib import Path

import common  # first: it finds cycnn in a checkout
import numpy as np

import cycnn
from cycnn import data, nn, optim

CLASSES = 5


def network(layers):
    """The same in both: ``layers`` is torch.nn or cycnn.nn."""
    return layers.Sequential(
        layers.Conv2d(1, 16, 5), layers.ReLU(), layers.MaxPool2d(2),
        layers.Conv2d(16, 32, 5), layers.ReLU(), layers.MaxPool2d(2),
        layers.Flatten(),
        layers.Linear(512, 64), layers.ReLU(),
        layers.Linear(64, CLASSES),
    )  # fmt: skip


BODY = 7  # layers up to Flatten


def parts(dataset):
    """The digits 0 to 4, and the digits 5 to 9 as classes 0 to 4."""
    old, new = dataset.labels < CLASSES, dataset.labels >= CLASSES
    old, new = common.pick(dataset, old), common.pick(dataset, new)
    made = [(old.images, old.labels), (new.images, new.labels - CLASSES)]
    scales = dataset.scale, dataset.shift, CLASSES
    return [data.ArrayDataset(*arrays, *scales) for arrays in made]


def pixels(dataset):
    return (dataset.images * dataset.scale + dataset.shift).astype(np.float32)


def train_in_torch(torch, dataset, options):
    """A network of PyTorch that knows the digits of a data set."""
    torch.manual_seed(options.seed)
    model = network(torch.nn)
    images = torch.from_numpy(pixels(dataset))
    labels = torch.from_numpy(dataset.labels).long()
    criterion = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for epoch in range(options.epochs):
        for batch in torch.randperm(len(images)).split(options.batch_size):
            loss = criterion(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"PyTorch, epoch {epoch + 1}/{options.epochs}  loss {loss.item():.4f}")
    return model


def largest_difference(first, second):
    return float(np.abs(np.asarray(first) - np.asarray(second)).max())


def arrive(options, device, torch, old, images):
    """Step 1: the network in cycnn; and that of PyTorch, if it was made here."""
    model = network(nn).to(device)
    if options.weights:
        try:
            model.load(options.weights)
        except (cycnn.DataError, OSError, TypeError, ValueError) as error:
            sys.exit(f"--weights: {error}")
        return model
    theirs = train_in_torch(torch, old, options)
    with tempfile.TemporaryDirectory() as folder:
        path = options.keep or Path(folder, "net.safetensors")
        save_from_torch(theirs, path)
        model.load(path)
    # or with no file: model.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        expected = theirs(torch.from_numpy(images))
    difference = largest_difference(model.predict(images), expected)
    print(f"the same outputs as PyTorch's, up to {difference:.1e}")
    return model


def save_from_torch(model, path):
    """As safetensors.torch.save_file does it."""
    from safetensors.numpy import save_file

    save_file({name: x.numpy() for name, x in model.state_dict().items()}, path)


def new_head(body, train, options):
    """Step 2: a last part that learns from what a finished body makes of the images."""
    features = data.ArrayDataset(
        body.predict(pixels(train)), train.labels, classes=CLASSES
    )
    head = nn.Sequential(nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    head.to(body.device)
    optimizer = optim.Adam(head.parameters(), lr=2e-3)
    trainer = cycnn.Trainer(head, nn.CrossEntropyLoss(), optimizer)
    trainer.fit(features, options.epochs, options.batch_size, seed=options.seed)
    return head


def tune(model, train, test, options):
    """Step 3: everything learns, the body (which knows much already) slowly."""
    body, head = model[:BODY], model[BODY:]
    optimizer = optim.Adam(
        [
            {"params": body.parameters(), "lr": 1e-4},
            {"params": head.parameters(), "lr": 1e-3},
        ]
    )
    trainer = cycnn.Trainer(
        model, nn.CrossEntropyLoss(), optimizer, optim.schedules.linear()
    )
    trainer.fit(
        train,
        options.epochs,
        options.batch_size,
        seed=options.seed,
        test=test,
        progress=True,
    )


def leave(model, torch, images, options):
    """Step 4: to PyTorch, and to an ONNX file and back."""
    here = model.predict(images)
    if torch is not None:
        theirs = network(torch.nn)
        state = model.state_dict()
        theirs.load_state_dict({n: torch.from_numpy(x) for n, x in state.items()})
        with torch.no_grad():
            there = theirs(torch.from_numpy(images))
        print(f"back in PyTorch: the same up to {largest_difference(here, there):.1e}")
    with tempfile.TemporaryDirectory() as folder:
        path = options.onnx or Path(folder, "net.onnx")
        try:
            cycnn.onnx.export(model, path, (None, *images.shape[1:]))
        except ImportError as error:
            print(f"no ONNX file: {error}")
            return
        again = cycnn.onnx.load(path).to(model.device)
    difference = largest_difference(here, again.predict(images))
    print(f"through an ONNX file: the same up to {difference:.1e}")


def main(argv=None):
    parser = common.parser(__doc__, epochs=3, batch_size=64)
    common.add_digits(parser)
    add = parser.add_argument
    add("--few", type=int, default=500, metavar="N", help="images of new digits")
    add("--weights", metavar="FILE", help="safetensors weights of step 1")
    add("--keep", metavar="FILE", help="keep the weights of step 1 in this file")
    add("--onnx", metavar="FILE", help="keep the ONNX file")
    options, device = common.start(parser, argv)
    if options.few < 1:
        parser.error("--few must be at least 1")
    try:
        import torch
    except ImportError:
        torch = None
        if not options.weights:
            sys.exit(
                "PyTorch is not installed, and the network of step 1 is made with it: "
                "pip install torch, or name a file of weights with --weights (one that "
                "--keep wrote elsewhere)"
            )

    train, test = common.digits(options)
    (old, new), (old_test, new_test) = parts(train), parts(test)
    images = pixels(new_test[:100])
    model = arrive(options, device, torch, old, images)
    right = np.mean(model.predict(pixels(old_test)).argmax(1) == old_test.labels)
    print(f"digits 0 to 4: {right:.2%} right in cycnn")

    few = new.subset(options.few)
    print(f"digits 5 to 9, {len(few)} images to learn from:")
    body = model[:BODY]
    model = nn.Sequential(*body, *new_head(body, few, options))
    right = np.mean(model.predict(pixels(new_test)).argmax(1) == new_test.labels)
    print(f"a new last part, the body as it was: {right:.2%} right")
    tune(model, few, new_test, options)
    leave(model, torch, images, options)


if __name__ == "__main__":
    common.run(main)
