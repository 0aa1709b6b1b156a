"""Losses on the GPU against float64; numbers as targets in recorded steps."""

import numpy as np
import pytest
from any_shape import element_formulas, within

import cycnn
from cycnn import Tensor, Trainer, data, nn, optim
from cycnn.data import loader as loader_module
from cycnn.ops import reference

pytestmark = pytest.mark.gpu

ELEMENT = {
    "mse": ("mse_loss", ()),
    "l1": ("smooth_l1_loss", (0.0,)),
    "smooth l1": ("smooth_l1_loss", (0.3,)),
    "bce": ("bce_with_logits", (None,)),
    "bce, one weight": ("bce_with_logits", (np.array([2.5], np.float32),)),
}
SHAPES = [
    (), (1,), (1, 1), (31,), (33, 1), (257, 3), (0, 3), (128, 3, 32, 32), (2049, 1031),
]  # fmt: skip


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


def on_gpu(x):
    return Tensor(x, "cuda") if isinstance(x, np.ndarray) else x


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ELEMENT)
def test_element_losses(ops, name, shape, mean):
    op, more = ELEMENT[name]
    rng = np.random.default_rng(11)
    x = np.array(rng.standard_normal(shape) * 3, np.float32)
    target = np.array(rng.random(shape), np.float32)
    given = on_gpu(x), on_gpu(target), *map(on_gpu, more), mean
    value, slope = element_formulas(op, x, target, *more)
    divisor = max(x.size, 1) if mean else 1
    want = getattr(reference, f"{op}_forward")(x, target, *more, mean)
    found = [getattr(ops, f"{op}_forward")(*given) for _ in range(2)]
    # the sum of as many terms could be off by more, were it not of sums
    np.testing.assert_allclose(float(found[0]), want, rtol=2e-5)
    if x.size:
        within(found[0], want, value.sum() / divisor)
    np.testing.assert_equal(*map(float, found))
    dx = getattr(ops, f"{op}_backward")(*given)
    want = getattr(reference, f"{op}_backward")(x, target, *more, mean)
    within(dx, want, slope / divisor)


def test_special_numbers(ops):
    x = np.array([1e4, -1e4, np.nan, 0.0, np.inf], np.float32)
    target = np.array([0.0, 1.0, 0.5, 0.0, 1.0], np.float32)
    for op, more in ELEMENT.values():
        given = on_gpu(x), on_gpu(target), *map(on_gpu, more), False
        with np.errstate(all="ignore"):
            want = getattr(reference, f"{op}_backward")(x, target, *more, False)
        found = getattr(ops, f"{op}_backward")(*given).numpy()
        np.testing.assert_allclose(found[:4], want[:4], rtol=1e-5, err_msg=op)


def test_pos_weight_repeats(ops):
    rng = np.random.default_rng(12)
    x, target = rng.standard_normal((33, 3, 5)), rng.random((33, 3, 5))
    weight = rng.random(15) * 3
    x, target, weight = (a.astype(np.float32) for a in (x, target, weight))
    given = on_gpu(x), on_gpu(target), on_gpu(weight), True
    np.testing.assert_allclose(
        float(ops.bce_with_logits_forward(*given)),
        reference.bce_with_logits_forward(x, target, weight, True),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        ops.bce_with_logits_backward(*given).numpy(),
        reference.bce_with_logits_backward(x, target, weight, True),
        rtol=1e-4,
        atol=1e-8,
    )


@pytest.mark.parametrize("mean", [True, False], ids=["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignore_index", [None, 0, -100])
@pytest.mark.parametrize(
    "shape", [(1, 2), (31, 10), (257, 33), (9, 1), (0, 4), (5, 2100)]
)
def test_class_losses(ops, shape, ignore_index, smoothing, weighted, mean):
    n, f = shape
    rng = np.random.default_rng(13)
    x = (rng.standard_normal(shape) * 2).astype(np.float32)
    labels = rng.integers(0, f, n).astype(np.int32)
    if n:
        labels[0] = f - 1
    if ignore_index == -100:
        labels[1::3] = -100
    weight = (rng.random(f) + 0.5).astype(np.float32) if weighted else None
    options = smoothing, ignore_index
    for name in ("nll_loss", "cross_entropy"):
        forward = f"weighted_{name}_forward"
        want = getattr(reference, forward)(x, labels, weight, *options, mean)
        found = getattr(ops, forward)(
            on_gpu(x), on_gpu(labels), on_gpu(weight), *options, mean
        )
        for a, b in zip(found, want):
            np.testing.assert_allclose(a.numpy(), b, rtol=2e-5, atol=1e-6)
        log_probs = x if name == "nll_loss" else want[2].astype(np.float32)
        total = np.array(want[1], np.float32)
        backward = f"weighted_{name}_backward"
        dx = getattr(ops, backward)(
            on_gpu(log_probs), on_gpu(labels), on_gpu(weight), *options, on_gpu(total)
        )
        expected = getattr(reference, backward)(
            log_probs, labels, weight, *options, total
        )
        np.testing.assert_allclose(dx.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_rows_that_do_not_count(ops):
    x = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    assert np.isnan(float(loss(on_gpu(x), np.full(3, -1))))
    np.testing.assert_array_equal(loss.backward().numpy(), np.zeros((3, 4)))
    # what a host would refuse becomes NaN, and is never followed
    labels = Tensor(np.array([0, 10**9, -7], np.int32), "cuda")
    weighted = nn.NLLLoss(weight=[1, 2, 3, 4])
    assert np.isnan(float(weighted(on_gpu(x), labels)))


def regression(own):
    rng = np.random.default_rng(7)
    images = rng.integers(0, 256, (500, 1, 8, 8), dtype=np.uint8)
    flat = images.reshape(500, 64) / 255
    targets = np.stack([flat.sum(1) / 8, flat[:, 0] - flat[:, 5]], 1)
    return data.TargetDataset(images, None if own else targets, 1 / 255)


def trainer_of(loss, own, device="cuda", **options):
    cycnn.manual_seed(3)
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 2)]
    if own:
        layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 1)]
    model = nn.Sequential(*layers).to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    return Trainer(model, loss, optimizer, **options)


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True], ids=["numbers", "autoencoder"])
@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streams"])
@pytest.mark.parametrize("fuse", [False, True], ids=["plain", "fused"])
def test_recorded_steps_are_eager_steps(own, streams, fuse, monkeypatch):
    if streams:
        monkeypatch.setattr(loader_module, "_free_memory", lambda device: 0)
    states, losses = [], []
    for capture in (False, True):
        trainer = trainer_of(nn.MSELoss(), own, capture=capture, fuse=fuse)
        history = trainer.fit(regression(own), 3, 32, seed=5, test=regression(own))
        states.append(trainer.model.state_dict())
        losses.append((history["loss"], history["test_loss"]))
        assert history["accuracy"] == [None] * 3
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    for name, array in states[0].items():
        if fuse:  # the update of a recorded step adds up the parts in another order
            np.testing.assert_allclose(states[1][name], array, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(states[1][name], array)


@pytest.mark.long
def test_the_gpu_trains_as_the_cpu_does():
    losses = [
        trainer_of(nn.SmoothL1Loss(), False, device).fit(
            regression(False), 3, 32, seed=1
        )
        for device in ("cpu", "cuda")
    ]
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [{"weight": [1, 2, 3, 4]}, {"label_smoothing": 0.1}, {"ignore_index": 2}],
    ids=str,
)
def test_options_in_recorded_steps(options):
    images = regression(True).images
    dataset = data.ArrayDataset(images, np.arange(500) % 4, 1 / 255)
    runs = []
    for capture in (False, True):
        cycnn.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).to("cuda")
        optimizer = optim.SGD(model.parameters(), lr=0.05)
        trainer = Trainer(
            model,
            nn.CrossEntropyLoss(**options),
            optimizer,
            capture=capture,
            fuse=False,
        )
        history = trainer.fit(dataset, 3, 32, seed=5)
        runs.append((history["loss"], history["accuracy"], model.state_dict()))
    assert runs[0][:2] == runs[1][:2]
    for name, array in runs[0][2].items():
        np.testing.assert_array_equal(runs[1][2][name], array)
