"""Mean and standard deviation of the channels."""

import numpy as np
import pytest

from cycnn import DataError
from cycnn.data import ArrayDataset, DataLoader, channel_statistics, statistics


def make(images, **options):
    return ArrayDataset(images, np.zeros(len(images), int), **options)


@pytest.mark.parametrize("shape", [(50, 3, 7, 5), (50, 1, 7, 5), (50, 4), (1, 2, 3, 3)])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("chunk", [1, 200, 1 << 18])
def test_equal_to_numpy(shape, dtype, chunk, monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK", chunk)
    images = np.random.default_rng(0).integers(0, 256, shape).astype(dtype)
    mean, std = channel_statistics(make(images, scale=3.0, shift=1.0))
    axes = (0, *range(2, len(shape)))
    assert (
        mean.dtype == std.dtype == np.float64 and mean.shape == std.shape == shape[1:2]
    )
    np.testing.assert_allclose(mean, images.mean(axes, np.float64), rtol=1e-13)
    np.testing.assert_allclose(std, images.std(axes, np.float64), rtol=1e-12)


def test_a_large_mean_costs_no_digits(monkeypatch):
    monkeypatch.setattr(statistics, "_CHUNK", 64)
    images = np.full((400, 2, 4, 4), 2.0**23, np.float32)
    images[::2, 1] += 1
    mean, std = channel_statistics(make(images))
    assert mean.tolist() == [2.0**23, 2.0**23 + 0.5] and std.tolist() == [0, 0.5]


def test_normalisation_as_the_documentation_has_it():
    images = np.random.default_rng(0).integers(30, 90, (500, 1, 8, 8)).astype(np.uint8)
    train = make(images)
    mean, std = channel_statistics(train)
    scale, shift = 1 / std.mean(), -mean.mean() / std.mean()
    train = ArrayDataset(train.images, train.labels, scale, shift)
    [(batch, _)] = DataLoader(train, 500, device="cpu")
    assert abs(batch.numpy().mean()) < 1e-5 and abs(batch.numpy().std() - 1) < 1e-5


def test_an_empty_set_has_none():
    with pytest.raises(DataError, match=r"0 images of shape \(3, 2, 2\)"):
        channel_statistics(make(np.zeros((0, 3, 2, 2), np.uint8)))
