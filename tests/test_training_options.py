"""Trainers with groups of parameters, clipped gradients and averaged weights."""

import threading

import numpy as np
import pytest
from training import make_model, patterns

import cycnn
from cycnn import Trainer, devices, nn, optim
from cycnn.errors import DataError, ShapeError
from cycnn.ops import cpu, reference
from cycnn.tensor import Tensor


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


TRAIN = patterns(200)
OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1, momentum=0.9, dampening=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, 0.003, centered=True, eps=1e-3),
    "adam": lambda p: optim.Adam(p, 0.01),
    "adamw": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1, amsgrad=True),
    "adagrad": lambda p: optim.Adagrad(p, 0.05, lr_decay=0.01),
}


def grouped(model):
    weights = [p for name, p in model.named_parameters() if "weight" in name]
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    return [
        {"params": weights, "weight_decay": 0.01},
        {"params": biases, "lr": 0.002},
    ]


def trainer_of(kind="adam", groups=False, schedule=None, decay=None, **options):
    model = make_model()
    optimizer = OPTIMIZERS[kind](grouped(model) if groups else model.parameters())
    if decay is not None:
        options["average"] = optim.EMA(model.parameters(), decay)
    return Trainer(model, nn.NLLLoss(), optimizer, schedule, **options)


def digest(trainer):
    """Every bit of the parameters and the optimizer's state."""
    return {
        name: value.tobytes() if isinstance(value, np.ndarray) else value
        for state in (trainer.model.state_dict(), trainer.optimizer.state_dict())
        for name, value in state.items()
    }


def fit(trainer, epochs=3):
    return trainer.fit(TRAIN, epochs, 32, seed=5, test=TRAIN)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("groups", [False, True], ids=["one", "groups"])
def test_recorded_steps_are_eager_steps(kind, groups):
    results = []
    for capture in (False, True):
        trainer = trainer_of(
            kind, groups, optim.schedules.linear(), 0.9, capture=capture, fuse=False,
            clip_grad_norm=0.5,
        )  # fmt: skip
        history = fit(trainer)
        state = trainer.average.state_dict()
        rates = trainer.optimizer.lrs, trainer.optimizer.lr_tensor.numpy().tolist()
        results.append((digest(trainer), history["loss"], history["test_loss"], rates))
        averages = [array for name, array in state.items() if name != "decay"]
        results[-1] += (b"".join(a.tobytes() for a in averages),)
    assert results[0] == results[1]
    losses = results[0][1]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("capture", [False, True])
def test_a_schedule_moves_all_groups(capture):
    trainer = trainer_of(
        groups=True, schedule=optim.schedules.step(0.5, 0.1), capture=capture
    )
    assert trainer.base_lrs == [0.01, 0.002] and trainer.base_lr == 0.01
    fit(trainer, 2)
    assert trainer.optimizer.lrs == pytest.approx([0.001, 0.0002])
    np.testing.assert_allclose(
        trainer.optimizer.lr_tensor.numpy(), [0.001, 0.0002], rtol=1e-6
    )
    assert trainer.history[-1].lr == trainer.optimizer.lrs[0]


def test_groups_and_averages_resume_with_the_same_bits(tmp_path):
    path = tmp_path / "run"
    make = {"groups": True, "schedule": optim.schedules.cosine(), "decay": 0.9}
    whole = trainer_of(**make, clip_grad_norm=0.5)
    fit(whole, 4)

    class Save:
        def on_step_end(self, trainer):
            if (trainer.epoch, trainer.step) == (1, 3):
                trainer.save(path)

    trainer_of(**make, clip_grad_norm=0.5).fit(
        TRAIN, 4, 32, seed=5, test=TRAIN, callbacks=[Save()]
    )
    fresh = trainer_of(**make)
    resumed = Trainer.resume(
        path, fresh.model, fresh.loss, fresh.optimizer, fresh.schedule,
        clip_grad_norm=0.5, average=fresh.average,
    )  # fmt: skip
    assert resumed.base_lrs == [0.01, 0.002]
    fit(resumed, 4)
    assert digest(resumed) == digest(whole)
    assert resumed.history["test_loss"] == whole.history["test_loss"]
    want = whole.average.state_dict()
    for name, array in resumed.average.state_dict().items():
        np.testing.assert_array_equal(array, want[name])


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    plain, averaged, groups = (tmp_path / name for name in ("a", "b", "c"))
    trainer_of().save(plain)
    trainer_of(decay=0.9).save(averaged)
    trainer_of(groups=True).save(groups)

    def resume(path, **options):
        trainer = trainer_of(**options)
        before = digest(trainer)
        try:
            return Trainer.resume(
                path, trainer.model, trainer.loss, trainer.optimizer,
                average=trainer.average,
            )  # fmt: skip
        finally:
            assert digest(trainer) == before

    for path, options, message in [
        (plain, {"decay": 0.9}, "without an average .* with one"),
        (averaged, {}, "with an average .* without one"),
        (plain, {"groups": True}, "1 groups of parameters, the optimizer 2"),
        (groups, {}, "2 groups of parameters, the optimizer 1"),
    ]:
        with pytest.raises(DataError, match=message):
            resume(path, **options)
    resume(averaged, decay=0.5)


def test_clipping_bounds_the_gradient_of_every_step():
    trainer = trainer_of("sgd", capture=True, clip_grad_norm=0.01)
    norms = []

    class Watch:
        def on_step_end(self, trainer):
            squares = [
                np.sum(p.grad.numpy().astype(np.float64) ** 2)
                for p in trainer.model.parameters()
            ]
            norms.append(np.sqrt(sum(squares)))

    trainer.fit(TRAIN, 1, 32, seed=5, callbacks=[Watch()])
    assert len(norms) == 7 and max(norms) == pytest.approx(0.01, rel=1e-3)
    with pytest.raises(ValueError, match="clip_grad_norm must be positive"):
        trainer_of(clip_grad_norm=0)


# averages


def test_the_average_follows_its_formula():
    model = make_model()
    average = optim.EMA(model.parameters(), 0.75)
    want = [p.data.numpy().astype(np.float64) for p in model.parameters()]
    rng = np.random.default_rng(1)
    for _ in range(5):
        for i, parameter in enumerate(model.parameters()):
            parameter.data.copy_(rng.standard_normal(parameter.shape))
            want[i] = 0.75 * want[i] + 0.25 * parameter.data.numpy()
        average.update()
    now = [p.data.numpy() for p in model.parameters()]
    with average.applied() as block:
        assert block is average and average.is_applied
        for parameter, array in zip(model.parameters(), want):
            np.testing.assert_allclose(parameter.data.numpy(), array, atol=1e-6)
    for parameter, array in zip(model.parameters(), now):
        np.testing.assert_array_equal(parameter.data.numpy(), array)
    average.copy_to_parameters()
    for parameter, array in zip(model.parameters(), want):
        np.testing.assert_allclose(parameter.data.numpy(), array, atol=1e-6)
    assert repr(average) == f"EMA(decay=0.75; {sum(a.size for a in want):,} parameters)"


def test_parameters_come_back_after_an_error():
    model = make_model()
    average = optim.EMA(model.parameters(), 0.5)
    model.parameters()[0].data.fill_(3)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert (model.parameters()[0].data.numpy() == 3).all() and not average.is_applied


def test_what_cannot_be_done_while_applied():
    average = optim.EMA(make_model().parameters())
    state = average.state_dict()
    with average.applied():
        for forbidden in (
            average.update,
            average.copy_to_parameters,
            average.state_dict,
            lambda: average.load_state_dict(state),
            lambda: average.applied().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="leave the block of applied"):
                forbidden()


def test_evaluation_and_prediction_use_the_average():
    trainer = trainer_of(decay=0.5)
    fit(trainer, 2)
    found = trainer.evaluate(TRAIN)
    assert found["loss"] == trainer.history[-1].test_loss
    probabilities = trainer.predict_proba(TRAIN)
    classes = trainer.predict(TRAIN)
    with trainer.average.applied():
        assert trainer.evaluate(TRAIN) == found
    trainer.average.copy_to_parameters()
    trainer.average = None
    assert trainer.evaluate(TRAIN) == found
    np.testing.assert_array_equal(trainer.predict_proba(TRAIN), probabilities)
    np.testing.assert_array_equal(trainer.predict(TRAIN), classes)


def test_averages_follow_parameters_that_move():
    first, second = nn.Linear(3, 2), nn.Linear(2, 4)
    average = optim.EMA(first.parameters() + second.parameters(), 0.5)
    want = [p.data.numpy() / 2 + 1 for p in first.parameters()]
    nn.Sequential(second, first)
    for parameter in first.parameters():
        parameter.data.fill_(2)
    average.update()
    with average.applied():
        for parameter, array in zip(first.parameters(), want):
            np.testing.assert_allclose(parameter.data.numpy(), array, rtol=1e-6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda s: s.pop("decay"), ValueError, "no decay"),
        (lambda s: s.update(decay=1.0), ValueError, "decay must be"),
        (lambda s: s.pop("average.1"), ValueError, "no average.1"),
        (lambda s: s.update({"average.0": np.zeros(2)}), ShapeError, r"\(2,\)"),
        (lambda s: s.update({"average.1": np.zeros(4, int)}), TypeError, "int64"),
        (lambda s: s.update(more=np.zeros(2)), ValueError, "has more"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change, error, message):
    average = optim.EMA(make_model().parameters(), 0.5)
    before = average.state_dict()
    state = {k: v + 0.25 for k, v in before.items()}
    change(state)
    with pytest.raises(error, match=message):
        average.load_state_dict(state)
    for name, value in average.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: optim.EMA(make_model()), TypeError, r"model.parameters\(\)"),
        (lambda: optim.EMA([]), ValueError, "no parameters"),
        (lambda: optim.EMA([np.zeros(3)]), TypeError, "must hold Parameters"),
        (lambda: optim.EMA(make_model().parameters() * 2), ValueError, "given twice"),
        (lambda: optim.EMA(make_model().parameters(), 1), ValueError, "decay must be"),
    ],
)
def test_arguments_of_averages_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


# the operations


@pytest.mark.parametrize("n", [0, 1, 31, 257, 40_000])
def test_operations_follow_their_specification(n):
    rng = np.random.default_rng(2)
    x, y = (rng.standard_normal(n).astype(np.float32) for _ in range(2))
    average, want = Tensor(x, "cpu"), x.astype(np.float64)
    cpu.ema_step(average, Tensor(y, "cpu"), 0.9)
    reference.ema_step(want, y, 0.9)
    np.testing.assert_allclose(average.numpy(), want, rtol=1e-5, atol=1e-6)
    a, b = Tensor(x, "cpu"), Tensor(y, "cpu")
    cpu.swap(a, b)
    np.testing.assert_array_equal(a.numpy(), y)
    np.testing.assert_array_equal(b.numpy(), x)
    reference.swap(x, y)
    np.testing.assert_array_equal(a.numpy(), x)
    sums = np.array([4.0, 12.0], np.float32)
    for max_norm in (2.0, 100.0):
        clipped, norm = Tensor(x, "cpu"), Tensor(np.zeros(()), "cpu")
        cpu.clip_by_norm(clipped, Tensor(sums, "cpu"), max_norm, norm)
        want, length = x.astype(np.float64), np.zeros(())
        reference.clip_by_norm(want, sums, max_norm, length)
        assert float(norm) == length == 4
        np.testing.assert_allclose(clipped.numpy(), want, rtol=1e-5)


def test_the_whole_is_one_program():
    """One model, all of it at once, learns."""
    cycnn.manual_seed(0)
    trainer = trainer_of("adamw", True, optim.schedules.one_cycle(), 0.9, capture=True,
                         clip_grad_norm=1.0)  # fmt: skip
    fit(trainer, 20)
    assert trainer.evaluate(TRAIN)["accuracy"] > 0.9


def test_threads_that_predict_at_once_all_meet_the_average():
    trainer = trainer_of(decay=0.9)
    fit(trainer, 2)
    want = trainer.predict_proba(TRAIN)
    differ = []

    def predict():
        for _ in range(10):
            if not np.array_equal(trainer.predict_proba(TRAIN), want):
                differ.append(1)

    threads = [threading.Thread(target=predict) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differ and not trainer.average.is_applied
