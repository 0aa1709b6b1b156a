"""Trainer: what it computes, when it waits, and how it is interrupted."""

import copy
import io
import logging
import math
import re
import signal
import threading

import numpy as np
import pytest
from training import digest, figures, make_model, make_trainer, patterns

import cycnn
from cycnn import Tensor, Trainer, nn, optim
from cycnn.data import ArrayDataset, DataLoader
from cycnn.train import History, ProgressBar, progress
from cycnn.train import trainer as trainer_module

TRAIN = patterns(200)
TEST = patterns(70, seed=9)
STEPS = 7  # an epoch of TRAIN in batches of 32: six full ones and one of 8


def fit(trainer, epochs=2, **options):
    options.setdefault("seed", 5)
    return trainer.fit(TRAIN, epochs, 32, **options)


class SignalAt(nn.Layer):
    """Passes its input on and raises SIGINT at chosen forward calls."""

    def __init__(self, *calls):
        self.calls, self.count = calls, 0

    def forward(self, x):
        self.count += 1
        for _ in range(self.calls.count(self.count)):
            signal.raise_signal(signal.SIGINT)
        return x

    def backward(self, dy, input_grad=True, accumulate=False):
        return dy


def interrupted_trainer(*calls):
    trainer = make_trainer()
    trainer.model = nn.Sequential(*trainer.model, SignalAt(*calls))
    return trainer


def test_fit_is_the_loop_that_one_would_write():
    trainer = make_trainer(optim.schedules.linear())
    history = fit(trainer, epochs=2)

    model, loss = make_model(), nn.NLLLoss()
    optimizer = optim.RMSprop(model.parameters(), lr=0.01)
    loader = DataLoader(TRAIN, 32, shuffle=True, seed=5, device="cpu")
    schedule = optim.schedules.linear()
    step, epochs = 0, []
    for epoch in range(2):
        loader.set_epoch(epoch)
        total = hits = 0.0
        for images, labels in loader:
            optimizer.lr = 0.01 * schedule(step, 2 * STEPS)
            scores = model(images)
            total += float(loss(scores, labels)) * len(labels)
            hits += (scores.numpy().argmax(1) == labels.numpy()).sum()
            model.backward(loss.backward(), input_grad=False)
            optimizer.step()
            step += 1
        epochs.append((total / 200, hits / 200))

    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(trainer.model.state_dict()[name], array)
    assert history["loss"] == pytest.approx([e[0] for e in epochs], rel=1e-5)
    assert history["accuracy"] == [e[1] for e in epochs]
    assert history["loss"][1] < 0.8 * history["loss"][0]
    assert history["lr"][-1] == pytest.approx(0.01 / (2 * STEPS))


def test_the_smaller_last_batch_weighs_less():
    # with lr 0 the loss over the epoch is the loss of the data set
    trainer = make_trainer(schedule=None, lr=0.0)
    expected = trainer.evaluate(TRAIN)
    record = fit(trainer, epochs=1)[0]
    assert record.loss == pytest.approx(expected["loss"], rel=1e-6)
    assert record.accuracy == expected["accuracy"]
    assert record.images_per_second == pytest.approx(200 / record.seconds)


def test_a_batch_larger_than_the_set():
    trainer = make_trainer(schedule=None, lr=0.0)
    record = trainer.fit(TRAIN, 1, 1000)[0]
    assert record.loss == pytest.approx(trainer.evaluate(TRAIN)["loss"], rel=1e-6)


def test_the_schedule_spans_the_whole_run():
    class Rates:
        def __init__(self):
            self.seen = []

        def on_step_end(self, trainer):
            self.seen.append(trainer.optimizer.lr)

    rates = Rates()
    fit(make_trainer(optim.schedules.linear(), lr=0.5), epochs=3, callbacks=[rates])
    total = 3 * STEPS
    assert rates.seen == pytest.approx([0.5 * (1 - i / total) for i in range(total)])

    rates = Rates()
    fit(make_trainer(None, lr=0.5), epochs=1, callbacks=[rates])
    assert rates.seen == [0.5] * STEPS


def test_order_depends_on_seed_and_epoch():
    def result(**options):
        trainer = make_trainer()
        fit(trainer, **options)
        return digest(trainer)

    assert result(seed=3) == result(seed=3)
    assert result(seed=3) != result(seed=4)
    assert result(seed=3, shuffle=False) == result(seed=4, shuffle=False)
    assert result(seed=3, shuffle=False) != result(seed=3)


def test_the_default_seed_comes_from_manual_seed():
    def result(seed):
        trainer = make_trainer()
        cycnn.manual_seed(seed)
        fit(trainer, seed=None)
        return digest(trainer)

    assert result(1) == result(1)
    assert result(1) != result(2)


def test_a_second_fit_goes_on():
    whole = make_trainer(schedule=None)
    fit(whole, epochs=3)
    parts = make_trainer(schedule=None)
    fit(parts, epochs=1)
    history = fit(parts, epochs=3, seed=None)
    assert digest(parts) == digest(whole)
    assert figures(history) == figures(whole.history)
    assert history["epoch"] == [1, 2, 3]


def test_a_loss_that_is_no_number_is_said(caplog):
    trainer = make_trainer(lr=1e30)
    with caplog.at_level(logging.WARNING, "cycnn"), np.errstate(all="ignore"):
        trainer.fit(patterns(64), 2, 32)
    assert "the loss is nan; try a smaller learning rate" in caplog.text


def test_nothing_left_to_train_is_said(caplog):
    trainer = make_trainer()
    fit(trainer, epochs=2)
    before = digest(trainer)
    with caplog.at_level(logging.WARNING, "cycnn"):
        history = fit(trainer, epochs=2)
    assert "has 2 epochs already and was asked for 2" in caplog.text
    assert len(history) == 2 and digest(trainer) == before


@pytest.mark.parametrize("epochs, batch_size", [(0, 32), (-1, 32), (1, 0)])
def test_senseless_numbers(epochs, batch_size):
    with pytest.raises(ValueError, match="at least 1, got"):
        make_trainer().fit(TRAIN, epochs, batch_size)


def test_an_empty_training_set():
    empty = TRAIN.subset(0)
    with pytest.raises(ValueError, match="training set is empty"):
        make_trainer().fit(empty, 1, 32)


def test_cross_entropy_trains_a_model_without_log_softmax():
    with_softmax = make_trainer()
    fit(with_softmax)
    model = make_model()[:-1]
    optimizer = optim.RMSprop(model.parameters(), lr=0.01)
    plain = Trainer(model, nn.CrossEntropyLoss(), optimizer, optim.schedules.linear())
    fit(plain)
    assert plain.history["loss"] == pytest.approx(
        with_softmax.history["loss"], rel=1e-4
    )
    np.testing.assert_allclose(
        plain.predict_proba(TEST), with_softmax.predict_proba(TEST), atol=1e-4
    )


def test_nothing_is_read_from_the_device_during_an_epoch(monkeypatch):
    reads, reads_at_step = [], []
    read = trainer_module.Tally.read

    def counted(self):
        reads.append(self)
        return read(self)

    class Watch:
        def on_step_end(self, trainer):
            reads_at_step.append(len(reads))

    trainer = make_trainer()
    monkeypatch.setattr(trainer_module.Tally, "read", counted)
    fit(trainer, epochs=1, callbacks=[Watch()])
    assert reads_at_step == [0] * STEPS
    assert len(reads) > 0  # the figures at the end


# callbacks and progress


class Recorder:
    def __init__(self):
        self.events = []

    def on_fit_start(self, trainer):
        self.events.append("start")

    def on_step_end(self, trainer):
        self.events.append((trainer.epoch, trainer.step))

    def on_epoch_end(self, trainer, record):
        self.events.append(record)

    def on_fit_end(self, trainer):
        self.events.append("end")


def test_callbacks_are_called_in_order():
    recorder, records = Recorder(), []
    history = fit(
        make_trainer(),
        callbacks=[recorder, lambda trainer, record: records.append(record)],
    )
    assert records == list(history)
    assert recorder.events == [
        "start",
        *[(0, step + 1) for step in range(STEPS)],
        history[0],
        *[(1, step + 1) for step in range(STEPS)],
        history[1],
        "end",
    ]


def test_a_callback_can_stop_the_run():
    trainer = make_trainer()
    history = fit(trainer, epochs=5, callbacks=[lambda trainer, record: trainer.stop()])
    assert len(history) == 1
    assert len(fit(trainer, epochs=2)) == 2


def test_callbacks_hear_the_end_of_a_fit_that_fails():
    recorder = Recorder()

    def fail(trainer, record):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        fit(make_trainer(), callbacks=[recorder, fail])
    assert recorder.events[-1] == "end"


def test_running_figures_outside_of_an_epoch():
    trainer = make_trainer()
    fit(trainer)
    with pytest.raises(RuntimeError, match="no epoch is under way"):
        trainer.running()


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_reads_the_device_five_times_a_second_at_most(monkeypatch):
    clock = iter(0.05 * i for i in range(10_000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    reads = []
    running = Trainer.running
    monkeypatch.setattr(
        Trainer, "running", lambda self: reads.append(self.step) or running(self)
    )
    stream = Terminal()
    fit(make_trainer(), epochs=3, callbacks=[ProgressBar(stream)])
    # every step takes 50 ms of that clock, and each read two ticks
    assert 3 * STEPS / 5 <= len(reads) <= 3 * STEPS / 3
    text = stream.getvalue()
    assert "epoch 1/3 [" in text and "images/s" in text and "loss" in text
    last = text.split("\r")[-1].splitlines()
    assert last[-1].startswith("epoch 3/3  loss")


def test_without_a_terminal_each_epoch_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "running", None)
    history = fit(make_trainer(), test=TEST, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for line, record in zip(lines, history):
        assert f"loss {record.loss:.4f}" in line
        assert f"test {record.test_accuracy:7.2%}" in line


# history


def test_history():
    history = fit(make_trainer(), epochs=3, test=TEST)
    assert history["epoch"] == [1, 2, 3]
    assert history[-1].epoch == 3
    assert len(history[:2]) == 2
    assert History.from_list(history.to_list()) == history
    assert "test_accuracy" in repr(history)
    with pytest.raises(KeyError, match="images_per_second.*not 'speed'"):
        history["speed"]


# evaluation and prediction


def test_test_figures_are_those_of_evaluate():
    trainer = make_trainer()
    record = fit(trainer, test=TEST)[-1]
    assert trainer.evaluate(TEST) == {
        "loss": record.test_loss,
        "accuracy": record.test_accuracy,
    }
    assert make_trainer().fit(TRAIN, 1, 32)[0].test_loss is None


@pytest.mark.parametrize("batch_size", [1, 32, 70, 1000])
def test_evaluate(batch_size):
    trainer = make_trainer()
    fit(trainer)
    x = TEST.images.astype(np.float32) * np.float32(TEST.scale) + TEST.shift
    scores = trainer.model(x.astype(np.float32)).numpy()
    found = trainer.evaluate(TEST, batch_size)
    picked = scores[np.arange(70), TEST.labels]
    assert found["loss"] == pytest.approx(-picked.mean(), rel=1e-5)
    assert found["accuracy"] == np.mean(scores.argmax(1) == TEST.labels)


def test_evaluate_nothing():
    found = make_trainer().evaluate(TEST.subset(0))
    assert math.isnan(found["loss"]) and math.isnan(found["accuracy"])


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_mode_as_it_was(training):
    trainer = make_trainer()
    trainer.model.train(training)
    seen = []
    forward = trainer.model.forward
    trainer.model.forward = lambda x: seen.append(trainer.model.training) or forward(x)
    trainer.predict(TEST)
    assert seen == [False]
    assert trainer.model.training is training


def test_predictions_of_arrays_tensors_and_datasets_agree():
    trainer = make_trainer()
    fit(trainer)
    scaled = (TEST.images * TEST.scale + TEST.shift).astype(np.float32)
    classes = trainer.predict(TEST)
    assert classes.dtype == np.int32 and classes.shape == (70,)
    assert np.mean(classes == TEST.labels) == trainer.evaluate(TEST)["accuracy"]
    probabilities = trainer.predict_proba(TEST)
    assert probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(probabilities.argmax(1), classes)
    for images in (scaled, scaled.tolist(), Tensor(scaled, "cpu")):
        np.testing.assert_array_equal(trainer.predict(images), classes)
        np.testing.assert_allclose(
            trainer.predict_proba(images), probabilities, rtol=1e-4
        )


def test_many_images_are_predicted_in_parts():
    trainer = make_trainer()
    many = np.random.default_rng(1).normal(size=(2300, 1, 6, 6)).astype(np.float32)
    found = trainer.predict(many)
    assert found.shape == (2300,)
    np.testing.assert_array_equal(found[1990:2010], trainer.predict(many[1990:2010]))


def test_a_nested_model_that_ends_in_log_softmax():
    trainer = make_trainer()
    expected = trainer.predict_proba(TEST)
    layers = list(trainer.model)
    trainer.model = nn.Sequential(*layers[:3], nn.Sequential(*layers[3:]))
    np.testing.assert_array_equal(trainer.predict_proba(TEST), expected)


def test_predicting_raw_bytes_is_refused():
    with pytest.raises(TypeError, match="uint8, expected float32"):
        make_trainer().predict(TEST.images)


def test_predicting_nothing():
    trainer = make_trainer()
    assert trainer.predict(np.empty((0, 1, 6, 6), np.float32)).shape == (0,)
    with pytest.raises(cycnn.ShapeError, match="at least one image"):
        trainer.predict_proba(np.empty((0, 1, 6, 6), np.float32))


# Ctrl-C


@pytest.mark.parametrize("at", [1, 4, STEPS, STEPS + 3])
def test_an_interrupted_fit_goes_on_exactly(at):
    whole = interrupted_trainer()
    fit(whole, epochs=2)

    trainer = interrupted_trainer(at)
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, epochs=2)
    # the step that the signal fell into was completed and counted
    assert trainer.epoch * STEPS + trainer.step == at
    assert len(trainer.history) == trainer.epoch
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    history = fit(trainer, epochs=2)
    assert digest(trainer) == digest(whole)
    assert figures(history) == figures(whole.history)


def test_a_second_interrupt_does_not_wait():
    trainer = interrupted_trainer(3, 3)
    with pytest.raises(KeyboardInterrupt):
        fit(trainer)
    assert trainer.step == 2


def test_a_changed_order_within_an_epoch_is_refused():
    trainer = interrupted_trainer(3)
    with pytest.raises(KeyboardInterrupt):
        fit(trainer)
    before = digest(trainer)
    with pytest.raises(ValueError, match="seed 5, so it cannot go on with 6"):
        fit(trainer, seed=6)
    with pytest.raises(ValueError, match="batch_size 32, so it cannot go on with 16"):
        trainer.fit(TRAIN, 2, 16, seed=5)
    with pytest.raises(ValueError, match="images 200, so it cannot go on with 100"):
        trainer.fit(TRAIN.subset(100), 2, 32, seed=5)
    assert digest(trainer) == before
    # and the run is not spoilt by the attempts
    assert len(fit(trainer)) == 2


def test_another_handler_of_interrupts_is_left_alone():
    heard = []
    before = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        history = fit(interrupted_trainer(2))
        assert heard == [signal.SIGINT] and len(history) == 2
    finally:
        signal.signal(signal.SIGINT, before)


def test_training_in_a_thread():
    trainers = [make_trainer(), make_trainer()]
    fit(trainers[0])
    thread = threading.Thread(target=fit, args=trainers[1:])
    thread.start()
    thread.join()
    assert digest(trainers[1]) == digest(trainers[0])


def test_labels_out_of_range_on_the_cpu():
    labels = TRAIN.labels.copy()
    labels[7] = 11
    dataset = ArrayDataset(TRAIN.images, labels, TRAIN.scale, TRAIN.shift)
    with pytest.raises(cycnn.DataError, match="11"):
        make_trainer().fit(dataset, 1, 32)


# what no trainer is made of


class NoLoss:
    """Has a forward and no backward."""

    def __call__(self, scores, labels):
        return scores


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(model=None), "model must be an nn.Layer, got None"),
        (dict(model=lambda x: x), "model must be an nn.Layer, got <function"),
        (dict(model=nn.Sequential), r"class Sequential: write Sequential\(...\)"),
        (dict(loss=3), r"loss must be a loss such as nn.CrossEntropyLoss\(\), got 3"),
        (dict(loss=NoLoss()), "loss must be a loss .*, got <"),
        (dict(loss=nn.NLLLoss), r"loss is the class NLLLoss: write NLLLoss\(...\)"),
        (dict(optimizer=None), "optimizer must be an optim.Optimizer .*, got None"),
        (dict(optimizer=0.1), "optimizer must be an optim.Optimizer .*, got 0.1"),
        (dict(schedule=0.5), "schedule must be None or schedule.*, got 0.5"),
        (dict(average=0.999), "average must be None or an optim.EMA, got 0.999"),
    ],
)
def test_parts_of_another_kind(change, message):
    trainer = make_trainer()
    names = ("model", "loss", "optimizer", "schedule", "average")
    parts = {name: getattr(trainer, name) for name in names}
    with pytest.raises(TypeError, match=message):
        Trainer(**(parts | change))
    # also where somebody puts it into a trainer that there is
    for name, value in change.items():
        setattr(trainer, name, value)
    before = make_trainer()
    with pytest.raises(TypeError, match=message):
        fit(trainer)
    if "model" not in change and "optimizer" not in change:
        assert digest(trainer) == digest(before)


def test_an_optimizer_of_another_model():
    model, other = make_model(), make_model()
    loss, foreign = nn.NLLLoss(), optim.SGD(other.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer holds none of the model's param"):
        Trainer(model, loss, foreign)
    own = optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="average holds none of the model's parame"):
        Trainer(model, loss, own, average=optim.EMA(other.parameters()))
    trainer = Trainer(model, loss, own)
    trainer.model = copy.deepcopy(model)
    with pytest.raises(ValueError, match="a copy has parameters of its own"):
        fit(trainer)


def test_an_optimizer_of_a_part_of_the_model():
    model = make_model()
    before = model.state_dict()
    some = model[3].parameters()
    trainer = Trainer(model, nn.NLLLoss(), optim.SGD(some, lr=0.1))
    fit(trainer)
    changed = {k for k, v in model.state_dict().items() if (v != before[k]).any()}
    assert changed == {"3.weight", "3.bias"}
    # and one of more than the model
    more = model.parameters() + make_model().parameters()
    fit(Trainer(model, nn.NLLLoss(), optim.SGD(more, lr=0.1)))


@pytest.mark.parametrize("name", ["epochs", "batch_size"])
@pytest.mark.parametrize("value", [float("nan"), 1.5, 8.0, "8", None, True, [8]])
def test_numbers_that_are_no_integers(name, value):
    trainer = make_trainer()
    before = digest(trainer)
    numbers = {"epochs": 2, "batch_size": 32, name: value}
    message = f"fit: {name} must be an integer, got {re.escape(repr(value))}"
    with pytest.raises(TypeError, match=message):
        trainer.fit(TRAIN, **numbers)
    assert digest(trainer) == before and not trainer.history
    if name == "batch_size" and value is not True:
        with pytest.raises(TypeError, match="batch_size must be an integer, got"):
            trainer.evaluate(TEST, value)


def test_integers_of_numpy():
    trainer = make_trainer()
    trainer.fit(TRAIN, np.int64(1), np.uint8(32), seed=np.int32(5))
    same = make_trainer()
    fit(same, epochs=1)
    assert digest(trainer) == digest(same)


@pytest.mark.parametrize("value", [1.5, "1", float("nan"), [1]])
def test_seeds_that_are_no_integers(value):
    message = f"seed must be an integer, got {re.escape(repr(value))}"
    with pytest.raises(TypeError, match=message):
        cycnn.manual_seed(value)
    with pytest.raises(TypeError, match=message):
        fit(make_trainer(), seed=value)


def test_nan_is_the_largest_score():
    trainer = make_trainer()
    images = np.zeros((3, 1, 6, 6), np.float32)
    expected = trainer.predict(images)
    images[1] = np.nan
    assert trainer.predict(images).tolist() == [expected[0], 0, expected[2]]
    assert np.isnan(trainer.predict_proba(images)).any(1).tolist() == [0, 1, 0]
