"""Use a GPU as a program would, then give everything back.

Run under ``compute-sanitizer --tool memcheck --leak-check full``: what is reported as
leaked was still allocated when the context went.
"""

from __future__ import annotations

import gc

import numpy as np

import cycnn
from cycnn import data, nn, optim


def train() -> float:
    """A short epoch with an odd last batch, then an evaluation; the last loss."""
    cycnn.manual_seed(1)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (20, 1, 28, 28), dtype=np.uint8)
    labels = rng.integers(0, 10, 20, dtype=np.int32)
    batches = data.DataLoader(
        data.ArrayDataset(images, labels, scale=1 / 255), 8, shuffle=True, device="cuda"
    )
    model = nn.reference_network().to("cuda")
    loss = nn.NLLLoss()
    optimizer = optim.RMSprop(model.parameters(), lr=0.003, momentum=0.5)
    value = float("nan")
    for x, y in batches:
        value = float(loss(model(x), y))
        model.backward(loss.backward())
        optimizer.step()
    model.eval()
    model(images[:3] / np.float32(255)).numpy()
    return value


def main() -> None:
    value = train()
    gc.collect()
    cycnn.shutdown(reset=True)
    if not np.isfinite(value):
        raise SystemExit(f"the loss is {value}")


if __name__ == "__main__":
    main()
