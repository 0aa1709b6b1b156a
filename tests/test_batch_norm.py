"""BatchNorm2d on the CPU: statistics, gradients, buffers."""

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_reference import slope
from training import CLASSES, digest, figures, patterns

import cycnn
from cycnn import Tensor, Trainer, devices, nn, optim
from cycnn.errors import ShapeError
from cycnn.ops import cpu, reference

F32 = 2.0**-24
EPS = 1e-5


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def arguments(c, seed=0):
    """weight, bias, running_mean, running_var, batches"""
    rng = np.random.default_rng(seed)
    weight, bias, mean = rng.standard_normal((3, c))
    return weight, bias, mean, rng.uniform(0.5, 2, c), np.array(3, np.int32)


# the specification


@pytest.mark.parametrize("of_batch", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_specification_has_the_slope_of_its_function(of_batch, affine):
    x, dy = normal(3, 2, 2, 3), normal(3, 2, 2, 3, seed=1)
    weight, bias, mean, variance, _ = arguments(2)
    if not affine:
        weight = bias = None

    def forward():
        if of_batch:
            given = None, None, None, 0.1, EPS
            return reference.batch_norm2d_forward(x, weight, bias, *given)
        y = reference.batch_norm2d_inference(x, weight, bias, mean, variance, EPS)
        return y, mean, variance

    seen = forward()[1:]
    dweight, dbias = (np.empty(2), np.empty(2)) if affine else (None, None)
    dx = reference.batch_norm2d_backward(
        dy, x, weight, *seen, dweight, dbias, EPS, of_batch
    )
    pairs = [(dx, x)]
    if affine:
        pairs += [(dweight, weight), (dbias, bias)]
    for found, array in pairs:
        expected = slope(lambda: forward()[0], array, dy)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)


def test_the_specification_normalises():
    x = 5 + 3 * normal(4, 3, 5, 6)
    y, mean, variance = reference.batch_norm2d_forward(
        x, None, None, None, None, None, 0.1, 0.0
    )
    np.testing.assert_allclose(y.mean(axis=(0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(y.var(axis=(0, 2, 3)), 1)
    np.testing.assert_allclose(mean, x.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(variance, x.var(axis=(0, 2, 3)))


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
def test_running_statistics(momentum):
    mean, var, batches = np.zeros(2), np.ones(2), np.array(0, np.int32)
    seen = []
    for seed in range(3):
        x = normal(4, 2, 3, 3, seed=seed)
        reference.batch_norm2d_forward(x, None, None, mean, var, batches, momentum, EPS)
        seen.append((x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3), ddof=1)))
    assert batches == 3
    if momentum is None:
        expected = np.mean(seen, axis=0)
    else:
        expected = np.array([np.zeros(2), np.ones(2)])
        for batch in seen:
            expected = (1 - momentum) * expected + momentum * np.array(batch)
    np.testing.assert_allclose([mean, var], expected, rtol=1e-12)


# the CPU


def check(shape, offset=0.0, scale=1.0, momentum=0.1, seed=0):
    c = shape[1]
    x = (offset + scale * normal(*shape, seed=seed)).astype(np.float32)
    given = [array.astype(np.float32) for array in arguments(c)[:4]]
    weight, bias, mean, var = given
    batches = np.array(3, np.int32)
    tensors = [Tensor(a, "cpu") for a in (x, *given, batches)]
    exact = [a.astype(np.float64) for a in (mean, var)]
    want = reference.batch_norm2d_forward(
        x, weight, bias, *exact, batches, momentum, EPS
    )
    got = cpu.batch_norm2d_forward(*tensors, momentum, EPS)
    # x itself is rounded to within F32 |x|
    off = 8 * F32 * (1 + (abs(offset) + scale) / scale)
    for found, expected, size in zip(got, want, (4, abs(offset) + scale, scale**2)):
        np.testing.assert_allclose(
            found.numpy(), expected, rtol=16 * F32, atol=off * size
        )
    for tensor, expected in zip(tensors[3:5], exact):
        size = abs(offset) + scale**2 + 1
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=off * size)
    assert int(tensors[5]) == 4 - (x.size == 0)

    dy = normal(*shape, seed=seed + 1).astype(np.float32)
    for of_batch in True, False:
        for accumulate in False, True:
            dw, db = np.full(c, 3.0), np.full(c, 3.0)
            targets = Tensor(dw, "cpu"), Tensor(db, "cpu")
            statistics = [s.numpy() for s in got[1:]]
            expected = reference.batch_norm2d_backward(
                dy, x, weight, *statistics, dw, db, EPS, of_batch, True, accumulate
            )
            dx = cpu.batch_norm2d_backward(
                Tensor(dy, "cpu"), tensors[0], tensors[1], *got[1:], *targets, EPS,
                of_batch, True, accumulate,
            )  # fmt: skip
            size = (abs(weight) / np.sqrt(statistics[1] + EPS)).max(initial=1)
            np.testing.assert_allclose(
                dx.numpy(), expected, rtol=64 * F32, atol=8 * off * size
            )
            count = max(x.size // c, 1)
            for target, value in zip(targets, (dw, db)):
                np.testing.assert_allclose(
                    target.numpy(), value, rtol=1e-5, atol=off * count
                )


@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1, 1), (1, 3, 1, 2), (0, 3, 4, 4), (33, 5, 7, 7), (3, 257, 2, 2)],
    ids=str,
)
def test_shapes(shape):
    check(shape)
    check(shape, momentum=None)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 7), st.integers(2, 7),
    st.sampled_from([0.0, 10.0, -300.0]), st.sampled_from([0.1, 1.0, 20.0]),
)  # fmt: skip
def test_any_shape_offset_and_scale(n, c, h, w, offset, scale):
    check((n, c, h, w), offset, scale)


def test_the_variance_survives_a_large_mean():
    # a difference of sums of squares would have no digit left
    x = (10000 + normal(64, 2, 8, 8)).astype(np.float32)
    _, mean, variance = cpu.batch_norm2d_forward(
        Tensor(x, "cpu"), None, None, None, None, None, 0.1, EPS
    )
    exact = x.astype(np.float64)
    np.testing.assert_allclose(variance.numpy(), exact.var(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(mean.numpy(), exact.mean(axis=(0, 2, 3)), rtol=1e-7)


@pytest.mark.parametrize("of_batch", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_relu_behind_it(of_batch, affine):
    x, dy = normal(2, 3, 2, 5, 4, seed=7)
    weight, bias, mean, variance, _ = arguments(2)
    if not affine:
        weight = bias = None
    if of_batch:
        mean, variance = x.mean(axis=(0, 2, 3)), x.var(axis=(0, 2, 3))
    given = mean, variance
    forward = lambda relu: (
        reference.batch_norm2d_forward(x, weight, bias, *(None,) * 3, 0.1, EPS, relu)[0]
        if of_batch
        else reference.batch_norm2d_inference(x, weight, bias, *given, EPS, relu)
    )
    plain = forward(False)
    assert abs(plain).min() > 1e-4, "no number at the bend"
    np.testing.assert_array_equal(forward(True), np.maximum(plain, 0))
    sums = [np.empty(2), np.empty(2)]
    dx = reference.batch_norm2d_backward(
        dy, x, weight, *given, *sums, EPS, of_batch, relu=True, bias=bias
    )
    expected = slope(lambda: forward(True), x, dy)
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-7)

    tensors = [a if a is None else Tensor(a, "cpu") for a in (x, weight, bias, *given)]
    if of_batch:
        found = cpu.batch_norm2d_forward(*tensors[:3], *(None,) * 3, 0.1, EPS, True)[0]
    else:
        found = cpu.batch_norm2d_inference(*tensors, EPS, True)
    np.testing.assert_allclose(found.numpy(), forward(True), atol=1e-5)
    targets = Tensor(np.empty(2), "cpu"), Tensor(np.empty(2), "cpu")
    found = cpu.batch_norm2d_backward(
        Tensor(dy, "cpu"), *tensors[:2], *tensors[3:], *targets, EPS, of_batch,
        relu=True, bias=tensors[2],
    )  # fmt: skip
    np.testing.assert_allclose(found.numpy(), dx, rtol=1e-4, atol=1e-5)
    for target, value in zip(targets, sums):
        np.testing.assert_allclose(target.numpy(), value, rtol=1e-4, atol=1e-5)


# the layer


def layer_with_state(c=4, **settings):
    layer = nn.BatchNorm2d(c, **settings)
    rng = np.random.default_rng(5)
    state = {
        name: value if not value.shape else rng.uniform(0.5, 2, c).astype("f")
        for name, value in layer.state_dict().items()
    }
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("training", [True, False])
def test_gradients_are_added_and_left_out_when_asked(training):
    layer = layer_with_state().train(training)
    x, dy = normal(2, 5, 4, 3, 3).astype(np.float32)
    layer(x)
    dx = layer.backward(dy).numpy()
    once = [p.grad.numpy().copy() for p in layer.parameters()]
    layer(x)
    np.testing.assert_array_equal(layer.backward(dy, accumulate=True).numpy(), dx)
    for parameter, gradient in zip(layer.parameters(), once):
        np.testing.assert_allclose(parameter.grad.numpy(), 2 * gradient, rtol=1e-6)
    layer(x)
    assert layer.backward(dy, input_grad=False) is None
    for parameter, gradient in zip(layer.parameters(), once):
        np.testing.assert_array_equal(parameter.grad.numpy(), gradient)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(dy)


def test_evaluation_changes_nothing():
    layer = layer_with_state().eval()
    before = layer.state_dict()
    x = normal(5, 4, 3, 3).astype(np.float32)
    y = layer(x)
    np.testing.assert_array_equal(y.numpy()[2:3], layer(x[2:3]).numpy())
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert layer(x[:1, :, :1, :1]).shape == (1, 4, 1, 1)


def test_names_and_order_of_the_state():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU())
    names = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert list(model.state_dict()) == ["0.weight", "0.bias"] + [
        f"1.{name}" for name in names
    ]
    assert [name for name, _ in model.named_buffers()] == [f"1.{n}" for n in names[2:]]
    assert len(model.parameters()) == 4
    assert list(nn.fuse(model).state_dict()) == list(model.state_dict())
    plain = nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    assert plain.state_dict() == {} and plain.parameters() == []
    assert list(nn.BatchNorm2d(3, affine=False).state_dict()) == names[2:]


def test_without_running_statistics_the_batch_is_used_always():
    layer = nn.BatchNorm2d(2, track_running_stats=False).eval()
    x = normal(3, 2, 4, 4).astype(np.float32)
    expected = reference.batch_norm2d_forward(x, *(None,) * 5, 0.1, EPS)[0]
    np.testing.assert_allclose(layer(x).numpy(), expected, atol=1e-5)


def test_a_state_goes_through_a_file(tmp_path):
    layer, other = layer_with_state(), nn.BatchNorm2d(4)
    layer(normal(5, 4, 3, 3).astype(np.float32))
    layer.save(tmp_path / "state")
    other.load(tmp_path / "state")
    assert int(other.num_batches_tracked.data) == 1
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(other.state_dict()[name], array)


def test_states_that_do_not_fit():
    layer = layer_with_state()
    before = layer.state_dict()
    state = {**before, "weight": before["weight"] + 1}
    for name, wrong, message in (
        ("running_mean", np.zeros(3, "f"), r"buffer running_mean has shape \(4,\)"),
        ("num_batches_tracked", np.array(1.0), "not an integer type"),
        ("num_batches_tracked", np.array(2**40), "do not fit int32"),
        ("running_var", np.zeros(4, int), "buffer running_var is float32"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            layer.load_state_dict({**state, name: wrong})
    del state["running_var"]
    with pytest.raises(ValueError, match="buffer running_var is missing"):
        layer.load_state_dict(state)
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    layer.load_state_dict({**before, "num_batches_tracked": np.array(7, np.int64)})
    assert int(layer.num_batches_tracked.data) == 7


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
)
def test_a_copy_has_buffers_of_its_own(copied):
    layer = layer_with_state()
    before = layer.state_dict()
    other = copied(layer)
    other(normal(5, 4, 3, 3).astype(np.float32))
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
    assert (other.state_dict()["running_mean"] != before["running_mean"]).all()


def test_one_value_per_channel_is_refused_in_training():
    layer = nn.BatchNorm2d(3)
    with pytest.raises(
        ShapeError, match=r"BatchNorm2d\(3.*one value per channel.*eval"
    ):
        layer(np.zeros((1, 3, 1, 1), np.float32))
    assert int(layer.num_batches_tracked.data) == 0
    assert layer.eval()(np.zeros((1, 3, 1, 1), np.float32)).shape == (1, 3, 1, 1)


def test_an_empty_batch_leaves_the_statistics_alone():
    layer = layer_with_state()
    before = layer.state_dict()
    assert layer(np.zeros((0, 4, 3, 3), np.float32)).shape == (0, 4, 3, 3)
    assert layer.backward(np.zeros((0, 4, 3, 3), np.float32)).shape == (0, 4, 3, 3)
    assert all((p.grad.numpy() == 0).all() for p in layer.parameters())
    for name, array in layer.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_arguments_and_names():
    assert repr(nn.BatchNorm2d(8)) == "BatchNorm2d(8, 16 parameters)"
    assert repr(nn.BatchNorm2d(2, 1e-3, None, False, False)) == (
        "BatchNorm2d(2, eps=0.001, momentum=None, affine=False, "
        "track_running_stats=False)"
    )
    with pytest.raises(ValueError, match="momentum must be from 0 to 1, got 2"):
        nn.BatchNorm2d(2, momentum=2)
    with pytest.raises(ValueError, match="eps must be 0 or more, got -1"):
        nn.BatchNorm2d(2, eps=-1)
    with pytest.raises(TypeError, match="eps must be a number"):
        nn.BatchNorm2d(2, eps="small")
    with pytest.raises(ShapeError, match="x has 2 channels .*expected 3"):
        nn.BatchNorm2d(3)(np.zeros((1, 2, 4, 4), np.float32))
    with pytest.raises(ShapeError, match=r"BatchNorm2d\(3.*4 axes"):
        nn.BatchNorm2d(3)(np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_ten_steps_against_pytorch(momentum, affine):
    torch = pytest.importorskip("torch")
    options = {"eps": 1e-3, "momentum": momentum, "affine": affine}
    layer = nn.BatchNorm2d(5, **options)
    other = torch.nn.BatchNorm2d(5, **options)
    if affine:
        optimizer = optim.SGD(layer.parameters(), lr=0.1)
        torch_optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for step in range(10):
        training = step % 4 != 3
        layer.train(training), other.train(training)
        x, dy = (2 + 3 * normal(2, 6, 5, 4, 3, seed=step)).astype(np.float32)
        tensor = torch.tensor(x, requires_grad=True)
        expected = other(tensor)
        np.testing.assert_allclose(
            layer(x).numpy(), expected.detach().numpy(), rtol=1e-5, atol=1e-5
        )
        other.zero_grad()
        expected.backward(torch.tensor(dy))
        np.testing.assert_allclose(
            layer.backward(dy).numpy(), tensor.grad.numpy(), rtol=1e-4, atol=1e-5
        )
        if affine:
            optimizer.step(), torch_optimizer.step()
        state = {name: array.numpy() for name, array in other.state_dict().items()}
        assert list(state) == list(layer.state_dict())
        for name, array in layer.state_dict().items():
            np.testing.assert_allclose(array, state[name], rtol=1e-4, atol=1e-4)
    layer.load_state_dict(state)
    layer.load_state_dict(other.state_dict())
    other.load_state_dict(
        {name: torch.tensor(array) for name, array in layer.state_dict().items()}
    )


# training

TRAIN, TEST = patterns(200), patterns(50, seed=9)


@pytest.mark.parametrize("training", [True, False])
def test_fused_with_its_relu_it_has_the_same_bits(training):
    model = nn.Sequential(
        nn.BatchNorm2d(2, affine=False), nn.ReLU(), nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Tanh(),
    )  # fmt: skip
    other = copy.deepcopy(model)
    fused = nn.fuse(other)
    assert [type(layer).__name__ for layer in fused] == [
        "FusedBatchNorm2d", "FusedConv2d", "FusedBatchNorm2d", "BatchNorm2d", "Tanh",
    ]  # fmt: skip
    for each in (model, other):
        each.train(training)
    for seed in range(2):
        x = normal(5, 2, 6, 7, seed=seed).astype("f")
        dy = normal(5, 3, 4, 5, seed=seed + 2).astype("f")
        np.testing.assert_array_equal(fused(x).numpy(), model(x).numpy())
        np.testing.assert_array_equal(
            fused.backward(dy, accumulate=seed > 0).numpy(),
            model.backward(dy, accumulate=seed > 0).numpy(),
        )
        for one, two in zip(other.parameters(), model.parameters()):
            np.testing.assert_array_equal(one.grad.numpy(), two.grad.numpy())
        for name, array in fused.state_dict().items():
            np.testing.assert_array_equal(array, model.state_dict()[name])
    fused(x)
    fused.backward(dy, input_grad=False)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        fused.backward(dy)


def make_trainer(capture=None):
    cycnn.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(16, CLASSES),
        nn.LogSoftmax(),
    ).to("cpu")
    optimizer = optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return Trainer(model, nn.NLLLoss(), optimizer, capture=capture)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    whole, first = make_trainer(), make_trainer()
    history = whole.fit(TRAIN, 3, 32, seed=5, test=TEST)
    first.fit(TRAIN, 1, 32, seed=5, test=TEST)
    first.save(tmp_path / "run")
    other = make_trainer()
    resumed = Trainer.resume(tmp_path / "run", other.model, other.loss, other.optimizer)
    assert figures(resumed.fit(TRAIN, 3, 32, test=TEST)) == figures(history)
    assert digest(resumed) == digest(whole)
    assert history[-1].test_accuracy > 0.9
    assert int(whole.model[1].num_batches_tracked.data) == 3 * 7


def test_recorded_steps_end_with_the_same_bits():
    trainers = [make_trainer(capture) for capture in (False, True)]
    histories = [t.fit(TRAIN, 2, 32, seed=5, test=TEST) for t in trainers]
    assert figures(histories[0]) == figures(histories[1])
    assert digest(trainers[0]) == digest(trainers[1])


def test_a_prediction_uses_the_running_statistics():
    trainer = make_trainer()
    trainer.fit(TRAIN, 1, 32, seed=5)
    model = trainer.model
    x = normal(5, 1, 6, 6).astype(np.float32)
    before = model.state_dict()
    found = model.train().predict(x)
    np.testing.assert_allclose(found, model.eval()(x).numpy(), rtol=1e-6)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])
