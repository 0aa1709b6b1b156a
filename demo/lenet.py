#!/usr/bin/env python3
"""LeNet-5 on MNIST: the network of LeCun, Bottou, Bengio and Haffner, 1998.

    python demo/lenet.py                        ten epochs, on the GPU if there is one
    python demo/lenet.py --modern               ReLU and the largest instead of the mean
    python demo/lenet.py --dataset mnist5k --epochs 20 --save lenet.safetensors

It departs from the paper in this: an image is padded to 32x32 by the first layer, each
map of the second convolution sees all maps before it, pooling has no weights, and the
ten outputs are scores for cross-entropy.
"""

import common  # first: it finds cycnn in a checkout

import cycnn
from cycnn import data, nn, optim


def lenet(modern=False):
    """Images (N, 1, 28, 28) to ten scores; 61,706 parameters."""
    activation, pool = (nn.ReLU, nn.MaxPool2d) if modern else (nn.Tanh, nn.AvgPool2d)
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), activation(), pool(2),  # 6 x 14 x 14
        nn.Conv2d(6, 16, 5), activation(), pool(2),            # 16 x 5 x 5
        nn.Conv2d(16, 120, 5), activation(),                   # 120 x 1 x 1
        nn.Flatten(),
        nn.Linear(120, 84), activation(),
        nn.Linear(84, 10),
    )  # fmt: skip


def main(argv=None):
    parser = common.parser(__doc__, epochs=10)
    common.add_digits(parser)
    parser.add_argument(
        "--modern", action="store_true", help="ReLU for tanh, MaxPool2d for AvgPool2d"
    )
    parser.add_argument("--save", metavar="FILE", help="write the weights")
    options, device = common.start(parser, argv)

    train, test = common.digits(options)
    # mean 0 and deviation 1, both by the training set
    mean, std = data.channel_statistics(train)
    train, test = train.normalised(mean, std), test.normalised(mean, std)
    model = lenet(options.modern).to(device)
    print(model)
    trainer = cycnn.Trainer(
        model,
        nn.CrossEntropyLoss(),
        optim.Adam(model.parameters(), lr=2e-3),
        optim.schedules.linear(),
    )
    trainer.fit(
        train,
        options.epochs,
        options.batch_size,
        seed=options.seed,
        test=test,
        progress=True,
    )
    wrong = 1 - trainer.history[-1].test_accuracy
    print(f"{wrong:.2%} of {len(test):,} test images wrong (the paper: 0.95%)")
    if options.save:
        model.save(options.save)
        print(f"weights: {options.save}")


if __name__ == "__main__":
    common.run(main)
