"""Augmented batches on a GPU: those of the CPU, bit for bit, recorded and streamed."""

import numpy as np
import pytest
from test_augment import (
    EVERYTHING,
    SHAPES,
    WAYS,
    augmented,
    check,
    colours,
    given,
    on_cpu,
)
from training import digest, figures, patterns

import cycnn
from cycnn import Tensor, data, nn, optim
from cycnn.ops import cpu, reference

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


def on_gpu(array):
    return Tensor(array, "cuda")


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [*SHAPES, (257, 1, 28, 28)], ids=str)
@pytest.mark.parametrize("case", WAYS)
def test_the_same_bits_as_on_the_cpu(ops, case, shape, dtype):
    found = check(ops, on_gpu, shape, WAYS[case], dtype)
    x, index, samples, scale, shift = given(shape, dtype, n=2 * shape[0] + 1)
    here = augmented(cpu, on_cpu, x, index, samples, scale, shift, WAYS[case])
    np.testing.assert_array_equal(found.view(np.int32), here.numpy().view(np.int32))


def test_of_nothing_and_out_of_range(ops):
    x, index, samples, scale, shift = given((3, 2, 4, 4), n=0)
    for ways in WAYS.values():
        found = augmented(ops, on_gpu, x, index, samples, scale, shift, ways)
        assert found.shape == (0, 2, 4, 4)
    x, index, samples, scale, shift = given((3, 2, 4, 4), n=3)
    index[:] = 2, 3, -1
    for ways in WAYS.values():
        found = augmented(ops, on_gpu, x, index, samples, scale, shift, ways).numpy()
        assert np.isfinite(found[0]).all()
        assert np.isnan(found[1:]).all()


def test_samples_of_step(ops):
    order = np.random.default_rng(0).permutation(257).astype(np.int32)
    for taken, size, count in (33, 33, 33), (264, 33, 26), (7, 31, 31), (300, 64, 64):
        position = np.array([taken, 1], np.int32)
        want = reference.samples_of_step(order, position, size, count)
        found = ops.samples_of_step(on_gpu(order), on_gpu(position), size, count)
        np.testing.assert_array_equal(found.numpy(), want)


@pytest.mark.parametrize("augment", [None, EVERYTHING])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_loader_makes_the_batches_of_the_cpu(monkeypatch, streamed, augment):
    train = colours().normalised()

    def batches(device):
        loader = data.DataLoader(train, 8, True, seed=4, device=device, augment=augment)
        return [(x.numpy(), y.numpy()) for _ in range(2) for x, y in loader]

    here = batches("cpu")
    if streamed:
        monkeypatch.setattr(data.DataLoader, "resident", lambda self: None)
    there = batches("cuda")
    assert len(here) == len(there) == 14
    for (x, labels), (on_x, on_labels) in zip(here, there):
        np.testing.assert_array_equal(on_labels, labels)
        np.testing.assert_array_equal(on_x.view(np.int32), x.view(np.int32))


def network():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(32, 4), nn.LogSoftmax(),
    )  # fmt: skip


def fitted(capture, fuse, augment, normalise):
    cycnn.manual_seed(4)
    model = network().to("cuda")
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    trainer = cycnn.Trainer(model, nn.NLLLoss(), optimizer, capture=capture, fuse=fuse)
    train, test = patterns(500), patterns(70, seed=1)
    if normalise:
        mean, std = data.channel_statistics(train)
        train, test = train.normalised(mean, std), test.normalised(mean, std)
    history = trainer.fit(train, 3, 16, seed=9, test=test, augment=augment)
    return digest(trainer), figures(history)


@pytest.mark.long
@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("augment", [None, EVERYTHING])
def test_streamed_trains_as_resident(monkeypatch, augment, normalise, fuse):
    """Recorded steps: several epochs, several steps in one graph, a smaller last one.

    Without either, streamed steps are tested elsewhere.
    """
    resident = fitted(True, fuse, augment, normalise)
    if not fuse:
        assert fitted(False, fuse, augment, normalise) == resident
    monkeypatch.setattr(data.DataLoader, "resident", lambda self: None)
    assert fitted(True, fuse, augment, normalise) == resident
