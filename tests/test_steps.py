"""Recorded steps: here replayed by running them again, since a CPU has no graphs."""

import numpy as np
import pytest
from training import digest, figures, make_trainer, patterns

import cycnn
from cycnn import optim
from cycnn.ops import Feed, for_device
from cycnn.train.steps import CapturedSteps

TRAIN = patterns(200)
TEST = patterns(70, seed=9)


def fit(trainer, capture, epochs=3, **options):
    trainer.capture = capture
    return trainer.fit(TRAIN, epochs, 32, seed=5, test=TEST, **options)


@pytest.mark.parametrize("schedule", [None, optim.schedules.linear()])
def test_recorded_steps_end_with_the_same_bits(schedule):
    trainers = [make_trainer(schedule) for _ in range(2)]
    histories = [fit(t, capture) for t, capture in zip(trainers, (False, True))]
    assert figures(histories[0]) == figures(histories[1])
    assert digest(trainers[0]) == digest(trainers[1])
    assert trainers[0].optimizer.lr == trainers[1].optimizer.lr


@pytest.mark.parametrize("batch_size", [3, 8])
def test_several_steps_of_one_graph_end_with_the_same_bits(batch_size, monkeypatch):
    ran = []
    run_next = CapturedSteps.run_next
    monkeypatch.setattr(
        CapturedSteps,
        "run_next",
        lambda self, most: ran.append(run_next(self, most)) or ran[-1],
    )
    results = []
    for capture in (False, True):
        trainer = make_trainer()
        trainer.capture = capture
        history = trainer.fit(TRAIN, 3, batch_size, seed=5)
        results.append((figures(history), digest(trainer)))
    assert results[0] == results[1]
    epoch = {3: [8] * 8 + [1] * 3, 8: [8] * 3 + [1]}[batch_size]
    assert ran == 3 * epoch


class StopAt:
    """Ctrl-C at a step of the run."""

    def __init__(self, step):
        self.left = step

    def on_step_end(self, trainer):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [1, 7, 10, 13])
@pytest.mark.parametrize("capture", [(False, True), (True, False), (True, True)])
def test_an_interrupted_epoch_goes_on_either_way(step, capture):
    whole, broken = make_trainer(), make_trainer()
    expected = figures(fit(whole, False))
    with pytest.raises(KeyboardInterrupt):
        fit(broken, capture[0], callbacks=[StopAt(step)])
    assert figures(fit(broken, capture[1])) == expected
    assert digest(broken) == digest(whole)


def test_a_changed_precision_is_recorded_anew():
    trainer = make_trainer()

    def change(trainer, record):
        cycnn.set_precision("tf32" if record.epoch == 1 else "fp32")

    try:
        fit(trainer, True, callbacks=[change])
    finally:
        cycnn.set_precision("fp32")
    whole = make_trainer()
    fit(whole, False)
    assert digest(trainer) == digest(whole), "the CPU has one precision"


def feed_of(size, rates=None):
    """Of five images, two of which are taken, and seven steps."""
    arrays = [4, 2, 0, 3, 1], [2, 7], [9, 8, 7, 6, 5], [0] * size, [0] * size
    tensors = [cycnn.Tensor(np.array(a, np.int32), "cpu") for a in arrays]
    if rates is not None:
        rates = cycnn.Tensor(np.array(rates, np.float32), "cpu")
    return Feed(*tensors, rates, cycnn.Tensor(0.5, "cpu"))


def laid_out(feed):
    return [x.numpy().tolist() for x in (feed.position, feed.index, feed.labels)]


def test_begin_step_counts_for_itself():
    ops = for_device(cycnn.device("cpu"))
    feed = feed_of(2)
    ops.begin_step(feed)
    assert laid_out(feed) == [[4, 8], [0, 3], [9, 6]]
    assert float(feed.lr) == 0.5
    ops.begin_step(feed)
    assert laid_out(feed) == [[6, 9], [1, -1], [8, -1]], "the order ends"
    feed = feed_of(3, rates=np.arange(9))
    rates = []
    for _ in range(3):
        ops.begin_step(feed)
        rates.append(float(feed.lr))
    assert rates == [7, 8, 8], "the run ends"


def test_end_step_reads_the_labels_before_it_replaces_them():
    ops = for_device(cycnn.device("cpu"))
    feed = feed_of(2)
    ops.begin_step(feed)
    loss_sum, hits = cycnn.zeros((), device="cpu"), cycnn.zeros((), "int32", "cpu")
    scores = np.zeros((2, 10), np.float32)
    scores[[0, 1], [9, 7]] = 1
    losses = cycnn.Tensor(np.array([1.0, 2.0], np.float32), "cpu")
    scores = cycnn.Tensor(scores, "cpu")
    ops.end_step(losses, scores, feed.labels, loss_sum, hits, feed)
    assert (float(loss_sum), int(hits)) == (1.5, 1)
    assert laid_out(feed)[1:] == [[1, -1], [8, -1]]


def test_an_optimizer_keeps_the_rate_of_the_last_step():
    # the next one is laid out already, and differs
    trainer = make_trainer(lambda step, total: 1 if step < 10 else 0.5, lr=0.25)
    with pytest.raises(KeyboardInterrupt):
        fit(trainer, True, callbacks=[StopAt(10)])
    assert trainer.optimizer.lr == float(trainer.optimizer.lr_tensor) == 0.25
