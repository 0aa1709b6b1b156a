"""Layers: values and gradients against the float64 reference, and what they refuse."""

import numpy as np
import pytest

from cycnn import devices, nn, tensor
from cycnn.errors import ShapeError
from cycnn.ops import reference
from cycnn.tensor import Tensor


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def conv(layer):
    def function(x, weight, bias=None):
        return reference.conv2d_forward(
            x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups
        )

    return function


def linear(layer):
    return lambda x, weight, bias=None: reference.linear_forward(x, weight, bias)


def pool(layer):
    return lambda x: reference.maxpool2d_forward(
        x, layer.kernel_size, layer.stride, layer.padding, layer.ceil_mode
    )[0]


CASES = {
    "conv": (lambda: nn.Conv2d(2, 3, 3), conv, (2, 2, 6, 5)),
    "conv strided": (
        lambda: nn.Conv2d(3, 2, (3, 2), stride=(2, 1), padding=(1, 2)),
        conv,
        (2, 3, 7, 5),
    ),
    "conv grouped": (
        lambda: nn.Conv2d(4, 6, 3, dilation=(1, 2), groups=2, padding=1),
        conv,
        (1, 4, 5, 6),
    ),
    "conv depthwise": (
        lambda: nn.Conv2d(3, 3, 2, groups=3, bias=False),
        conv,
        (2, 3, 4, 3),
    ),
    "conv of nothing": (lambda: nn.Conv2d(2, 3, 3), conv, (0, 2, 4, 4)),
    "linear": (lambda: nn.Linear(5, 3), linear, (4, 5)),
    "linear no bias": (lambda: nn.Linear(1, 7, bias=False), linear, (1, 1)),
    "linear of nothing": (lambda: nn.Linear(5, 3), linear, (0, 5)),
    "pool": (lambda: nn.MaxPool2d(2), pool, (2, 3, 5, 4)),
    "pool overlapping": (
        lambda: nn.MaxPool2d((3, 2), stride=(1, 2), padding=(1, 1)),
        pool,
        (2, 2, 5, 5),
    ),
    "pool over the edge": (
        lambda: nn.MaxPool2d(3, 2, ceil_mode=True),
        pool,
        (2, 2, 6, 4),
    ),
    "pool uneven": (
        lambda: nn.MaxPool2d(3, 2, padding=(0, 2, 1, 0)),
        pool,
        (2, 2, 6, 5),
    ),
    "relu": (nn.ReLU, lambda _: reference.relu_forward, (3, 2, 4)),
    "sigmoid": (nn.Sigmoid, lambda _: reference.sigmoid_forward, (3, 7)),
    "flatten": (nn.Flatten, lambda _: lambda x: x.reshape(len(x), -1), (3, 2, 4)),
    "log-softmax": (nn.LogSoftmax, lambda _: reference.log_softmax_forward, (3, 5)),
}


def differences(function, arrays, which, dy, step=1e-6):
    """Central differences of sum(dy * function(*arrays)) by one of the arrays."""
    gradient = np.empty_like(arrays[which])
    for i in range(gradient.size):
        ends = []
        for sign in (1, -1):
            moved = [array.copy() for array in arrays]
            moved[which].flat[i] += sign * step
            ends.append(np.sum(dy * function(*moved)))
        gradient.flat[i] = (ends[0] - ends[1]) / (2 * step)
    return gradient


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case):
    make, reference_of, shape = CASES[case]
    layer = make()
    rng = np.random.default_rng(3)
    x = rng.standard_normal(shape, dtype=np.float32)
    arrays = [x] + [p.data.numpy() for p in layer.parameters()]
    arrays = [array.astype(np.float64) for array in arrays]
    function = reference_of(layer)

    y = layer(Tensor(x))
    expected = function(*arrays)
    assert y.shape == expected.shape
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-5, atol=1e-5)

    dy = rng.standard_normal(expected.shape, dtype=np.float32)
    dx = layer.backward(Tensor(dy))
    assert dx.shape == shape
    gradients = [dx] + [p.grad for p in layer.parameters()]
    for which, gradient in enumerate(gradients):
        np.testing.assert_allclose(
            gradient.numpy(),
            differences(function, arrays, which, dy),
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("case", ["conv strided", "linear"])
def test_gradients_are_written_unless_accumulated(case):
    make, _, shape = CASES[case]
    layer = make()
    x = np.random.default_rng(4).standard_normal(shape)
    dy = np.ones(layer(x).shape)
    layer.backward(dy)
    once = [p.grad.numpy() for p in layer.parameters()]
    layer(x)
    layer.backward(dy)
    for parameter, expected in zip(layer.parameters(), once):
        np.testing.assert_array_equal(parameter.grad.numpy(), expected)
    layer(x)
    layer.backward(dy, accumulate=True)
    for parameter, expected in zip(layer.parameters(), once):
        np.testing.assert_allclose(parameter.grad.numpy(), 2 * expected, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_input_gradient_can_be_left_out(case):
    make, _, shape = CASES[case]
    layer = make()
    x = np.random.default_rng(5).standard_normal(shape)
    dy = np.ones(layer(x).shape)
    layer.backward(dy)
    with_input = [p.grad.numpy() for p in layer.parameters()]
    layer(x)
    assert layer.backward(dy, input_grad=False) is None
    for parameter, expected in zip(layer.parameters(), with_input):
        np.testing.assert_array_equal(parameter.grad.numpy(), expected)


@pytest.mark.parametrize("case", CASES)
def test_each_backward_needs_its_forward(case):
    make, _, shape = CASES[case]
    layer = make()
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(np.ones((1, 1)))
    y = layer(np.zeros(shape))
    with pytest.raises(ShapeError, match="gradient has shape"):
        layer.backward(np.zeros((*y.shape, 2)))
    layer.backward(np.zeros(y.shape))
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(np.zeros(y.shape))


def test_backward_works_after_an_evaluating_forward():
    layer = nn.Linear(3, 2).eval()
    assert not layer.training
    x, dy = np.ones((2, 3)), np.ones((2, 2))
    layer(x)
    evaluated = layer.backward(dy).numpy()
    layer.train()
    assert layer.training
    layer(x)
    np.testing.assert_array_equal(layer.backward(dy).numpy(), evaluated)


def test_arrays_are_converted_and_copied():
    layer = nn.Linear(3, 2)
    x = np.random.default_rng(6).standard_normal((4, 3))
    expected = layer(Tensor(x)).numpy()
    np.testing.assert_array_equal(layer(x).numpy(), expected)
    np.testing.assert_array_equal(layer(x.tolist()).numpy(), expected)
    np.testing.assert_array_equal(layer(np.asfortranarray(x)).numpy(), expected)
    single = x.astype(np.float32)
    layer(single)
    dy = np.ones((4, 2), np.float32)
    single[:] = np.nan  # the layer must not have kept the caller's memory
    layer.backward(dy)
    np.testing.assert_allclose(
        layer.weight.grad.numpy(), np.ones((2, 4)) @ x, rtol=1e-5, atol=1e-6
    )


def elsewhere(*shape):
    """A tensor that says it is on a GPU, with no memory behind it."""
    return tensor.on_gpu(shape, np.dtype("float32"), devices.Device("cuda"), 0, None)


@pytest.mark.parametrize(
    "layer, x, error, message",
    [
        (nn.Conv2d, np.zeros((1, 3, 8, 8)), ShapeError, r"Conv2d\(2, 3.*3 channels"),
        (nn.Conv2d, np.zeros((2, 8, 8)), ShapeError, r"Conv2d\(2, 3.*\(2, 8, 8\)"),
        (nn.Conv2d, np.zeros((1, 2, 4, 8)), ShapeError, r"Conv2d.*does not fit"),
        (nn.Conv2d, np.zeros((1, 2, 8, 8), int), TypeError, "Conv2d.*int64"),
        (nn.Linear, np.zeros((4, 3)), ShapeError, r"Linear\(2, 3.*3 features"),
        (nn.Linear, np.zeros((4, 2, 1)), ShapeError, "Flatten"),
        (nn.Linear, np.array(["a"]), TypeError, "expected floating-point"),
        (nn.MaxPool2d, np.zeros((1, 2, 1, 8)), ShapeError, "MaxPool2d.*does not fit"),
        (nn.LogSoftmax, np.zeros((2, 3, 4)), ShapeError, r"LogSoftmax.*\(2, 3, 4\)"),
        (nn.Flatten, np.zeros(()), ShapeError, "Flatten"),
        (nn.ReLU, np.zeros(3, np.uint8), TypeError, "ReLU.*uint8"),
    ],
)
def test_input_that_does_not_fit_is_refused(layer, x, error, message):
    made = {nn.Conv2d: lambda: nn.Conv2d(2, 3, 5), nn.Linear: lambda: nn.Linear(2, 3)}
    made[nn.MaxPool2d] = lambda: nn.MaxPool2d(2)
    with pytest.raises(error, match=message):
        made.get(layer, layer)()(x)


def test_tensors_of_another_dtype_or_device_are_refused():
    layer = nn.Linear(2, 3)
    with pytest.raises(TypeError, match="int32, expected float32"):
        layer(Tensor(np.zeros((1, 2), np.int32)))
    with pytest.raises(TypeError, match="uint8.*255"):
        layer(Tensor(np.zeros((1, 2), np.uint8)))
    with pytest.raises(
        TypeError, match=r"is on cpu, its input on cuda:0.*\.to\('cuda:0"
    ):
        layer(elsewhere(1, 2))
    layer(np.zeros((1, 2)))
    with pytest.raises(TypeError, match="its gradient on cuda:0"):
        layer.backward(elsewhere(1, 3))


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: nn.Conv2d(0, 1, 3), ValueError, "in_channels must be at least 1"),
        (lambda: nn.Conv2d(1, 2.0, 3), TypeError, "out_channels must be an integer"),
        (lambda: nn.Conv2d(1, True, 3), TypeError, "out_channels must be an integer"),
        (lambda: nn.Conv2d(1, 1, 0), ValueError, "kernel_size must be at least 1"),
        (lambda: nn.Conv2d(1, 1, (3, 3, 3)), ValueError, "kernel_size is"),
        (lambda: nn.Conv2d(1, 1, "3"), ValueError, "kernel_size is"),
        (lambda: nn.Conv2d(1, 1, 3, stride=0), ValueError, "stride must be at least 1"),
        (lambda: nn.Conv2d(1, 1, 3, stride=1.5), ValueError, "stride is 1.5"),
        (
            lambda: nn.Conv2d(1, 1, 3, padding=-1),
            ValueError,
            "padding must be at least",
        ),
        (lambda: nn.Conv2d(1, 1, 3, dilation=(1, 0)), ValueError, "dilation must be"),
        (lambda: nn.Conv2d(3, 4, 3, groups=2), ValueError, "divide in_channels=3"),
        (lambda: nn.Conv2d(4, 3, 3, groups=2), ValueError, "divide out_channels=3"),
        (lambda: nn.Conv2d(1, 1, 3, bias=0), TypeError, "bias must be True or False"),
        (lambda: nn.Linear(3, -1), ValueError, "out_features must be at least 1"),
        (lambda: nn.Linear("3", 1), TypeError, "in_features must be an integer"),
        (lambda: nn.MaxPool2d(2, padding=2), ValueError, "more than half"),
        (lambda: nn.MaxPool2d((4, 2), padding=2), ValueError, "more than half"),
        (lambda: nn.MaxPool2d(2, padding=(0, 0, 2, 0)), ValueError, "must be less"),
        (lambda: nn.MaxPool2d(2, padding=(0, 0, 0)), ValueError, "padding is"),
        (
            lambda: nn.MaxPool2d(2, padding=[0, -1, 0, 0]),
            ValueError,
            "padding must be at least 0",
        ),
        (lambda: nn.MaxPool2d(2, padding="1111"), ValueError, "padding is"),
        (lambda: nn.MaxPool2d(2, ceil_mode=1), TypeError, "ceil_mode must be True or"),
        (lambda: nn.MaxPool2d(2, stride=-1), ValueError, "stride must be at least 1"),
        (lambda: nn.LogSoftmax(0), ValueError, "dim=0"),
        (lambda: nn.LogSoftmax(dim=None), ValueError, "dim=None"),
    ],
)
def test_constructor_arguments_are_checked(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_repr():
    for layer, text in [
        (nn.Conv2d(1, 32, 5), "Conv2d(1, 32, kernel_size=(5, 5), 832 parameters)"),
        (
            nn.Conv2d(4, 8, 3, stride=2, padding=(1, 0), groups=4, bias=False),
            "Conv2d(4, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 0), groups=4, "
            "bias=False, 72 parameters)",
        ),
        (nn.Linear(512, 128), "Linear(512, 128, 65,664 parameters)"),
        (
            nn.MaxPool2d(3, 2, 1),
            "MaxPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))",
        ),
        (nn.MaxPool2d(2), "MaxPool2d(kernel_size=(2, 2))"),
        (nn.MaxPool2d(2, padding=(1, 1, 1, 1)), repr(nn.MaxPool2d(2, padding=1))),
        (
            nn.MaxPool2d(3, 2, [0, 0, 1, 2], ceil_mode=True),
            "MaxPool2d(kernel_size=(3, 3), stride=(2, 2), padding=(0, 0, 1, 2), "
            "ceil_mode=True)",
        ),
        (
            nn.MaxPool2d(3, 3, (2, 2, 2, 2)),
            "MaxPool2d(kernel_size=(3, 3), padding=(2, 2, 2, 2))",
        ),
        (nn.ReLU(), "ReLU()"),
        (nn.LogSoftmax(-1), "LogSoftmax(dim=1)"),
    ]:
        assert repr(layer) == text


def test_a_layer_packs_its_own_parameters():
    layer = nn.Linear(5, 3)
    slab = layer.weight.slab
    assert layer.bias.slab is slab
    assert (layer.weight.offset, layer.bias.offset, slab.data.shape) == (0, 64, (128,))
    layer.weight.data.fill_(1)
    layer.bias.grad.fill_(2)
    assert slab.data.numpy()[:15].tolist() == [1] * 15
    assert slab.grad.numpy()[64:67].tolist() == [2] * 3
    # between the parameters it is zero
    assert not slab.data.numpy()[15:64].any()
    assert not slab.data.numpy()[67:].any()
    assert not slab.grad.numpy()[67:].any()


def test_a_parameter_holds_float32_and_cannot_be_replaced():
    parameter = nn.Parameter([[1, 2]], "w")
    assert parameter.shape == (1, 2) and parameter.size == 2
    assert parameter.data.numpy().tolist() == [[1, 2]]
    assert parameter.grad.numpy().tolist() == [[0, 0]]
    assert repr(parameter) == "Parameter('w', shape=(1, 2), device='cpu')"
    source = Tensor(np.ones(3, np.float32))
    copied = nn.Parameter(source)
    copied.data.fill_(5)
    assert source.numpy().tolist() == [1, 1, 1]
    with pytest.raises(TypeError, match="float32, got a tensor of int32"):
        nn.Parameter(Tensor(np.zeros(3, np.int32)))
    with pytest.raises(AttributeError):
        parameter.data = source


class Twice(nn.Layer):
    """A layer as a user would write it: two layers in parallel, and a parameter."""

    def __init__(self):
        self.scale = nn.Parameter([2.0])
        self.left = nn.Linear(3, 2)
        self.right = nn.Linear(3, 2, bias=False)
        self._hidden = nn.Linear(9, 9)

    def forward(self, x):
        left, right = self.left(x).numpy(), self.right(x).numpy()
        self._saved = left + right
        return Tensor(self.scale.data.numpy() * self._saved)

    def backward(self, dy, input_grad=True, accumulate=False):
        dy = dy.numpy()
        self.scale.grad.copy_(np.sum(dy * self._saved).reshape(1))
        inner = self.scale.data.numpy() * dy
        dx = [layer.backward(inner).numpy() for layer in (self.left, self.right)]
        return Tensor(dx[0] + dx[1])


def test_layers_of_ones_own():
    layer = Twice()
    names = [name for name, _ in layer.named_parameters()]
    assert names == ["scale", "left.weight", "left.bias", "right.weight"]
    model = nn.Sequential(nn.ReLU(), layer)
    assert [name for name in model.state_dict()][1] == "1.left.weight"
    assert len({id(p.slab) for p in model.parameters()}) == 1
    model.eval()
    assert not layer.right.training
    x = np.abs(np.random.default_rng(7).standard_normal((2, 3)))
    y = model(x)
    np.testing.assert_allclose(
        y.numpy(), 2 * (layer.left(x).numpy() + layer.right(x).numpy()), rtol=1e-5
    )
    dx = model.backward(Tensor(np.ones((2, 2))))
    weights = layer.left.weight.data.numpy() + layer.right.weight.data.numpy()
    np.testing.assert_allclose(
        dx.numpy(), np.tile(2 * weights.sum(0), (2, 1)), rtol=1e-5
    )
    with pytest.raises(NotImplementedError, match="Layer does not define forward"):
        nn.Layer()(x)


def test_moving_to_the_same_device_keeps_memory_and_forgets_the_forward():
    layer = nn.Linear(3, 2)
    where, slab = layer.weight.data.ptr, layer.weight.slab
    layer(np.zeros((1, 3)))
    assert layer.to("cpu") is layer and layer.device == "cpu"
    assert (layer.weight.data.ptr, layer.weight.slab) == (where, slab)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(np.zeros((1, 2)))
    assert nn.ReLU().to("cpu").device == "cpu"
