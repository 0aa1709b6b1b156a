"""Learning-rate schedules: values, resuming, and what they are called."""

import math

import pytest

from cycnn.optim import schedules
from cycnn.optim.schedules import constant, cosine, linear, one_cycle, step, warmup


# torch.optim.lr_scheduler.OneCycleLR(max_lr=1, total_steps=10, final_div_factor=1e30)
ONE_CYCLE = [
    0.04, 0.52, 1.0, 0.9504844339512095, 0.8117449009293668, 0.6112604669781572,
    0.3887395330218428, 0.1882550990706332, 0.04951556604879043, 0.0,
]  # fmt: skip


def curve(schedule, total):
    return [schedule(i, total) for i in range(total)]


@pytest.mark.parametrize(
    "schedule, total, expected",
    [
        (constant(), 3, [1, 1, 1]),
        (linear(), 4, [1, 0.75, 0.5, 0.25]),
        (linear(end=0.5), 4, [1, 0.875, 0.75, 0.625]),
        (linear(), 1, [1]),
        (cosine(), 4, [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        (cosine(end=0.5), 2, [1, 0.75]),
        (step(0.5), 4, [1, 1, 0.1, 0.1]),
        (step(every=0.25, gamma=0.5), 4, [1, 0.5, 0.25, 0.125]),
        (warmup(2), 4, [0.5, 1, 1, 1]),
        (warmup(2, after=linear()), 6, [0.5, 1, 1, 0.75, 0.5, 0.25]),
        (warmup(0, linear()), 2, [1, 0.5]),
        (warmup(8), 4, [0.125, 0.25, 0.375, 0.5]),
        (warmup(1, warmup(2)), 4, [1, 0.5, 1, 1]),
        (one_cycle(0.5, 0.2, 0.1), 6, [0.2, 0.6, 1, 0.775, 0.325, 0.1]),
        (one_cycle(0.3, 0.04, 0), 10, ONE_CYCLE),
        (one_cycle(peak=0, end=0), 3, [1, 0.5, 0]),
        (one_cycle(peak=1, start=0), 3, [0, 0.5, 1]),
        (one_cycle(), 1, [1]),
    ],
    ids=repr,
)
def test_values(schedule, total, expected):
    assert curve(schedule, total) == pytest.approx(expected, abs=1e-12)


def test_steps_fall_on_whole_epochs():
    # 10 of 30 epochs, in floating point: 0.333... * 3 must be the whole run
    schedule = step(10 / 30, gamma=0.1)
    for batches in (1, 7, 469):
        values = curve(schedule, 30 * batches)
        assert values[10 * batches - 1] == 1
        assert values[10 * batches] == pytest.approx(0.1)
        assert values[20 * batches - 1] == pytest.approx(0.1)
        assert values[20 * batches] == pytest.approx(0.01)
        assert values[-1] == pytest.approx(0.01)


@pytest.mark.parametrize(
    "schedule, end",
    [(constant(), 1), (linear(0.1), 0.1), (cosine(0.1), 0.1), (linear(), 0)],
    ids=repr,
)
def test_training_that_goes_on_stays_at_the_end(schedule, end):
    for late in (10, 11, 1000):
        assert schedule(late, 10) == pytest.approx(end, abs=1e-12)


@pytest.mark.parametrize(
    "schedule",
    [
        constant(), linear(0.25), cosine(), step(0.2, 0.5), one_cycle(0.5, 0.25),
        warmup(5, after=cosine(0.5)),
    ],
    ids=repr,
)
def test_named_by_repr_and_equal_by_value(schedule):
    again = eval(repr(schedule), vars(schedules))
    assert again == schedule and curve(again, 20) == curve(schedule, 20)
    assert schedule != linear(0.75)
    assert all(0 <= value <= 1 for value in curve(schedule, 20))
    with pytest.raises(AttributeError):
        schedule.end = 3


def test_different_arguments_are_different_schedules():
    assert (
        repr(warmup(5, after=linear(0.5))) == "warmup(steps=5, after=linear(end=0.5))"
    )
    assert warmup(5) != warmup(6) and linear() != cosine()
    assert warmup(5, linear()) != warmup(5, linear(0.5))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: linear(end=-0.1), ValueError, "end must be a number from 0 to 1"),
        (lambda: linear(end=math.nan), ValueError, "got nan"),
        (lambda: cosine(end="0"), ValueError, "got '0'"),
        (lambda: step(0), ValueError, "every must be more than 0"),
        (lambda: step(10), ValueError, "every must be a number from 0 to 1, got 10"),
        (lambda: step(0.5, gamma=2), ValueError, "gamma"),
        (lambda: one_cycle(peak=1.5), ValueError, "peak must be a number from 0 to 1"),
        (lambda: warmup(-1), ValueError, "steps must not be negative"),
        (lambda: warmup(0.5), TypeError, "steps must be an integer"),
        (lambda: warmup(1, after=0.5), TypeError, "after must be a schedule"),
        (lambda: constant()(0, 0), ValueError, "total_steps=0"),
        (lambda: linear()(-1, 10), ValueError, "step=-1"),
        (lambda: warmup(5)(-1, 10), ValueError, "step=-1"),
    ],
)
def test_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()
