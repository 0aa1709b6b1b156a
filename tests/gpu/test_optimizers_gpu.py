"""Optimizers, groups, clipping and averages on the GPU, alone and in recorded steps."""

import numpy as np
import pytest
from any_shape import check_counted_steps, check_steps

import cycnn
from cycnn import Tensor, Trainer, data, nn, optim
from cycnn.ops import Feed, reference

pytestmark = pytest.mark.gpu

SIZES = (0, 1, 31, 33, 257, 4099, 100_003)


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


def on_gpu(array):
    return None if array is None else Tensor(array, "cuda")


def slabs(n, count, seed=0):
    rng = np.random.default_rng(seed)
    made = [rng.standard_normal(n).astype(np.float32) for _ in range(count)]
    # what comes third and later may be a mean of squares
    return [np.abs(a) if i > 1 else a for i, a in enumerate(made)]


def assert_steps(step, wanted):
    assert step.numpy().tolist() == [wanted, 0], "steps, and blocks that are counted"


COUNTED = {
    "adam": ("adam_step", 4, (None,), (0.9, 0.999, 1e-8, 0.1, False)),
    "adamw": ("adam_step", 4, (None,), (0.9, 0.99, 1e-8, 0.1, True)),
    "adam, no memory": ("adam_step", 4, (None,), (0.0, 0.0, 1e-3, 0.1, True)),
    "amsgrad": ("adam_step", 5, (), (0.9, 0.99, 1e-8, 0.1, True)),
    "adagrad": ("adagrad_step", 3, (), (0.1, 1e-8, 0.1)),
    "sgd": ("damped_sgd_step", 3, (), (0.9, 0.2, 0.1, False)),
    "sgd, nesterov": ("damped_sgd_step", 3, (), (0.9, 0.2, 0.1, True)),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", COUNTED)
def test_counted_steps(ops, name, size):
    op, count, more, numbers = COUNTED[name]
    arrays = [*slabs(size, count), *more]
    # twice without counting, as the first of several slabs, then with it
    advances = False, True, True, False, True
    check_counted_steps(ops, on_gpu, op, arrays, numbers, advances)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_centered_rmsprop(ops, size, momentum):
    param, grad, square, mean, buffer = slabs(size, 5)
    given = [param, grad, square + mean * mean, mean, buffer if momentum else None]
    numbers = 0.9, 1e-2, 0.1, momentum
    check_steps(ops, on_gpu, "centered_rmsprop_step", given, numbers, steps=2)


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("parts", [1, 3, 13, 1024])
def test_sums_of_squares(ops, size, parts):
    (x,) = slabs(size, 1)
    out, want = on_gpu(np.full(parts, np.nan, np.float32)), np.empty(parts)
    ops.square_sums(on_gpu(x), out)
    reference.square_sums(x, want)
    np.testing.assert_allclose(out.numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("max_norm", [0.5, 1e9, 1e-20])
@pytest.mark.parametrize("parts", [1, 300])
def test_clip_by_norm(ops, size, max_norm, parts):
    (x,) = slabs(size, 1)
    sums = np.random.default_rng(1).random(parts).astype(np.float32)
    clipped, norm = on_gpu(x), on_gpu(np.array(np.nan, np.float32))
    want, length = x.astype(float), np.zeros(())
    ops.clip_by_norm(clipped, on_gpu(sums), max_norm, norm)
    reference.clip_by_norm(want, sums, max_norm, length)
    np.testing.assert_allclose(norm.numpy(), length, rtol=1e-5)
    np.testing.assert_allclose(clipped.numpy(), want, rtol=1e-5)
    if max_norm == 1e9:
        np.testing.assert_array_equal(clipped.numpy(), x)


def test_clipping_passes_on_nan(ops):
    x, norm = on_gpu(np.ones(300, np.float32)), on_gpu(np.zeros((), np.float32))
    ops.clip_by_norm(x, on_gpu(np.array([1, np.nan], np.float32)), 1.0, norm)
    assert np.isnan(float(norm)) and np.isnan(x.numpy()).all()


@pytest.mark.parametrize("size", SIZES)
def test_ema_and_swap(ops, size):
    x, y = slabs(size, 2)
    average, want = on_gpu(x), x.astype(float)
    for _ in range(3):
        ops.ema_step(average, on_gpu(y), 0.9)
        reference.ema_step(want, y, 0.9)
    np.testing.assert_allclose(average.numpy(), want, rtol=1e-5, atol=1e-6)
    a, b = on_gpu(x), on_gpu(y)
    ops.swap(a, b)
    np.testing.assert_array_equal(a.numpy(), y)
    np.testing.assert_array_equal(b.numpy(), x)


@pytest.mark.parametrize("groups", [2, 3])
def test_the_next_rates_of_groups(ops, groups):
    order = np.arange(4, dtype=np.int32)
    rates = np.arange(3 * groups, dtype=np.float32).reshape(3, groups) + 1
    room = np.zeros(2, np.int32)
    arrays = (
        order, np.array([0, 1], np.int32), order, room, room.copy(), rates,
        np.zeros(groups, np.float32),
    )  # fmt: skip
    feed = Feed(*map(on_gpu, arrays))
    for wanted in (rates[1], rates[2], rates[2]):  # beyond the end they stay
        ops.begin_step(feed)
        np.testing.assert_array_equal(feed.lr.numpy(), wanted)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_step_without_classes(ops, groups):
    order = np.array([2, 0, 3, 1], np.int32)
    rates = np.arange(3.0 * groups, dtype=np.float32).reshape(3, groups)
    lr = np.zeros(groups, np.float32)
    arrays = order, np.zeros(2, np.int32), order, *np.zeros((2, 2), np.int32), rates, lr
    feed, expected = Feed(*map(on_gpu, arrays)), Feed(*(a.copy() for a in arrays))
    loss_sum, wanted = on_gpu(np.array(1.0, np.float32)), np.array(1.0)
    ops.begin_step(feed)
    reference.begin_step(expected)
    for value in (0.5, 0.25):
        loss = np.array(value, np.float32)
        ops.end_step(on_gpu(loss), None, None, loss_sum, None, feed)
        reference.end_step(loss, None, None, wanted, None, expected)
        assert float(loss_sum) == wanted
        for name in ("position", "index", "lr"):
            np.testing.assert_array_equal(
                getattr(feed, name).numpy(), getattr(expected, name), err_msg=name
            )


# the fused update


class TestUpdater:
    COUNTS = (800, 32, 2051, 64, 10)
    SPLITS = (33, 128, 4, 9, 1)

    def made(self):
        from cycnn.ops import fused as dispatch
        from cycnn.ops import fused_cuda_backward as fused

        if not dispatch.linear_block_supported(cycnn.device("cuda")):
            pytest.skip("no fused kernels on this GPU")
        rng = np.random.default_rng(3)
        entries, parts, at = [], [], 0
        for count, splits in zip(self.COUNTS, self.SPLITS):
            part = rng.standard_normal((splits, count)).astype(np.float32)
            parts.append((at, part))
            entries.append((at, on_gpu(part), None))
            at += -(-count // 64) * 64
        grad = np.zeros(at)
        for offset, part in parts:
            grad[offset : offset + part.shape[1]] = part.sum(0, dtype=np.float64)
        updater = fused.Updater(len(entries), cycnn.device("cuda"))
        updater.plan(entries)
        updater.upload()
        self.kept = entries
        return updater, grad

    @pytest.mark.parametrize("decoupled", [False, True])
    @pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.0)])
    def test_adam(self, betas, decoupled):
        updater, grad = self.made()
        used = grad != 0
        param, _, mean, square = slabs(len(grad), 4)
        given = [on_gpu(a) for a in (param, mean, square)]
        wanted = [a.astype(float) for a in (param, mean, square)]
        held, step = on_gpu(np.zeros(2, np.int32)), np.zeros(2, np.int32)
        lr = np.array(0.01, np.float32)
        numbers = *betas, 1e-8, 0.1, decoupled
        grads = on_gpu(np.full(len(grad), np.nan, np.float32))
        for advance in (True, False, True):
            updater.adam(
                given[0], grads, given[1], given[2], held, advance, on_gpu(lr), *numbers
            )
            reference.adam_step(
                wanted[0], grad, wanted[1], wanted[2], None, step, advance, lr, *numbers
            )
            assert_steps(held, step[0])
        for tensor, want in zip(given, wanted):
            np.testing.assert_allclose(
                tensor.numpy()[used], want[used], rtol=1e-4, atol=2e-5
            )
        np.testing.assert_allclose(grads.numpy()[used], grad[used], atol=2e-5)

    def test_adagrad(self):
        updater, grad = self.made()
        used = grad != 0
        param, _, total = slabs(len(grad), 3)
        given, wanted = [on_gpu(a) for a in (param, total)], [param * 1.0, total * 1.0]
        wanted = [a.astype(float) for a in wanted]
        held, step = on_gpu(np.zeros(2, np.int32)), np.zeros(2, np.int32)
        lr = np.array(0.01, np.float32)
        for advance in (True, False, True):
            updater.adagrad(
                given[0], None, given[1], held, advance, on_gpu(lr), 0.1, 1e-8, 0.1
            )
            reference.adagrad_step(
                wanted[0], grad, wanted[1], step, advance, lr, 0.1, 1e-8, 0.1
            )
            assert_steps(held, step[0])
        for tensor, want in zip(given, wanted):
            np.testing.assert_allclose(
                tensor.numpy()[used], want[used], rtol=1e-4, atol=2e-5
            )


# in training


def images(count=500):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, count)
    drawings = np.kron(rng.integers(0, 2, (10, 7, 7)), np.ones((4, 4)))
    made = np.clip(200 * drawings[labels] + rng.normal(28, 14, (count, 28, 28)), 0, 255)
    return data.ArrayDataset(made.astype(np.uint8), labels, 1 / 255, classes=10)


TRAIN = images()
# eps and accumulators with which a gradient's rounding error stays one in the update
OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.02, momentum=0.9, dampening=0.1),
    "centered": lambda p: optim.RMSprop(p, 0.001, centered=True, eps=1e-2),
    "adam": lambda p: optim.Adam(p, 0.002, eps=1e-3),
    "adamw": lambda p: optim.AdamW(p, 0.002, eps=1e-3, weight_decay=0.1),
    "amsgrad": lambda p: optim.AdamW(p, 0.002, eps=1e-3, amsgrad=True),
    "adagrad": lambda p: optim.Adagrad(
        p, 0.01, lr_decay=0.01, initial_accumulator_value=0.1
    ),
}
FUSED = ("adam", "adamw", "adagrad")


def grouped(model):
    named = model.named_parameters()
    return [
        {"params": [p for n, p in named if "weight" in n], "weight_decay": 0.01},
        {"params": [p for n, p in named if "bias" in n], "lr": 0.0005},
    ]


def trainer_of(kind, groups=False, decay=None, device="cuda", **options):
    cycnn.manual_seed(0)
    model = nn.reference_network().to(device)
    optimizer = OPTIMIZERS[kind](grouped(model) if groups else model.parameters())
    if decay is not None:
        options["average"] = optim.EMA(model.parameters(), decay)
    return Trainer(
        model, nn.NLLLoss(), optimizer, optim.schedules.cosine(0.1), **options
    )


def fit(trainer, epochs=2, **options):
    # 15 steps of 32 and one of 20: graphs of several steps, of one, of the rest
    return trainer.fit(TRAIN, epochs, 32, seed=5, test=TRAIN, **options)


def bits(trainer):
    """Every number that the run holds."""
    states = [trainer.model.state_dict(), trainer.optimizer.state_dict()]
    if trainer.average is not None:
        states.append(trainer.average.state_dict())
    return {
        (i, name): value.tobytes() if isinstance(value, np.ndarray) else value
        for i, state in enumerate(states)
        for name, value in state.items()
    }


def assert_equal_bits(found, wanted):
    assert found.keys() == wanted.keys()
    differ = [name for name in wanted if found[name] != wanted[name]]
    assert not differ, f"these differ: {differ}"


@pytest.mark.long
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "everything"])
def test_recorded_steps_are_eager_steps(kind, extras):
    options = {"groups": True, "decay": 0.9, "clip_grad_norm": 0.5} if extras else {}
    found, losses = [], []
    for capture in (False, True):
        trainer = trainer_of(kind, capture=capture, fuse=False, **options)
        history = fit(trainer)
        found.append(bits(trainer))
        losses.append((history["loss"], history["test_loss"]))
    assert_equal_bits(found[1], found[0])
    assert losses[0] == losses[1]


@pytest.mark.long
@pytest.mark.parametrize("kind", FUSED)
@pytest.mark.parametrize("groups", [False, True], ids=["one", "groups"])
def test_the_fused_update_is_the_plain_one(kind, groups):
    weights, losses = [], []
    for fuse in (False, True):
        trainer = trainer_of(kind, groups, fuse=fuse, decay=0.9)
        if fuse:
            assert trainer.optimizer.partial_step() is not None
        history = fit(trainer)
        assert trainer.optimizer.state_dict()["step"] == 32
        weights.append(trainer.model.state_dict())
        losses.append(history["loss"] + history["test_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)
    for name, array in weights[0].items():
        np.testing.assert_allclose(weights[1][name], array, atol=2e-3, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sgd", "centered", "amsgrad"])
def test_others_fall_back_from_the_fused_update(kind):
    trainer = trainer_of(kind, fuse=True)
    assert trainer.optimizer.partial_step() is None
    fused = fit(trainer)["loss"]
    assert fused == pytest.approx(fit(trainer_of(kind, fuse=False))["loss"], rel=2e-3)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["adam", "adagrad"])
def test_two_fused_runs_have_the_same_bits(kind):
    trainers = [trainer_of(kind, True, 0.9) for _ in range(2)]
    for trainer in trainers:
        fit(trainer)
    assert_equal_bits(bits(trainers[1]), bits(trainers[0]))


@pytest.mark.long
def test_clipping_in_fused_steps():
    found = [
        fit(trainer_of("adam", fuse=fuse, clip_grad_norm=0.2))["loss"]
        for fuse in (False, True)
    ]
    assert found[1] == pytest.approx(found[0], rel=2e-3)
    assert found[0] != fit(trainer_of("adam", fuse=False))["loss"]


@pytest.mark.long
@pytest.mark.parametrize("clip", [None, 0.5], ids=["whole", "clipped"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, clip):
    path = tmp_path / "run"
    whole = trainer_of("adamw", True, 0.9, clip_grad_norm=clip)
    fit(whole, 3)
    half = trainer_of("adamw", True, 0.9, clip_grad_norm=clip)

    class Stop:
        def on_epoch_end(self, trainer, record):
            trainer.save(path)
            trainer.stop()

    fit(half, 3, callbacks=[Stop()])
    fresh = trainer_of("adamw", True, 0.9)
    resumed = Trainer.resume(
        path, fresh.model, fresh.loss, fresh.optimizer, fresh.schedule,
        clip_grad_norm=clip, average=fresh.average,
    )  # fmt: skip
    assert resumed.optimizer.state_dict()["step"] == 16
    fit(resumed, 3)
    assert_equal_bits(bits(resumed), bits(whole))
    assert resumed.history["test_loss"] == whole.history["test_loss"]


@pytest.mark.long
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_gpu_trains_as_the_cpu_does(kind):
    losses = [
        fit(trainer_of(kind, True, 0.9, device, clip_grad_norm=1.0), 1)["loss"]
        for device in ("cpu", "cuda")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


@pytest.mark.long
def test_state_moves_between_devices():
    trainer = trainer_of("adam", decay=0.9)
    fit(trainer, 1)
    before = bits(trainer)
    for device in ("cpu", "cuda"):
        trainer.model.to(device)
        assert_equal_bits(bits(trainer), before)
    fit(trainer, 2)
    assert trainer.optimizer.state_dict()["step"] == 32
