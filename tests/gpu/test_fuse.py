"""Fused layers on a GPU: they train as the layers that they replace."""

import numpy as np
import pytest
from training import digest, figures, patterns

import cycnn
from cycnn import nn, optim

pytestmark = pytest.mark.gpu


# Of the norm: what a layer's rounding of its operands may become over a network of them,
# in which a rounded activation may also fall to the other side of a ReLU.
TOLERANCE = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1.5e-1}

NETWORKS = {
    "reference": (nn.reference_network, (33, 1, 28, 28)),
    "one image": (nn.reference_network, (1, 1, 28, 28)),
    "LeNet-5": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
            nn.Linear(84, 10), nn.LogSoftmax(),
        ),
        (31, 1, 28, 28),
    ),
    "small end": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 40, 5, stride=4), nn.ReLU(), nn.MaxPool2d(2),
            nn.Sigmoid(),
            nn.Conv2d(40, 128, 2, stride=2, bias=False), nn.Flatten(),
            nn.Linear(128, 33), nn.ReLU(), nn.Linear(33, 10, bias=False),
            nn.LogSoftmax(),
        ),
        (21, 1, 28, 28),
    ),
    "colour, strided, odd": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 13, 7, stride=2, padding=3, bias=False), nn.ReLU(),
            nn.Conv2d(13, 24, 1), nn.MaxPool2d(2),
            nn.Conv2d(24, 31, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3),
            nn.Conv2d(31, 8, (2, 1)), nn.Sigmoid(),
            nn.Flatten(), nn.Linear(16, 10), nn.LogSoftmax(),
        ),
        (9, 3, 33, 31),
    ),
}  # fmt: skip


def close(found, expected, precision):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < TOLERANCE[precision]  # NaN is not


def one_step(model, objective, x, labels):
    scores, value = objective.forward(x, labels)
    objective.backward()
    grads = [p.grad.numpy() for p in model.parameters()]
    for p in model.parameters():
        p.grad.fill_(np.nan)
    return [scores.numpy(), value.numpy().mean(), *grads]


@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_is_that_of_the_unfused_layers(network, precision):
    make, shape = NETWORKS[network]
    cycnn.manual_seed(3)
    model = make().to("cuda")
    rng = np.random.default_rng(4)
    # multiples of 1/8 and 1/64: no two candidates of a pooling window nearly tie
    x = cycnn.Tensor(np.round(8 * rng.standard_normal(shape)) / 8, "cuda")
    state = {k: np.round(v * 64) / 64 for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    labels = cycnn.Tensor(rng.integers(0, 10, shape[0]), "cuda")
    cycnn.set_precision("fp32")
    plain = one_step(model, nn.Objective(model, nn.NLLLoss()), x, labels)
    cycnn.set_precision(precision)
    together = nn.Objective(model, nn.NLLLoss(), fused=True)
    found = one_step(model, together, x, labels)
    for ours, expected in zip(found, plain):
        close(ours, expected, precision)
    again = one_step(model, together, x, labels)
    for ours, same in zip(again, found):
        np.testing.assert_array_equal(ours, same)


class Meddler:
    """Changes the filters amid an epoch, and between two."""

    def on_step_end(self, trainer):
        if trainer.step == 2:
            self.on_epoch_end(trainer)

    def on_epoch_end(self, trainer, record=None):
        state = trainer.model.state_dict()
        trainer.model.load_state_dict({k: v * 0.9 for k, v in state.items()})


def trained(train, epochs, batch_size, capture, **options):
    cycnn.manual_seed(0)
    model = nn.reference_network().to("cuda")
    optimizer = optim.RMSprop(model.parameters(), lr=0.001, initial_accumulator=1e-3)
    trainer = cycnn.Trainer(
        model, nn.NLLLoss(), optimizer, optim.schedules.linear(), capture, fuse=True
    )
    history = trainer.fit(train, epochs, batch_size, seed=1, **options)
    return figures(history), digest(trainer)


# The last batch of 44 has another plan than those of 128, one of 72 has the same. With
# ten batches, eight steps are one graph.
@pytest.mark.long
@pytest.mark.parametrize(
    "images, callbacks", [(300, []), (328, []), (1300, []), (300, [Meddler()])]
)
def test_captured_equals_eager(precision, images, callbacks):
    train = patterns(images, side=28, classes=10)
    results = [
        trained(train, 3, 128, capture, test=train, callbacks=callbacks)
        for capture in (False, True, True)
    ]
    assert results[0] == results[1] == results[2]


def test_captured_equals_eager_in_three_steps(precision):
    """Short enough for racecheck: one step runs, one is recorded, one is of 8 images."""
    train = patterns(40, side=28, classes=10)
    eager, captured = (trained(train, 1, 16, capture) for capture in (False, True))
    assert captured == eager
