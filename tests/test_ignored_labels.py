"""Images whose label is to be ignored, in data sets and a Trainer."""

import numpy as np
import pytest
from training import CLASSES, digest, figures, patterns

import cycnn
from cycnn import DataError, Trainer, nn, optim
from cycnn.data import ArrayDataset, TargetDataset, load_npz

WHOLE = patterns(200)
STEPS = 7  # an epoch of it in batches of 32: six full ones and one of 8
IGNORED = np.random.default_rng(3).random(len(WHOLE)) < 0.4


def partly(label, of=WHOLE, ignored=IGNORED, **options):
    """The set, where some images have no label but this one."""
    labels = np.where(ignored, label, of.labels)
    return ArrayDataset(of.images, labels, of.scale, of.shift, **options)


def trainer_of(ignore_index, lr=0.01, **options):
    cycnn.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(*model, nn.Linear(64, CLASSES)).to("cpu")
    loss = nn.CrossEntropyLoss(ignore_index=ignore_index)
    optimizer = optim.Adam(model.parameters(), lr)
    return Trainer(model, loss, optimizer, optim.schedules.linear(), **options)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("label", [-100, -1, 255])
def test_they_neither_train_nor_count(label, capture):
    train = partly(label, ignore_index=label)
    assert train.classes == CLASSES
    trainer = trainer_of(label, capture=capture)
    history = trainer.fit(train, 12, 32, seed=1, test=train)
    right = trainer.predict(train) == WHOLE.labels
    # of those that have a label
    assert history[-1].test_accuracy == right[~IGNORED].mean() > 0.9
    assert trainer.evaluate(train, 30)["accuracy"] == history[-1].test_accuracy
    # in batches of all images, those without may as well not be there
    few = ArrayDataset(WHOLE.images[~IGNORED], WHOLE.labels[~IGNORED])
    few.scale, few.shift = WHOLE.scale, WHOLE.shift
    losses = []
    for dataset in train, few:
        alone = trainer_of(label, capture=capture)
        losses.append(alone.fit(dataset, 3, len(dataset), shuffle=False)["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-4)


def test_the_loss_alone_may_say_so():
    found = [
        figures(trainer_of(255).fit(dataset, 2, 32, seed=1, test=dataset))
        for dataset in (partly(255), partly(255, ignore_index=255))
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("shuffle", [False, True])
def test_amid_an_epoch_those_so_far_count(shuffle, tmp_path):
    train, found = partly(-100, ignore_index=-100), []
    trainer = trainer_of(-100, lr=0.0)
    hits = trainer.predict(train) == train.labels
    orders = []
    for epoch in range(2):
        order = np.arange(len(train))
        if shuffle:
            order = cycnn.ops.for_device(cycnn.device("cpu")).permutation(
                len(train), 1, epoch, cycnn.device("cpu")
            )
        orders.append(np.asarray(order))

    class Watcher:
        def on_step_end(self, trainer):
            found.append(trainer.running()["accuracy"])
            if trainer.step == 3:
                trainer.save(tmp_path / "run")

    history = trainer.fit(train, 2, 32, seed=1, shuffle=shuffle, callbacks=[Watcher()])
    want = [
        hits[order[: 32 * (step + 1)]].sum()
        / np.count_nonzero(~IGNORED[order[: 32 * (step + 1)]])
        for order in orders
        for step in range(STEPS)
    ]
    assert found == want and history[-1].accuracy == want[-1]
    again = trainer_of(-100)
    again = Trainer.resume(tmp_path / "run", again.model, again.loss, again.optimizer,
                           optim.schedules.linear())  # fmt: skip
    resumed = again.fit(train, 2, 32, seed=1, shuffle=shuffle)
    assert figures(resumed) == figures(history) and digest(again) == digest(trainer)


def test_of_a_real_class_the_accuracy_is_over_all():
    trainer = trainer_of(2)
    trainer.fit(WHOLE, 2, 32, seed=1)
    right = trainer.predict(WHOLE) == WHOLE.labels
    assert trainer.evaluate(WHOLE)["accuracy"] == right.mean()


def test_nothing_but_ignored_images():
    dataset = partly(-100, ignored=np.ones(200, bool), ignore_index=-100)
    assert dataset.classes == 0
    figures_of = trainer_of(-100).evaluate(dataset)
    assert np.isnan(figures_of["accuracy"]) and np.isnan(figures_of["loss"])


@pytest.mark.parametrize(
    "make, ignore_index, message",
    [
        # what the set ignores and the loss does not, or another label
        (lambda: partly(-100, ignore_index=-100), None, "give it ignore_index=-100"),
        (lambda: partly(255, ignore_index=255), -100, "give it ignore_index=255"),
        # labels that nobody ignores
        (lambda: partly(255), None, "labels up to 255|label 255"),
        (lambda: partly(255), -100, "labels up to 255|label 255"),
        (lambda: partly(255, partly(77, ignored=IGNORED[::-1])), 255, "up to 77|l 77"),
    ],
)
def test_other_labels_are_refused_before_anything_changes(make, ignore_index, message):
    trainer = trainer_of(ignore_index)
    before = digest(trainer)
    for use in (lambda: trainer.fit(make(), 1, 32), lambda: trainer.evaluate(make())):
        with pytest.raises(DataError, match=message):
            use()
    assert digest(trainer) == before and not len(trainer.history)


def test_data_sets():
    images = np.zeros((4, 2, 2), np.uint8)
    dataset = ArrayDataset(images, [0, -100, 2, -100], ignore_index=-100)
    assert dataset.classes == 3 and dataset.ignore_index == -100
    assert "3 classes, ignore_index=-100, scale=1" in repr(dataset)
    part = dataset[1:].normalised([0.5], [2])
    assert part.ignore_index == -100 and part.labels.tolist() == [-100, 2, -100]
    assert ArrayDataset(images, [0, 255, 1, 1]).classes == 256
    # of unsigned bytes none is -100
    labels = np.array([0, 255, 1, 1], np.uint8)
    assert ArrayDataset(images, labels, ignore_index=-100).classes == 256
    assert ArrayDataset(images, labels, ignore_index=255).classes == 2
    assert TargetDataset(images[:, None]).ignore_index is None
    with pytest.raises(DataError, match="label 1 is -1: expected a class from 0 to 2"):
        ArrayDataset(images, [0, -1, 2, -100], ignore_index=-100)
    with pytest.raises(DataError, match="label 3 is 9: expected a class from 0 to 4"):
        ArrayDataset(images, [0, 7, 2, 9], classes=5, ignore_index=7)
    with pytest.raises(ValueError, match="ignore_index is 4294967296: labels"):
        ArrayDataset(images, [0, 1, 2, 3], ignore_index=2**32)
    with pytest.raises(TypeError):
        ArrayDataset(images, [0, 1, 2, 3], ignore_index=1.5)


def test_archives(tmp_path):
    np.savez(tmp_path / "set.npz", x=np.zeros((2, 3, 3), np.uint8), y=[-1, 1])
    dataset = load_npz(tmp_path / "set.npz", ignore_index=-1)
    assert dataset.labels.tolist() == [-1, 1] and dataset.classes == 2
    with pytest.raises(DataError, match="label 0 is -1"):
        load_npz(tmp_path / "set.npz")
