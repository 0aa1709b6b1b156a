"""Augmented and normalised batches: operations, loaders, training."""

import numpy as np
import pytest
from cycnn.tensor import Tensor
from training import digest, figures, make_trainer, patterns

from cycnn import data
from cycnn.errors import DataError, ShapeError
from cycnn.ops import Augmentation, cpu, reference
from cycnn.ops import reference_augment as drawing

KEY = reference.augment_key(2**40 + 7, 3, None)
WAYS = {
    "none": None,
    "nothing": Augmentation(),
    "shift": Augmentation(shift=(2, 3)),
    "flip": Augmentation(flip=True),
    "cutout": Augmentation(cutout=3),
    "rotation": Augmentation(rotation=0.3),
    "quarter": Augmentation(rotation=1.57),
    "zoom": Augmentation(zoom=0.5),
    "all": Augmentation((1, 2), True, 0.2, 0.1, 4),
}
SHAPES = [(7, 3, 9, 6), (1, 1, 1, 1), (3, 2, 33, 31), (40, 1, 5, 5)]


def images(shape, dtype="uint8", seed=0):
    made = np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)
    return made if dtype == "uint8" else made / np.float32(17)


def given(shape, dtype="uint8", n=None):
    """Images, rows, numbers of samples, scale and shift."""
    rng = np.random.default_rng(1)
    n = shape[0] if n is None else n
    return (
        images(shape, dtype),
        rng.integers(0, shape[0], n).astype(np.int32),
        rng.integers(0, 60000, n).astype(np.int32),
        rng.uniform(0.01, 0.02, shape[1]).astype(np.float32),
        rng.uniform(-1, 1, shape[1]).astype(np.float32),
    )


def augmented(ops, place, x, index, samples, scale, shift, ways, key=KEY):
    return ops.augment_images(
        place(x), place(index), place(samples), place(key), place(scale), place(shift),
        ways,
    )  # fmt: skip


def on_cpu(array):
    return Tensor(array, "cpu")


def check(ops, place, shape, ways, dtype):
    x, index, samples, scale, shift = given(shape, dtype, n=2 * shape[0] + 1)
    found = augmented(ops, place, x, index, samples, scale, shift, ways).numpy()
    want = augmented(reference, np.asarray, x, index, samples, scale, shift, ways)
    assert found.shape == want.shape
    # coordinates are rounded to float32, and a pixel's neighbours differ by 255
    turned = ways is not None and (ways.rotation or ways.zoom)
    atol = 255 * 0.02 * max(shape) * 1e-5 if turned else 1e-5
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=atol)
    return found


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", WAYS)
def test_augment_images(case, shape, dtype):
    check(cpu, on_cpu, shape, WAYS[case], dtype)


def test_of_nothing():
    x, index, samples, scale, shift = given((3, 2, 4, 4), n=0)
    for ways in WAYS.values():
        found = augmented(cpu, on_cpu, x, index, samples, scale, shift, ways)
        assert found.shape == (0, 2, 4, 4)


def test_each_way_by_hand():
    x = images((1, 1, 4, 5)) + np.uint8(0)
    plain = x[0, 0].astype(np.float32)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    row = np.zeros(1, np.int32)
    seen = set()
    for sample in range(60):
        sample = np.array([sample], np.int32)
        ways = Augmentation(shift=(1, 2), flip=True, cutout=2)
        way = drawing._draw_ways(sample, KEY, ways, 4, 5)
        down, right = int(way.down[0]), int(way.right[0])
        want = np.zeros((4, 5), np.float32)
        for h in range(4):
            for w in range(5):
                if 0 <= h - down < 4 and 0 <= w - right < 5:
                    want[h, w] = plain[h - down, w - right]
        if way.mirrored[0]:
            want = want[:, ::-1].copy()
        top, left = int(way.top[0]), int(way.left[0])
        want[max(top, 0) : max(top + 2, 0), max(left, 0) : max(left + 2, 0)] = 0
        found = augmented(cpu, on_cpu, x, row, sample, one, zero, ways).numpy()
        np.testing.assert_array_equal(found[0, 0], want)
        seen.add((down, right, bool(way.mirrored[0])))
    assert {d for d, _, _ in seen} == {-1, 0, 1}
    assert {r for _, r, _ in seen} == {-2, -1, 0, 1, 2}
    assert {m for _, _, m in seen} == {False, True}


def test_a_quarter_turn_is_one():
    """With the largest angle that is drawn, a square turns onto itself."""
    x = np.arange(25, dtype=np.uint8).reshape(1, 1, 5, 5)
    samples = np.arange(4000, dtype=np.int32)
    ways = Augmentation(rotation=float(np.pi / 2))
    way = drawing._draw_ways(samples, KEY, ways, 5, 5)
    angle = np.arctan2(way.b, way.a)
    # sine and cosine are those of an angle, up to the polynomial's error
    np.testing.assert_allclose(way.a**2 + way.b**2, 1, atol=2e-5)
    assert angle.min() < -1.5 and angle.max() > 1.5
    at = int(angle.argmax())
    found = augmented(
        cpu, on_cpu, x, np.zeros(1, np.int32), samples[at : at + 1],
        np.ones(1, np.float32), np.zeros(1, np.float32), ways,
    ).numpy()  # fmt: skip
    turned = [np.rot90(x[0, 0], k) for k in (1, 3)]
    assert min(np.abs(found[0, 0, 1:4, 1:4] - t[1:4, 1:4]).max() for t in turned) < 0.1


def test_numbers_are_uniform_and_independent():
    samples = np.arange(20000, dtype=np.int32)
    ways = Augmentation((2, 2), True, 1.0, 0.5, 2)
    way = drawing._draw_ways(samples, KEY, ways, 16, 16)
    for values, count in ((way.down, 5), (way.right, 5), (way.top, 16), (way.left, 16)):
        share = np.bincount(values - values.min(), minlength=count) / len(samples)
        np.testing.assert_allclose(share, 1 / count, atol=0.012)
    assert abs(way.mirrored.mean() - 0.5) < 0.012
    zoom = 1 / np.hypot(way.a, way.b)
    angle = np.arctan2(way.b, way.a)
    assert abs(zoom.mean() - 1) < 0.012 and abs(angle.mean()) < 0.02
    many = np.array([way.down, way.right, way.mirrored, way.top, way.left, zoom, angle])
    links = np.corrcoef(many) - np.eye(len(many))
    assert np.abs(links).max() < 0.03
    others = [reference.augment_key(*each, None) for each in ((8, 0), (7, 1), (7, 0))]
    assert len({tuple(key) for key in others}) == 3


def test_refused():
    x, index, samples, scale, shift = given((3, 2, 4, 4))
    ways = Augmentation(flip=True)
    with pytest.raises(ShapeError, match=r"scale has shape \(3,\)"):
        augmented(cpu, on_cpu, x, index, samples, np.ones(3, np.float32), shift, ways)
    with pytest.raises(ShapeError, match="samples have shape"):
        augmented(cpu, on_cpu, x, index, samples[:1], scale, shift, ways)
    with pytest.raises(ShapeError, match="expected 4 axes"):
        augmented(cpu, on_cpu, x[0], index, samples, scale, shift, ways)
    with pytest.raises(DataError, match=r"index\[0\] is 3"):
        augmented(cpu, on_cpu, x, index * 0 + 3, samples, scale, shift, ways)
    with pytest.raises(ValueError, match="samples and key"):
        cpu.augment_images(
            on_cpu(x), on_cpu(index), None, None, on_cpu(scale), on_cpu(shift), ways
        )
    for name, value, error in (
        ("shift", -1, ValueError),
        ("shift", 2**20, ValueError),
        ("flip", 0.5, TypeError),
        ("rotation", 91, ValueError),
        ("rotation", float("nan"), ValueError),
        ("zoom", 1, ValueError),
        ("zoom", "x", TypeError),
        ("cutout", 1.5, TypeError),
        ("cutout", -1, ValueError),
    ):
        with pytest.raises(error, match=f"{name}|million"):
            data.Augment(**{name: value})
    with pytest.raises(TypeError, match="augment is a cycnn.data.Augment"):
        data.DataLoader(patterns(4), 2, device="cpu", augment=True)
    rows = data.ArrayDataset(np.ones((4, 3), np.float32), np.zeros(4, np.int32))
    with pytest.raises(DataError, match="cannot be augmented"):
        data.DataLoader(rows, 2, device="cpu", augment=data.Augment())


def test_samples_of_step():
    order = np.array([4, 2, 0, 1, 3], np.int32)
    for taken, count, want in ((2, 2, [4, 2]), (4, 2, [0, 1]), (6, 1, [3])):
        position = np.array([taken, 1], np.int32)
        assert reference.samples_of_step(order, position, 2, count).tolist() == want
        found = cpu.samples_of_step(on_cpu(order), on_cpu(position), 2, count)
        assert found.numpy().tolist() == want
    beyond = reference.samples_of_step(order, np.array([7, 0], np.int32), 4, 4)
    assert beyond.tolist() == [1, 3, -1, -1]


# loaders and sets

EVERYTHING = data.Augment(shift=1, flip=True, rotation=20, zoom=0.1, cutout=2)


def colours(count=50):
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (count, 3, 6, 6)).astype(np.uint8)
    return data.ArrayDataset(pixels // [[[1]], [[2]], [[3]]], np.arange(count))


def epoch_of(loader, epoch):
    loader.set_epoch(epoch)
    batches = list(loader)
    labels = np.concatenate([y.numpy() for _, y in batches])
    x = np.concatenate([x.numpy() for x, _ in batches])
    return x[np.argsort(labels)]


def test_an_image_changes_with_seed_and_epoch_alone():
    train = colours()

    def loader(batch_size=7, shuffle=True, seed=5, augment=EVERYTHING):
        return data.DataLoader(train, batch_size, shuffle, False, seed, "cpu", augment)

    want = epoch_of(loader(), 2)
    np.testing.assert_array_equal(epoch_of(loader(batch_size=50), 2), want)
    np.testing.assert_array_equal(epoch_of(loader(shuffle=False), 2), want)
    assert not np.array_equal(epoch_of(loader(), 3), want)
    assert not np.array_equal(epoch_of(loader(seed=6), 2), want)
    plain = epoch_of(loader(augment=None), 2)
    np.testing.assert_array_equal(plain, train.images.astype(np.float32))
    assert not np.array_equal(plain, want)


def test_two_epochs_at_once_do_not_disturb_each_other():
    loader = data.DataLoader(
        colours(), 10, True, seed=5, device="cpu", augment=EVERYTHING
    )
    want = [[x.numpy() for x, _ in loader] for _ in range(2)]
    loader.set_epoch(0)
    for (a, _), (b, _), *wanted in zip(iter(loader), iter(loader), *want):
        np.testing.assert_array_equal(a.numpy(), wanted[0])
        np.testing.assert_array_equal(b.numpy(), wanted[1])


def test_normalised_by_channel():
    train = colours()
    mean, std = data.channel_statistics(train)
    for made in train.normalised(), train.normalised(mean, std):
        assert made.images is train.images or np.shares_memory(
            made.images, train.images
        )
        (x, _), = data.DataLoader(made, 50, device="cpu")  # fmt: skip
        x = x.numpy().astype(np.float64)
        np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-6)
        np.testing.assert_allclose(x.std((0, 2, 3)), 1, atol=1e-6)
        want = (train.images - mean[:, None, None]) / std[:, None, None]
        np.testing.assert_allclose(x, want, atol=1e-5)
    assert made[:3].scale == made.scale
    assert "scale=(0.01" in repr(made)
    rows = data.ArrayDataset(np.eye(4, 3, dtype=np.float32), np.zeros(4, np.int32))
    (x, _), = data.DataLoader(rows.normalised(), 4, device="cpu")  # fmt: skip
    assert x.shape == (4, 3)
    np.testing.assert_allclose(x.numpy().mean(0), 0, atol=1e-6)
    with pytest.raises(DataError, match="channel 1 has standard deviation 0"):
        train.normalised(mean, [1, 0, 1])
    with pytest.raises(TypeError, match="both"):
        train.normalised(mean)
    with pytest.raises(DataError, match="scale has 2 numbers"):
        data.ArrayDataset(train.images, train.labels, [1, 2])
    with pytest.raises(ValueError, match="finite"):
        data.ArrayDataset(train.images, train.labels, [1, 2, np.inf])


# training


def fitted(capture, augment, normalise=False, **settings):
    trainer = make_trainer()
    trainer.capture = capture
    train, test = patterns(70), patterns(30, seed=1)
    if normalise:
        train = train.normalised()
        test = test.normalised(*data.channel_statistics(patterns(70)))
    history = trainer.fit(train, 2, 16, seed=9, test=test, augment=augment, **settings)
    assert trainer.evaluate(test)["loss"] == pytest.approx(history[-1].test_loss)
    return digest(trainer), figures(history)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("augment", [None, EVERYTHING])
def test_a_recorded_step_trains_as_an_eager_one(augment, normalise):
    eager = fitted(False, augment, normalise)
    assert fitted(True, augment, normalise) == eager
    if augment is not None:
        assert fitted(True, None, normalise)[0] != eager[0]


def test_a_run_goes_on_with_the_same_images(tmp_path):
    whole = fitted(True, EVERYTHING)[0]
    trainer = make_trainer()
    trainer.fit(patterns(70), 2, 16, seed=9, augment=EVERYTHING, callbacks=[Stop()])
    trainer.save(tmp_path / "run.safetensors")
    other = make_trainer()
    other = type(other).resume(
        tmp_path / "run.safetensors", other.model, other.loss, other.optimizer,
        other.schedule,
    )  # fmt: skip
    other.fit(patterns(70), 2, 16, augment=EVERYTHING)
    assert digest(other) == whole


class Stop:
    def on_epoch_end(self, trainer, record):
        trainer.stop()
