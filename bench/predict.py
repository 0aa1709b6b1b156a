#!/usr/bin/env python3
"""Time predictions of the reference network, and epochs of a set that streams.

    python bench/predict.py

Pixels and labels are random: neither changes the time. Latencies are those of whole calls,
a host array in and a host array out; for images on the GPU the call ends when the result
is there. An epoch is that of ``Trainer.fit``: 60,000 images, batch 128, RMSprop; "streams"
pretends that the set does not fit the GPU.
"""

import statistics
import sys
import time
from pathlib import Path
from unittest import mock

# Last, for a checkout in which cycnn was built in place and not installed.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np

import cycnn
from cycnn import data, nn, optim

PRECISIONS = ("fp32", "tf32", "bf16")


def microseconds(call, count, warmup=10):
    """Median and 99th percentile."""
    times = []
    for i in range(warmup + count):
        start = time.perf_counter()
        call()
        if i >= warmup:
            times.append(1e6 * (time.perf_counter() - start))
    return f"{statistics.median(times):8.1f} {np.percentile(times, 99):8.1f}"


def predictions(images):
    cycnn.manual_seed(0)
    model = nn.reference_network().to("cuda")
    trainer = cycnn.Trainer(model, nn.NLLLoss(), optim.SGD(model.parameters(), lr=0.1))
    there = cycnn.Tensor(images, "cuda")

    def on_device(x):
        model.predict(x)
        cycnn.synchronize("cuda")

    print("us: median, 99th percentile")
    for precision in PRECISIONS:
        cycnn.set_precision(precision)
        for name, call, count in (
            ("1 image, host to host", lambda: model.predict(images[:1]), 2000),
            ("1 image, Trainer.predict", lambda: trainer.predict(images[:1]), 2000),
            ("128 images, host to host", lambda: model.predict(images[:128]), 500),
            ("128 images, on the GPU", lambda: on_device(there[:128]), 500),
            ("10,000 images, on the GPU", lambda: on_device(there), 50),
            ("10,000 images, host to host", lambda: model.predict(images), 30),
        ):
            print(f"{precision}  {name:<28} {microseconds(call, count)}", flush=True)


def epochs(train, streams, capture):
    cycnn.manual_seed(0)
    model = nn.reference_network().to("cuda")
    optimizer = optim.RMSprop(model.parameters(), lr=0.003, initial_accumulator=1e-3)
    trainer = cycnn.Trainer(model, nn.NLLLoss(), optimizer, capture=capture)
    with mock.patch.object(
        data.DataLoader,
        "resident",
        (lambda loader: None) if streams else data.DataLoader.resident,
    ):
        history = trainer.fit(train, 7 if capture else 3, 128, seed=0)
    return statistics.median(history["seconds"][2:]), model.state_dict()


def main():
    rng = np.random.default_rng(0)
    predictions(rng.standard_normal((10000, 1, 28, 28)).astype(np.float32))
    pixels = rng.integers(0, 256, (60000, 1, 28, 28)).astype(np.uint8)
    train = data.ArrayDataset(pixels, rng.integers(0, 10, 60000), 1 / 255, -0.5)
    volume = (train.images.nbytes + train.labels.nbytes) / 1e6
    print(f"\nms an epoch, {volume:.1f} MB of images and labels")
    results = []
    cycnn.set_precision("tf32")
    for name, streams, capture in (
        ("on the GPU, recorded", False, True),
        ("streams, recorded", True, True),
        ("streams, eager", True, False),
    ):
        seconds, state = epochs(train, streams, capture)
        print(f"tf32  {name:<28} {1e3 * seconds:8.1f}", flush=True)
        results.append(state)
    same = all(np.array_equal(results[0][k], results[1][k]) for k in results[0])
    print("same bits of all parameters:", "yes" if same else "NO")


if __name__ == "__main__":
    main()
