"""Training on numbers: data sets of targets, loaders, trainers, recorded steps."""

import io

import numpy as np
import pytest

import cycnn
from cycnn import Trainer, data, devices, nn, optim
from cycnn.errors import DataError
from cycnn.train.progress import ProgressBar


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def regression(count=100, own=False):
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (count, 1, 3, 4), dtype=np.uint8)
    flat = images.reshape(count, 12) / 255
    targets = np.stack([flat.sum(1), flat[:, 0] - flat[:, 5]], 1)
    return data.TargetDataset(images, None if own else targets, 1 / 255)


def model_of(own=False):
    cycnn.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 2)]
    if own:
        layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 1)]
    return nn.Sequential(*layers)


def trainer_of(loss, own=False, **options):
    model = model_of(own)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    return Trainer(model, loss, optimizer, **options)


def test_batches_hold_the_targets_of_their_images():
    dataset = regression()
    loader = data.DataLoader(dataset, 32, shuffle=True, seed=1)
    order = loader.order(0).numpy()
    at = 0
    for images, targets in loader:
        rows = order[at : at + len(images)]
        np.testing.assert_array_equal(targets.numpy(), dataset.targets[rows])
        np.testing.assert_allclose(images.numpy(), dataset.images[rows] / 255, 1e-6)
        at += len(images)
    assert at == 100


def test_images_can_be_their_own_targets():
    dataset = regression(own=True)
    assert dataset.targets is None and dataset[:7].targets is None
    for images, targets in data.DataLoader(dataset[:7], 4):
        assert targets is images


def test_slices_and_repr():
    part = regression()[10:20]
    assert isinstance(part, data.TargetDataset) and len(part) == 10
    np.testing.assert_array_equal(part.targets, regression().targets[10:20])
    assert "targets: shape (2,)" in repr(part)
    assert "targets: themselves" in repr(regression(own=True))
    one = data.TargetDataset(np.zeros((3, 2), np.float32), np.arange(3))
    assert one.targets.dtype == np.float32 and one.targets.shape == (3,)


def test_channels_have_scales_of_their_own():
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (9, 2, 3, 4), dtype=np.uint8)
    for targets in rng.standard_normal((9, 5), np.float32), None:
        dataset = data.TargetDataset(images, targets).normalised([0.5, 1], [2, 4])
        assert "scale=(0.5, 0.25), shift=(-0.25, -0.25))" in repr(dataset)
        scales = data.TargetDataset(images, targets, (0.5, 0.25), -0.25)
        assert repr(scales) == repr(dataset)
        expected = images * np.float32([[[0.5]], [[0.25]]]) - np.float32(0.25)
        for loader in data.DataLoader(dataset, 9), data.DataLoader(scales, 9):
            x, y = next(iter(loader))
            np.testing.assert_allclose(x.numpy(), expected, 1e-6)
            np.testing.assert_array_equal(
                y.numpy(), x.numpy() if targets is None else targets
            )


@pytest.mark.parametrize(
    "targets, error, message",
    [
        (np.zeros((4, 2)), DataError, r"5 images but targets of shape \(4, 2\)"),
        (np.array([0, 1, np.nan, 0, 0]), DataError, "target 2 holds nan"),
        (np.array([0, 1, 1e300, 0, 0]), DataError, "target 2 holds inf"),
        (np.array(["a"] * 5), TypeError, "targets of dtype"),
        (1.0, DataError, "single number"),
    ],
)
def test_targets_that_are_refused(targets, error, message):
    with pytest.raises(error, match=message):
        data.TargetDataset(np.zeros((5, 3)), targets)


@pytest.mark.parametrize("own", [False, True], ids=["numbers", "autoencoder"])
@pytest.mark.parametrize("loss", [nn.MSELoss, nn.SmoothL1Loss], ids=["mse", "huber"])
def test_recorded_steps_are_eager_steps(loss, own):
    histories, weights = [], []
    for capture in (False, True):
        for fuse in (False, True):
            trainer = trainer_of(loss(), own, capture=capture, fuse=fuse)
            histories.append(
                trainer.fit(
                    regression(own=own), 6, 32, seed=5, test=regression(own=own)
                )
            )
            weights.append(trainer.model.state_dict())
    for history, state in zip(histories[1:], weights[1:]):
        for name in ("loss", "test_loss", "accuracy", "test_accuracy"):
            assert history[name] == histories[0][name]
        for name, array in weights[0].items():
            np.testing.assert_array_equal(state[name], array)
    assert histories[0][-1].loss < 0.5 * histories[0][0].loss
    assert histories[0][-1].accuracy is None


def test_an_epochs_loss_is_the_mean_over_all_elements():
    dataset, trainer = regression(), trainer_of(nn.MSELoss())
    found = trainer.evaluate(dataset, batch_size=32)
    scores = trainer.model.predict((dataset.images / 255).astype(np.float32))
    want = np.mean((scores - dataset.targets) ** 2)
    assert found["loss"] == pytest.approx(want, rel=1e-5)
    assert found["accuracy"] is None
    empty = trainer.evaluate(dataset[:0])
    assert np.isnan(empty["loss"]) and empty["accuracy"] is None


def test_a_run_is_saved_and_resumed(tmp_path):
    path = tmp_path / "run"
    whole = trainer_of(nn.MSELoss())
    whole.fit(regression(), 4, 32, seed=5)
    half = trainer_of(nn.MSELoss())
    half.fit(regression(), 2, 32, seed=5)
    half.save(path)
    fresh = trainer_of(nn.MSELoss())
    resumed = Trainer.resume(path, fresh.model, fresh.loss, fresh.optimizer)
    resumed.fit(regression(), 4, 32, seed=5)
    assert resumed.history["loss"] == whole.history["loss"]
    for name, array in whole.model.state_dict().items():
        np.testing.assert_array_equal(resumed.model.state_dict()[name], array)


def test_a_loss_that_does_not_fit_the_data_says_so():
    for loss in (nn.CrossEntropyLoss(), nn.NLLLoss()):
        trainer = trainer_of(loss)
        with pytest.raises(TypeError, match="is of class indices, TargetDataset"):
            trainer.fit(regression(), 1, 32)
        with pytest.raises(TypeError, match="give an ArrayDataset, or a loss of"):
            trainer.evaluate(regression())
    labels = data.ArrayDataset(regression().images, np.zeros(100, int))
    with pytest.raises(TypeError, match="class indices are for"):
        trainer_of(nn.MSELoss()).fit(labels, 1, 32)


@pytest.mark.parametrize("live", [False, True])
def test_progress_shows_no_accuracy(live):
    stream = io.StringIO()
    stream.isatty = lambda: live
    trainer_of(nn.MSELoss()).fit(
        regression(), 1, 32, test=regression(), callbacks=[ProgressBar(stream)]
    )
    text = stream.getvalue()
    assert "loss" in text and "test" in text and "accuracy" not in text


@pytest.mark.parametrize("own", [False, True], ids=["numbers", "autoencoder"])
def test_losses_of_classes_with_options_train_too(own):
    dataset = data.ArrayDataset(regression().images, np.arange(100) % 2, 1 / 255)
    loss = nn.CrossEntropyLoss(weight=[1, 2], label_smoothing=0.1)
    if own:
        loss = nn.CrossEntropyLoss(ignore_index=0)
    histories = [
        trainer_of(loss, capture=capture).fit(dataset, 3, 32, seed=1)["loss"]
        for capture in (False, True)
    ]
    assert histories[0] == histories[1] and np.isfinite(histories[0]).all()
