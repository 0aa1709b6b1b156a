"""Recorded steps: here replayed by running them again, since a CPU has no graphs."""

import numpy as np
import pytest
from training import digest, figures, make_trainer, patterns

import cycnn
from cycnn import optim
from cycnn.ops import for_device

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


def test_begin_step_counts_for_itself():
    ops = for_device(cycnn.device("cpu"))
    order = cycnn.Tensor([4, 2, 0, 3, 1], "cpu")
    position = cycnn.Tensor([0, 7], "cpu")
    rates = cycnn.Tensor(np.arange(10.0), "cpu")
    lr = cycnn.Tensor(0.5, "cpu")
    index = cycnn.zeros(2, "int32", "cpu")
    ops.begin_step(order, position, index, None, lr)
    assert index.numpy().tolist() == [4, 2]
    assert position.numpy().tolist() == [2, 8]
    assert float(lr) == 0.5
    ops.begin_step(order, position, index, rates, lr)
    assert index.numpy().tolist() == [0, 3]
    assert position.numpy().tolist() == [4, 9]
    assert float(lr) == 8
    ops.begin_step(order, position, index[:1], rates, lr)
    assert index.numpy().tolist() == [1, 3]
    assert float(lr) == 9
