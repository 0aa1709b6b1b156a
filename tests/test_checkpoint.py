"""Trainer.save and Trainer.resume."""

import json
import os
import signal

import numpy as np
import pytest
from training import CLASSES, digest, figures, make_model, make_trainer, patterns

import cycnn
from cycnn import DataError, Trainer, data, nn, optim
from cycnn.nn import weights
from cycnn.train import checkpoint

TRAIN = patterns(200)
TEST = patterns(50, seed=9)
LINEAR = optim.schedules.linear()


def fit(trainer, epochs=3, **options):
    return trainer.fit(TRAIN, epochs, 32, test=TEST, **options)


def resume(path, trainer, schedule=LINEAR):
    """Resume into what ``trainer`` was made of."""
    return Trainer.resume(
        path, trainer.model, trainer.loss, trainer.optimizer, schedule
    )


class SaveAt:
    """Saves after a number of steps of the run, and stops it with Ctrl-C there."""

    def __init__(self, path, steps):
        self.path, self.left = path, steps

    def on_step_end(self, trainer):
        self.left -= 1
        if self.left == 0:
            trainer.save(self.path)
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def saved(tmp_path):
    """A file with one epoch of three done."""
    trainer = make_trainer()
    trainer.fit(TRAIN, 1, 32, seed=5, test=TEST)
    path = tmp_path / "run.safetensors"
    trainer.save(path)
    return path


@pytest.mark.parametrize("momentum", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 7, 10, 21])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, steps, momentum):
    whole = make_trainer(momentum=momentum)
    fit(whole, seed=5)

    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(momentum=momentum), seed=5, callbacks=[SaveAt(path, steps)])
    other = make_trainer(momentum=momentum)
    other.model.load_state_dict(
        {k: 0 * v for k, v in other.model.state_dict().items()}
    )
    resumed = resume(path, other)
    assert resumed.epoch * 7 + resumed.step == steps
    history = fit(resumed)

    assert digest(resumed) == digest(whole)
    assert figures(history) == figures(whole.history)


def test_a_run_saved_between_epochs(tmp_path):
    path = tmp_path / "run.safetensors"
    whole = make_trainer()
    save_first = lambda trainer, record: record.epoch == 1 and trainer.save(path)
    fit(whole, seed=5, callbacks=[save_first])
    resumed = resume(path, make_trainer())
    assert (resumed.epoch, resumed.step, resumed.seed) == (1, 0, 5)
    assert figures(resumed.history) == figures(whole.history[:1])
    fit(resumed)
    assert digest(resumed) == digest(whole)


def test_the_base_of_the_schedule_is_resumed(saved):
    resumed = resume(saved, make_trainer(lr=0.5))
    assert resumed.base_lr == 0.01
    assert resumed.optimizer.lr == pytest.approx(0.01 / 7)


def test_a_finished_run_can_be_prolonged(tmp_path):
    trainer = make_trainer(schedule=None)
    fit(trainer, epochs=1, seed=5)
    trainer.save(tmp_path / "run")
    resumed = resume(tmp_path / "run", make_trainer(schedule=None), None)
    fit(resumed, epochs=3)
    whole = make_trainer(schedule=None)
    fit(whole, epochs=3, seed=5)
    assert digest(resumed) == digest(whole)


def test_an_order_that_contradicts_the_epoch_under_way(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(), seed=5, callbacks=[SaveAt(path, 3)])
    resumed = resume(path, make_trainer())
    with pytest.raises(ValueError, match="seed 5, so it cannot go on with 6"):
        fit(resumed, seed=6)


def test_a_checkpoint_says_how_images_are_augmented(tmp_path):
    path = tmp_path / "run"
    moved, turned = data.Augment(shift=2), data.Augment(rotation=10)
    whole = make_trainer()
    fit(whole, seed=5, augment=moved)
    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(), seed=5, augment=moved, callbacks=[SaveAt(path, 3)])
    resumed = resume(path, make_trainer())
    for other in (None, turned):
        with pytest.raises(ValueError, match=r"augment Augment\(shift=\(2, 2\)"):
            fit(resumed, augment=other)
    fit(resumed, augment=moved)
    assert digest(resumed) == digest(whole)


def test_a_checkpoint_of_before_it_said_so(tmp_path, monkeypatch):
    path = tmp_path / "run"
    packed = checkpoint.packed

    def packed_as_before(model, loss, optimizer, schedule, run, average):
        order = {k: v for k, v in run["order"].items() if k != "augment"}
        run = run | {"order": order}
        return packed(model, loss, optimizer, schedule, run, average)

    monkeypatch.setattr(checkpoint, "packed", packed_as_before)
    moved = data.Augment(shift=2)
    with pytest.raises(KeyboardInterrupt):
        fit(make_trainer(), seed=5, augment=moved, callbacks=[SaveAt(path, 3)])
    whole = make_trainer()
    fit(whole, seed=5, augment=moved)
    resumed = resume(path, make_trainer())
    fit(resumed, augment=moved)
    assert digest(resumed) == digest(whole)


def test_arrays_of_a_file_come_in_the_order_of_their_names(tmp_path):
    names = [f"{i % 3}.{i}" for i in range(50)]
    weights.write(tmp_path / "run", {name: np.zeros(2) for name in names})
    assert list(weights.read(tmp_path / "run")[0]) == sorted(names)


def test_a_new_run_can_be_saved(tmp_path):
    trainer = make_trainer()
    trainer.save(tmp_path / "run")
    resumed = resume(tmp_path / "run", make_trainer())
    assert resumed.seed is None and len(resumed.history) == 0
    assert digest(resumed) == digest(trainer)


def test_numbers_of_numpy(tmp_path):
    trainer = make_trainer()
    trainer.fit(TRAIN, 1, np.int32(32), seed=np.uint64(2**64 - 1))
    trainer.save(tmp_path / "run")
    assert resume(tmp_path / "run", make_trainer()).seed == 2**64 - 1


# what does not fit


def refused(path, trainer, message, schedule=LINEAR):
    before = digest(trainer)
    with pytest.raises(DataError, match=message) as caught:
        resume(path, trainer, schedule)
    assert os.fspath(path) in str(caught.value)
    assert digest(trainer) == before


def with_layers(*layers):
    cycnn.manual_seed(0)
    model = nn.Sequential(*layers).to("cpu")
    optimizer = optim.RMSprop(model.parameters(), lr=0.01)
    return Trainer(model, nn.NLLLoss(), optimizer, LINEAR)


def unsaid(path, *names):
    """Make of a file one of before it said what it says under these names."""
    tensors, metadata = weights.read(path)
    content = json.loads(metadata["cycnn"])
    for name in names:
        del content[name]
    text = json.dumps(content)
    digest = checkpoint._digest(tensors, text)
    weights.write(path, tensors, {"cycnn": text, "sha256": digest})
    return path


def test_another_model(saved):
    def models():
        conv, linear = nn.Conv2d(1, 4, 3), nn.Linear(64, CLASSES + 1)
        yield with_layers(conv, nn.ReLU(), nn.Flatten(), linear, nn.LogSoftmax())
        yield with_layers(nn.Linear(2, 2))
        conv, linear = nn.Conv2d(1, 4, 3), nn.Linear(64, CLASSES)
        yield with_layers(conv, nn.Flatten(), linear)

    wider, other, shorter = models()
    refused(saved, wider, r"layer 3 is Linear\(64, 4\), here Linear\(64, 5\)")
    refused(saved, other, r"layer 0 is Conv2d\(1, 4, .*, here Linear\(2, 2\)")
    refused(saved, shorter, r"layer 1 is ReLU\(\), here Flatten\(\)")
    # shapes and names, where nothing else is known
    unsaid(saved, "layers", "loss")
    refused(saved, wider, r"parameter 3.weight has shape \(5, 64\), given is \(4, 64\)")
    refused(saved, other, "0.weight")
    refused(saved, shorter, "parameter 2.weight is missing")


class Own(nn.ReLU):
    """Its repr says where it lies, and then nothing."""

    def __repr__(self):
        return object.__repr__(self)

    def _settings(self):
        raise NotImplementedError


class Other(nn.ReLU):
    pass


def five(*activation, flatten=nn.Flatten):
    conv, linear = nn.Conv2d(1, 4, 3), nn.Linear(64, CLASSES)
    return with_layers(conv, *activation, flatten(), linear, nn.LogSoftmax())


def with_norm(**settings):
    conv, linear = nn.Conv2d(1, 4, 3), nn.Linear(64, CLASSES)
    norm = nn.BatchNorm2d(4, **settings)
    return with_layers(conv, norm, nn.Flatten(), linear, nn.LogSoftmax())


def branched(body, shortcut=None):
    block = nn.Residual(nn.Sequential(*body), shortcut)
    linear = nn.Linear(36, CLASSES)
    return with_layers(block, nn.Flatten(), linear, nn.LogSoftmax())


@pytest.mark.parametrize(
    "saved, given, message",
    [
        (five(nn.ReLU()), five(nn.Sigmoid()), r"1 is ReLU\(\), here Sigmoid\(\)"),
        (five(Own()), five(Other()), "1 is Own, here Other"),
        (five(Own()), five(nn.ReLU()), r"1 is Own, here ReLU\(\)"),
        (
            five(nn.Dropout(0.5)),
            five(nn.Dropout(0.4)),
            r"1 is Dropout\(p=0.5\), here Dropout\(p=0.4\)",
        ),
        (
            with_norm(),
            with_norm(momentum=0.2),
            r"1 is BatchNorm2d\(4\), here BatchNorm2d\(4, momentum=0.2\)",
        ),
        (
            branched([nn.ReLU()]),
            branched([nn.Sigmoid()]),
            r"0.body.0 is ReLU\(\), here Sigmoid\(\)",
        ),
        (
            branched([nn.ReLU(), nn.ReLU()]),
            branched([nn.ReLU()]),
            r"a layer 0.body.1, ReLU\(\), where this one has 1, Flatten\(\)",
        ),
        (
            with_layers(nn.Flatten(), nn.Linear(36, CLASSES), nn.LogSoftmax()),
            with_layers(nn.Flatten(), nn.Linear(36, CLASSES)),
            r"its layer 2, LogSoftmax\(dim=1\), is not in this one",
        ),
        (
            with_layers(nn.Flatten(), nn.Linear(36, CLASSES)),
            with_layers(nn.Flatten(), nn.Linear(36, CLASSES), nn.LogSoftmax()),
            r"it has no layer 2, here LogSoftmax\(dim=1\)",
        ),
    ],
)
def test_layers_that_compute_something_else(tmp_path, saved, given, message):
    path = tmp_path / "run"
    saved.save(path)
    refused(path, given, f"is of another model: .*{message}")
    resume(path, saved)
    # a file of before layers were named is taken by what has its shapes
    kept = given.model.state_dict()
    if kept.keys() == saved.model.state_dict().keys():
        resume(unsaid(path, "layers", "loss"), given)


def test_a_fused_model_is_the_same_one(tmp_path):
    def fused(trainer):
        model = nn.fuse(trainer.model)
        optimizer = optim.RMSprop(model.parameters(), lr=0.01)
        return Trainer(model, trainer.loss, optimizer, LINEAR)

    for make in (make_trainer, lambda: branched([nn.ReLU()])):
        fused(make()).save(tmp_path / "fused")
        make().save(tmp_path / "plain")
        for name in ("fused", "plain"):
            resume(tmp_path / name, make())
            resume(tmp_path / name, fused(make()))


def with_loss(loss):
    model = make_model()
    return Trainer(model, loss, optim.RMSprop(model.parameters(), lr=0.01), LINEAR)


class OwnLoss(nn.CrossEntropyLoss):
    def __repr__(self):
        return object.__repr__(self)


@pytest.mark.parametrize(
    "saved, given, message",
    [
        (nn.NLLLoss(), nn.CrossEntropyLoss(), r"NLLLoss\(\), this is CrossEnt"),
        (
            nn.CrossEntropyLoss(label_smoothing=0.1),
            nn.CrossEntropyLoss(),
            r"\(label_smoothing=0.1\), this is CrossEntropyLoss\(\)",
        ),
        (
            nn.NLLLoss(weight=[1, 2, 3, 4]),
            nn.NLLLoss(weight=np.array([1, 2, 3, 5])),
            r"\[1.0, 2.0, 3.0, 4.0\]\), .*\[1.0, 2.0, 3.0, 5.0\]\)",
        ),
        (OwnLoss(), nn.CrossEntropyLoss(), r"OwnLoss, this is CrossEntropyLoss\(\)"),
        (nn.NLLLoss(weight=range(99)), OwnLoss(), r"\.\.\., this is OwnLoss"),
    ],
)
def test_another_loss(tmp_path, saved, given, message):
    path = tmp_path / "run"
    with_loss(saved).save(path)
    refused(path, with_loss(given), f"was made with the loss .*{message}")
    resume(path, with_loss(saved))
    resume(unsaid(path, "loss"), with_loss(given))


def test_another_optimizer(saved):
    model = make_model()
    sgd = Trainer(
        model, nn.NLLLoss(), optim.SGD(model.parameters(), lr=0.01), LINEAR
    )
    refused(saved, sgd, "another run: .*RMSprop.*SGD")


def test_an_optimizer_of_fewer_parameters(saved):
    model = make_model()
    some = optim.RMSprop(model.parameters()[:2], lr=0.01)
    trainer = Trainer(model, nn.NLLLoss(), some, LINEAR)
    # the model fits and is written first: it must be put back
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    refused(saved, trainer, "square_avg.2, which this optimizer has not")


@pytest.mark.parametrize(
    "schedule", [None, optim.schedules.cosine(), optim.schedules.linear(end=0.1)]
)
def test_another_schedule(saved, schedule):
    message = r"with the schedule linear\(end=0.0\), this is "
    refused(saved, make_trainer(schedule), message, schedule)


def test_names_of_schedules():
    def halves(step, total):
        return 0.5

    class Plain:
        def __call__(self, step, total):
            return 0.5

    name = checkpoint.schedule_name
    assert name(None) == "none"
    assert name(optim.schedules.cosine(0.5)) == "cosine(end=0.5)"
    assert name(halves).endswith("halves") and "0x" not in name(halves)
    assert name(Plain()).endswith("Plain") and "0x" not in name(Plain())


def test_a_later_format(saved, monkeypatch):
    monkeypatch.setattr(checkpoint, "_FORMAT", 0)
    refused(saved, make_trainer(), "has format 1 of cycnn .* reads format 0")


def test_a_file_of_weights(tmp_path):
    trainer = make_trainer()
    trainer.model.save(tmp_path / "weights")
    refused(tmp_path / "weights", trainer, "holds no run.*model.load")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        resume(tmp_path / "none", make_trainer())


def test_truncated_files(saved):
    content = saved.read_bytes()
    trainer = make_trainer()
    for length in [0, 4, 8, 9, *range(10, len(content), len(content) // 40)]:
        saved.write_bytes(content[:length])
        refused(saved, trainer, "damaged")


def test_flipped_bits(saved):
    content = bytearray(saved.read_bytes())
    trainer = make_trainer()
    header = int.from_bytes(content[:8], "little")
    # names, shapes and sizes in the header; the numbers; the JSON and the digest
    for position in [*range(0, 8 + header, 11), *range(8 + header, len(content), 97)]:
        content[position] ^= 4
        saved.write_bytes(content)
        refused(saved, trainer, "damaged|holds no run|cannot read")
        content[position] ^= 4
    saved.write_bytes(content)
    resume(saved, trainer)


def test_a_failing_save_keeps_the_old_file(saved, monkeypatch):
    content = saved.read_bytes()
    trainer = make_trainer()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.save(saved)
    assert saved.read_bytes() == content
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_the_file_is_plain_safetensors(saved):
    tensors, metadata = weights.read(saved)
    assert set(tensors) == {
        *(f"model.{name}" for name, _ in make_model().named_parameters()),
        *(f"optimizer.square_avg.{i}" for i in range(4)),
    }
    run = json.loads(metadata["cycnn"])["run"]
    assert (run["epoch"], run["step"], run["seed"]) == (1, 0, 5)
    assert run["history"][0]["epoch"] == 1
    assert all(array.dtype == np.float32 for array in tensors.values())
