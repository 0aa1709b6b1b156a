"""BatchNorm2d on the GPU against its specification, captured, and trained."""

import numpy as np
import pytest
from bounds import F32, assert_close, assert_same_bits, on_gpu, poison
from test_batch_norm import EPS, TEST, TRAIN, arguments
from training import CLASSES, digest, figures

import cycnn
from cycnn import Tensor, Trainer, nn, optim
from cycnn.ops import reference

# one part; several, of whole images and not; planes of four pixels and not; pixel 1
SHAPES = (
    (2, 1, 1, 1),
    (1, 3, 1, 2),
    (33, 5, 7, 7),
    (3, 257, 2, 2),
    (31, 33, 4, 4),
    (9, 3, 31, 33),
    (2, 2, 64, 80),
    (300, 3, 8, 8),
    (5000, 2, 1, 1),
)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def poisoned(*shape):
    return on_gpu(np.full(shape, np.nan, np.float32))


@pytest.mark.parametrize("momentum", (0.1, None))
@pytest.mark.parametrize("offset", (0.0, 100.0), ids=("centred", "offset"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(ops, shape, offset, momentum):
    c = shape[1]
    x = normal(*shape) + np.float32(offset)
    given = [array.astype(np.float32) for array in arguments(c)[:4]]
    batches = np.int32(3)

    def run():
        tensors = [on_gpu(array) for array in (x, *given, batches)]
        return ops.batch_norm2d_forward(*tensors, momentum, EPS), tensors

    (y, mean, variance), tensors = run()
    exact = [array.astype(np.float64) for array in given[2:]]
    counter = np.array(batches)
    want = reference.batch_norm2d_forward(x, *given[:2], *exact, counter, momentum, EPS)
    size = 1 + np.abs(x).max()
    assert_close(mean, want[1], 4 * F32 * size)
    assert_close(variance, want[2], 1e-5 * (want[2] + F32 * size**2))
    # the mean's error, and that of 1 / sqrt(variance), scaled by what y may be
    r = (1 / np.sqrt(want[2] + EPS))[:, None, None]
    weight = np.abs(given[0])[:, None, None]
    assert_close(
        y, want[0], 16 * F32 * (size * r * weight + 1) + 2e-5 * np.abs(want[0])
    )
    for tensor, array in zip(tensors[3:5], exact):
        assert_close(tensor, array, 2e-5 * np.abs(array) + 4 * F32 * size)
    assert int(tensors[5]) == 4
    (again, *_), tensors_again = run()
    assert_same_bits(again, y)
    for one, other in zip(tensors[3:5], tensors_again[3:5]):
        assert_same_bits(one, other)


def test_the_variance_survives_a_large_mean(ops):
    x = 10000 + normal(64, 2, 16, 16)
    _, mean, variance = ops.batch_norm2d_forward(
        on_gpu(x), None, None, None, None, None, 0.1, EPS
    )
    exact = x.astype(np.float64)
    assert_close(variance, exact.var(axis=(0, 2, 3)), 2e-5)
    assert_close(mean, exact.mean(axis=(0, 2, 3)), 2e-3)


def test_nan_stays_in_its_channel(ops):
    x = normal(5, 3, 4, 4)
    x[2, 1, 3, 3] = np.nan
    running = on_gpu(np.zeros(3, "f")), on_gpu(np.ones(3, "f"))
    batches = on_gpu(np.array(0, np.int32))
    y, mean, variance = ops.batch_norm2d_forward(
        on_gpu(x), None, None, *running, batches, 0.1, EPS
    )
    for tensor in (mean, variance, *running):
        np.testing.assert_array_equal(np.isnan(tensor.numpy()), [False, True, False])
    assert np.isnan(y.numpy()[:, 1]).all() and np.isfinite(y.numpy()[:, ::2]).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("of_batch", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("accumulate", (False, True), ids=("write", "accumulate"))
def test_backward(ops, shape, of_batch, accumulate):
    c, count = shape[1], np.prod(shape) // shape[1]
    x, dy = normal(*shape) + 1, normal(*shape, seed=1)
    weight, _, mean, variance, _ = (a.astype(np.float32) for a in arguments(c))
    if of_batch:
        mean, variance = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
    before = np.full(c, 3, np.float32) if accumulate else np.full(c, np.nan, "f")

    def run(weight, need_dx=True):
        dw, db = on_gpu(before), on_gpu(before)
        dx = ops.batch_norm2d_backward(
            on_gpu(dy), on_gpu(x), on_gpu(weight), on_gpu(mean), on_gpu(variance), dw,
            db, EPS, of_batch, need_dx, accumulate,
        )  # fmt: skip
        return dx, dw, db

    got = run(weight)
    dw, db = before.astype(np.float64), before.astype(np.float64)
    want = reference.batch_norm2d_backward(
        dy, x, weight, mean, variance, dw, db, EPS, of_batch, True, accumulate
    )
    r = 1 / np.sqrt(variance.astype(np.float64) + EPS)
    u = np.abs(x - mean[:, None, None]) * r[:, None, None]
    sums = np.abs(dy).sum(axis=(0, 2, 3)), (np.abs(dy) * u).sum(axis=(0, 2, 3))
    # a thread adds some 16 numbers of a part, a warp its parts
    bound = [(64 + count // 4096) * F32 * (s + 3) for s in sums]
    assert_close(got[2], db, bound[0])
    assert_close(got[1], dw, bound[1])
    largest = np.abs(dy) + ((sums[0] + sums[1]) / count)[:, None, None] * (1 + u)
    assert_close(
        got[0], want, 128 * F32 * largest * (np.abs(weight) * r)[:, None, None]
    )
    for one, other in zip(got, run(weight)):
        assert_same_bits(one, other)
    nothing, dw_again, db_again = run(weight, need_dx=False)
    assert nothing is None
    assert_same_bits(dw_again, got[1])
    assert_same_bits(db_again, got[2])
    plain = run(None)[0]
    want = want / weight[:, None, None]
    assert_close(plain, want, 256 * F32 * largest * r[:, None, None])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("of_batch", (True, False), ids=("training", "evaluation"))
def test_relu_behind_it_has_the_bits_of_a_relu(ops, shape, of_batch):
    c = shape[1]
    weight, bias, mean, variance, _ = arguments(c)
    given = [on_gpu(a.astype("f")) for a in (normal(*shape), weight, bias)]
    mean, variance = on_gpu(mean.astype("f")), on_gpu(variance.astype("f"))
    dy = on_gpu(normal(*shape, seed=1))
    results = []
    for relu in (False, True):
        if of_batch:
            y, mean, variance = ops.batch_norm2d_forward(
                *given, None, None, None, 0.1, EPS, relu
            )
        else:
            y = ops.batch_norm2d_inference(*given, mean, variance, EPS, relu)
        passed = dy
        if not relu:
            y = ops.relu_forward(y)
            passed = ops.relu_backward(dy, y)
        dw, db = poisoned(c), poisoned(c)
        dx = ops.batch_norm2d_backward(
            passed, *given[:2], mean, variance, dw, db, EPS, of_batch, relu=relu,
            bias=given[2],
        )  # fmt: skip
        results.append((y, dx, dw, db))
    for apart, together in zip(*results):
        assert_same_bits(apart, together)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inference(ops, shape):
    weight, bias, mean, variance, _ = (a.astype("f") for a in arguments(shape[1]))
    x = normal(*shape)
    for w, b in ((weight, bias), (None, None)):
        given = [on_gpu(array) for array in (x, w, b, mean, variance)]
        y = ops.batch_norm2d_inference(*given, EPS)
        want = reference.batch_norm2d_inference(x, w, b, mean, variance, EPS)
        assert_close(y, want, 16 * F32 * (5 + np.abs(want)))


def test_an_unaligned_input_gives_the_same_bits(ops):
    x = normal(2 * 3 * 64 + 1)
    a = on_gpu(x)[1:].reshape(2, 3, 8, 8)
    b = on_gpu(x[1:].copy()).reshape(2, 3, 8, 8)
    rest = (None, None, None, None, None, 0.1, EPS)
    results = [ops.batch_norm2d_forward(tensor, *rest) for tensor in (a, b)]
    for one, other in zip(*results):
        assert_same_bits(one, other)
    gradients = [
        ops.batch_norm2d_backward(x_, x_, None, *seen[1:], None, None, EPS)
        for x_, seen in zip((a, b), results)
    ]
    assert_same_bits(*gradients)


def test_an_empty_batch(ops):
    x = on_gpu(np.zeros((0, 3, 4, 4), "f"))
    y, mean, variance = ops.batch_norm2d_forward(x, *(None,) * 5, 0.1, EPS)
    dw, db = poisoned(3), poisoned(3)
    dx = ops.batch_norm2d_backward(x, x, None, mean, variance, dw, db, EPS)
    assert y.shape == dx.shape == x.shape
    assert (dw.numpy() == 0).all() and (db.numpy() == 0).all()


@pytest.mark.parametrize("training", (True, False), ids=("training", "evaluation"))
@pytest.mark.parametrize("momentum", (0.1, None))
def test_captured_has_the_bits_of_eager(training, momentum):
    from cycnn.gpu.graph import Graph

    layers = [nn.BatchNorm2d(3, momentum=momentum).to("cuda") for _ in range(2)]
    for layer in layers:
        layer.train(training)
    x, dy = on_gpu(normal(300, 3, 8, 8)), on_gpu(normal(300, 3, 8, 8, seed=1))

    def run(layer):
        return layer(x), layer.backward(dy)

    graph = Graph(0)
    graph.rehearse(lambda: run(layers[0]))
    run(layers[1])
    captured = graph.record(lambda: run(layers[0]))
    for seed in range(3):
        x.copy_(normal(*x.shape, seed=seed))
        graph.launch()
        for got, want in zip(captured, run(layers[1])):
            assert_same_bits(got, want)
        states = [layer.state_dict() for layer in layers]
        for name, array in states[0].items():
            np.testing.assert_array_equal(array, states[1][name], err_msg=name)
    assert int(layers[0].num_batches_tracked.data) == (4 if training else 0)


def make_trainer(device="cuda", **settings):
    cycnn.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
        nn.LogSoftmax(),
    ).to(device)
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Trainer(model, nn.NLLLoss(), optimizer, **settings)


@pytest.mark.long
@pytest.mark.parametrize("fuse", (False, True), ids=("plain", "fused"))
def test_recorded_steps_end_with_the_same_bits(fuse):
    trainers = [make_trainer(capture=c, fuse=fuse) for c in (False, True)]
    histories = [t.fit(TRAIN, 2, 32, seed=5, test=TEST) for t in trainers]
    assert digest(trainers[0]) == digest(trainers[1])
    assert figures(histories[0]) == figures(histories[1])
    assert int(trainers[1].model[1].num_batches_tracked.data) == 14


@pytest.mark.long
def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole, first = make_trainer(), make_trainer()
    whole.fit(TRAIN, 3, 32, seed=5)
    first.fit(TRAIN, 1, 32, seed=5)
    first.save(tmp_path / "run")
    other = make_trainer()
    resumed = Trainer.resume(tmp_path / "run", other.model, other.loss, other.optimizer)
    resumed.fit(TRAIN, 3, 32)
    assert digest(resumed) == digest(whole)


@pytest.mark.long
def test_both_devices_agree_over_an_epoch():
    states = []
    for device in ("cpu", "cuda"):
        trainer = make_trainer(device)
        trainer.fit(TRAIN, 1, 50, seed=5)
        states.append(trainer.model.state_dict())
    for name, array in states[0].items():
        np.testing.assert_allclose(
            states[1][name], array, rtol=2e-2, atol=2e-3, err_msg=name
        )


def test_buffers_move_with_the_layer():
    layer = nn.BatchNorm2d(3, affine=False).to("cpu")
    x = normal(4, 3, 2, 2)
    layer(x)
    state = layer.state_dict()
    for device in ("cuda", "cpu"):
        layer.to(device)
        assert layer.device == device and layer.running_mean.device == device
        for name, array in layer.state_dict().items():
            np.testing.assert_array_equal(array, state[name])
    layer.to("cuda")(Tensor(x, "cuda"))
    assert int(layer.num_batches_tracked.data) == 2
    with pytest.raises(TypeError, match="is on cuda:0, its input on cpu"):
        layer(Tensor(x, "cpu"))


@pytest.mark.long
def test_predictions_use_the_running_statistics_of_now():
    trainer = make_trainer()
    x = normal(9, 1, 6, 6)
    for _ in range(2):
        trainer.fit(TRAIN, trainer.epoch + 1, 32, seed=5)
        found = [trainer.model.predict(x) for _ in range(3)]
        want = nn.fuse(trainer.model.eval())(x).numpy()
        for array in found:
            np.testing.assert_array_equal(array, want)


@pytest.mark.long
def test_a_folded_model_predicts_the_same():
    trainer = make_trainer()
    trainer.fit(TRAIN, 2, 32, seed=5)
    folded = nn.fold_batch_norm(trainer.model)
    assert folded.device == trainer.model.device
    x = normal(33, 1, 6, 6)
    want = trainer.model.predict(x)
    for _ in range(3):
        np.testing.assert_allclose(folded.predict(x), want, rtol=1e-4, atol=1e-4)
