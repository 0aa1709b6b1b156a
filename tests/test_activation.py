"""Tanh, LeakyReLU, Hardtanh, GELU, SiLU and Softmax on the CPU."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_reference import slope

from cycnn import Tensor, Trainer, devices, nn, optim
from cycnn.errors import ShapeError
from cycnn.ops import cpu, reference

F32 = 2.0**-24

# (operation, arguments after x, whether backward takes the output)
ELEMENTWISE = {
    "tanh": ("tanh", (), True),
    "leaky relu": ("leaky_relu", (0.1,), False),
    "leaky relu downwards": ("leaky_relu", (-0.5,), False),
    "hardtanh": ("hardtanh", (-0.75, 1.5), False),
    "relu6": ("hardtanh", (0.0, 6.0), False),
    "gelu": ("gelu", ("none",), False),
    "gelu by tanh": ("gelu", ("tanh",), False),
    "silu": ("silu", (), False),
}
LAYERS = {
    "tanh": nn.Tanh,
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "leaky relu downwards": lambda: nn.LeakyReLU(-0.5),
    "hardtanh": lambda: nn.Hardtanh(-0.75, 1.5),
    "relu6": nn.ReLU6,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
}
SPECIAL = [
    0.0, -0.0, 100.0, -100.0, 1e20, -1e20, 1e-30, -1e-30, 16.5, -16.5, np.nan, -0.75,
    1.5, 6.0,
]  # fmt: skip


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def functions(module, case):
    """forward(x) and backward(dy, x or y) of a case."""
    name, arguments, of_output = ELEMENTWISE[case]
    forward, backward = (
        getattr(module, f"{name}_{way}") for way in ("forward", "backward")
    )
    return (
        lambda x: forward(x, *arguments),
        lambda dy, seen: backward(dy, seen, *arguments),
        of_output,
    )


def close(found, expected, scale=1.0):
    """Off by some roundings of numbers of about the size of ``scale``."""
    found = found.numpy()
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=32 * F32, atol=8 * F32 * scale)


def inputs(size, seed=0):
    rng = np.random.default_rng(seed)
    x = 3 * rng.standard_normal(size, dtype=np.float32)
    x[: len(SPECIAL)] = SPECIAL[:size]
    return x, rng.standard_normal(size, dtype=np.float32)


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_the_specification_has_the_slope_of_its_function(case):
    forward, backward, of_output = functions(reference, case)
    x = np.linspace(-5, 5, 40) + 0.003
    dy = np.random.default_rng(0).standard_normal(40)
    seen = forward(x) if of_output else x
    np.testing.assert_allclose(
        backward(dy, seen), slope(lambda: forward(x), x, dy), rtol=1e-7, atol=1e-8
    )


@pytest.mark.parametrize("case", ELEMENTWISE)
@pytest.mark.parametrize("size", [0, 1, 31, 4097, 40000])
@np.errstate(invalid="ignore", over="ignore")
def test_the_cpu_computes_what_is_specified(case, size):
    x, dy = inputs(size)
    forward, backward, of_output = functions(cpu, case)
    expected, expected_backward, _ = functions(reference, case)
    y = forward(Tensor(x, "cpu"))
    close(y, expected(x))
    seen = y if of_output else Tensor(x, "cpu")
    dx = backward(Tensor(dy, "cpu"), seen)
    close(dx, expected_backward(dy, seen.numpy()), 8)


def test_gelu_keeps_its_relative_precision_far_below_zero():
    x = np.array([-3.0, -6.0, -9.0, -12.0], np.float32)
    y = cpu.gelu_forward(Tensor(x, "cpu"), "none").numpy()
    expected = reference.gelu_forward(x, "none")
    np.testing.assert_allclose(y, expected, rtol=2e-5)
    assert (y < 0).all()


def test_the_two_forms_of_gelu_are_as_near_as_documented():
    x = np.linspace(-8, 8, 4001)
    far = abs(reference.gelu_forward(x, "none") - reference.gelu_forward(x, "tanh"))
    assert 1e-4 < far.max() < 5e-4


def ends_and_what_lies_near(low, high, size, seed):
    """x at, beside and beyond the ends of Hardtanh, and dy, some of it no number."""
    rng = np.random.default_rng(seed)
    ends = np.array([low, high], np.float32)
    x = rng.choice(
        [
            *ends, *np.nextafter(ends, np.float32(-np.inf)),
            *np.nextafter(ends, np.float32(np.inf)), 0.0, np.inf, -np.inf, np.nan,
            *rng.standard_normal(8),
        ],
        size,
    ).astype(np.float32)  # fmt: skip
    dy = rng.choice([1.5, -2.0, np.inf, -np.inf, np.nan, 0.0], size)
    return x, dy.astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
    st.floats(-4, 4, width=32) | st.just(-math.inf),
    st.floats(0.125, 8, width=32) | st.just(math.inf),
    st.integers(0, 20000),
)
@np.errstate(over="ignore")
def test_hardtanh_copies_and_computes_nothing(low, reach, size):
    high = float(np.float32(reach + (low if math.isfinite(low) else 0)))
    x, dy = ends_and_what_lies_near(low, high, size, seed=size)
    y = cpu.hardtanh_forward(Tensor(x, "cpu"), low, high).numpy()
    np.testing.assert_array_equal(y, np.clip(x, np.float32(low), np.float32(high)))
    np.testing.assert_array_equal(y, reference.hardtanh_forward(x, low, high))
    dx = cpu.hardtanh_backward(Tensor(dy, "cpu"), Tensor(x, "cpu"), low, high).numpy()
    outside = (x <= np.float32(low)) | (x >= np.float32(high))
    np.testing.assert_array_equal(dx, np.where(outside, np.float32(0), dy))
    np.testing.assert_array_equal(dx, reference.hardtanh_backward(dy, x, low, high))


# softmax


def test_softmax_has_the_slope_of_its_function():
    rng = np.random.default_rng(1)
    x, dy = rng.standard_normal((2, 3, 5))
    np.testing.assert_allclose(
        reference.softmax_backward(dy, reference.softmax_forward(x)),
        slope(lambda: reference.softmax_forward(x), x, dy),
        rtol=1e-7,
        atol=1e-8,
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 40), st.integers(1, 300), st.floats(0.1, 100))
def test_softmax_of_any_shape(n, f, scale):
    rng = np.random.default_rng(n + f)
    x, dy = (scale * rng.standard_normal((2, n, f))).astype(np.float32)
    y = cpu.softmax_forward(Tensor(x, "cpu"))
    close(y, reference.softmax_forward(x))
    dx = cpu.softmax_backward(Tensor(dy, "cpu"), y)
    close(dx, reference.softmax_backward(dy, y.numpy()), scale)


def test_softmax_does_not_overflow_and_passes_nan_on():
    x = np.array([[1e38, 0, -1e38], [0, np.nan, 0], [5, 5, 5]], np.float32)
    y = cpu.softmax_forward(Tensor(x, "cpu")).numpy()
    np.testing.assert_array_equal(y[0], [1, 0, 0])
    assert np.isnan(y[1]).all()
    np.testing.assert_allclose(y[2], 1 / 3, rtol=1e-6)


def test_softmax_is_the_exponential_of_log_softmax():
    x = np.random.default_rng(0).standard_normal((7, 10), dtype=np.float32)
    y, logarithms = nn.Softmax()(x).numpy(), nn.LogSoftmax()(x).numpy()
    np.testing.assert_allclose(np.log(y), logarithms, rtol=1e-5, atol=1e-5)


# layers


@pytest.mark.parametrize("case", LAYERS)
def test_layers_call_their_operation(case):
    x, dy = inputs(60, seed=3)
    x = np.nan_to_num(x).clip(-20, 20).reshape(3, 4, 5)
    dy = dy.reshape(x.shape)
    layer = LAYERS[case]()
    forward, backward, of_output = functions(reference, case)
    y = layer(x)
    close(y, forward(x))
    dx = layer.backward(dy)
    close(dx, backward(dy, y.numpy() if of_output else x), 8)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(dy)
    layer(x)
    assert layer.backward(dy, input_grad=False) is None
    layer(x)
    with pytest.raises(ShapeError, match="gradient has shape"):
        layer.backward(dy[:1])
    assert layer.parameters() == [] and layer.state_dict() == {}


TORCH = {
    "tanh": lambda torch: torch.nn.Tanh(),
    "leaky relu": lambda torch: torch.nn.LeakyReLU(0.1),
    "leaky relu downwards": lambda torch: torch.nn.LeakyReLU(-0.5),
    "hardtanh": lambda torch: torch.nn.Hardtanh(-0.75, 1.5),
    "relu6": lambda torch: torch.nn.ReLU6(),
    "gelu": lambda torch: torch.nn.GELU(),
    "gelu by tanh": lambda torch: torch.nn.GELU(approximate="tanh"),
    "silu": lambda torch: torch.nn.SiLU(),
    "softmax": lambda torch: torch.nn.Softmax(dim=1),
}


@pytest.mark.parametrize("case", TORCH)
def test_against_pytorch(case):
    torch = pytest.importorskip("torch")
    layer = LAYERS.get(case, nn.Softmax)()
    rng = np.random.default_rng(4)
    x, dy = 4 * rng.standard_normal((2, 33, 17), dtype=np.float32)
    x[0, :5] = 0.0, -0.0, -0.75, 1.5, 6.0
    tensor = torch.tensor(x, requires_grad=True)
    expected = TORCH[case](torch)(tensor)
    expected.backward(torch.tensor(dy))
    # torch's float32 GELU cancels far below zero
    np.testing.assert_allclose(
        layer(x).numpy(), expected.detach().numpy(), rtol=1e-5, atol=2e-6
    )
    np.testing.assert_allclose(
        layer.backward(dy).numpy(), tensor.grad.numpy(), rtol=1e-5, atol=2e-5
    )


def test_arguments_and_names():
    assert repr(nn.Tanh()) == "Tanh()"
    assert repr(nn.SiLU()) == "SiLU()"
    assert repr(nn.LeakyReLU()) == "LeakyReLU(negative_slope=0.01)"
    assert repr(nn.LeakyReLU(np.float32(0.5))) == "LeakyReLU(negative_slope=0.5)"
    assert repr(nn.Hardtanh()) == "Hardtanh(min_val=-1.0, max_val=1.0)"
    assert repr(nn.Hardtanh(0, math.inf)) == "Hardtanh(min_val=0.0, max_val=inf)"
    assert repr(nn.ReLU6()) == "ReLU6()"
    assert repr(nn.GELU("tanh")) == "GELU(approximate='tanh')"
    assert repr(nn.Softmax(-1)) == "Softmax(dim=1)"
    with pytest.raises(ValueError, match="Softmax: dim=2, but only dim=1"):
        nn.Softmax(2)
    with pytest.raises(ValueError, match="approximate must be 'none' or 'tanh'"):
        nn.GELU("erf")
    with pytest.raises(TypeError, match="negative_slope must be a number, got '1'"):
        nn.LeakyReLU("1")
    with pytest.raises(ValueError, match="negative_slope must be finite, got nan"):
        nn.LeakyReLU(float("nan"))
    with pytest.raises(TypeError, match="Hardtanh: max_val must be a number, got None"):
        nn.Hardtanh(0, None)
    for ends in ((1, 1), (2, 1), (math.nan, 1), (1, math.nan), (math.inf, math.inf)):
        with pytest.raises(ValueError, match="min_val must be less than max_val, got"):
            nn.Hardtanh(*ends)
    with pytest.raises(ShapeError, match=r"Softmax\(dim=1\).*2 axes"):
        nn.Softmax()(np.zeros((1, 2, 3), np.float32))
    with pytest.raises(TypeError, match="the input is uint8"):
        nn.GELU()(Tensor(np.zeros(3, np.uint8)))


def test_probabilities_of_a_model_that_ends_in_softmax():
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 3), nn.Softmax())
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer)
    x = np.random.default_rng(0).standard_normal((5, 1, 2, 3), dtype=np.float32)
    found = trainer.predict_proba(x)
    np.testing.assert_array_equal(found, model(x).numpy())
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
