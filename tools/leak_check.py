"""Use a device as a program would, then give everything back.

Run under ``compute-sanitizer --tool memcheck --leak-check full``: what is reported as
leaked was still allocated when the context went.
"""

from __future__ import annotations

import argparse
import gc

import numpy as np

import cycnn
from cycnn import data, nn, optim


def digits() -> data.ArrayDataset:
    """As many as make an odd last batch."""
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (20, 1, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 20, dtype=np.int32)
    return data.ArrayDataset(images, labels, scale=1 / 255)


def train_by_hand(device) -> float:
    """An epoch, operation by operation, then a prediction; the last loss."""
    batches = data.DataLoader(digits(), 8, shuffle=True, device=device)
    model = nn.reference_network().to(device)
    loss = nn.NLLLoss()
    optimizer = optim.RMSprop(model.parameters(), lr=0.003, momentum=0.5)
    value = float("nan")
    for x, y in batches:
        value = float(loss(model(x), y))
        model.backward(loss.backward())
        optimizer.step()
    model.eval()
    model(next(iter(batches))[0]).numpy()
    return value


def train(device) -> float:
    """Some epochs of Trainer, with graphs and fused layers where there are some."""
    model = nn.reference_network().to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    trainer = cycnn.Trainer(model, nn.NLLLoss(), optimizer)
    trainer.fit(digits(), epochs=3, batch_size=8)
    trainer.predict(digits())
    return trainer.evaluate(digits())["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    cycnn.manual_seed(1)
    losses = train_by_hand(device), train(device)
    gc.collect()
    cycnn.shutdown(reset=True)
    if not np.isfinite(losses).all():
        raise SystemExit(f"the losses are {losses}")


if __name__ == "__main__":
    main()
