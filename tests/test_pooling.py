"""AvgPool2d and AdaptiveAvgPool2d on the CPU."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops_reference import POOLS, slope

from cycnn import Tensor, devices, nn
from cycnn.errors import ShapeError
from cycnn.ops import cpu, reference

F32 = 2.0**-24


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(devices, "_default", devices.CPU)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def close(found, expected, terms=4):
    found = found.numpy()
    assert found.dtype == np.float32 and found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=8 * F32, atol=4 * terms * F32)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("case", POOLS)
def test_the_specification_is_the_mean_that_it_says(case, include, ceil_mode):
    x_shape, window, stride, padding = POOLS[case]
    x = normal(*x_shape)
    y = reference.avgpool2d_forward(x, window, stride, padding, include, ceil_mode)
    for n, c, p, q in np.ndindex(*y.shape):
        met = [
            (p * stride[0] - padding[0] + r, q * stride[1] - padding[1] + s)
            for r in range(window[0])
            for s in range(window[1])
        ]
        seen = [
            x[n, c, h, w] for h, w in met if 0 <= h < x_shape[2] and 0 <= w < x_shape[3]
        ]
        ends = x_shape[2] + padding[-2], x_shape[3] + padding[-1]
        padded = [1 for h, w in met if h < ends[0] and w < ends[1]]
        assert ceil_mode or len(padded) == len(met)
        count = len(padded) if include else len(seen)
        np.testing.assert_allclose(y[n, c, p, q], sum(seen) / count, rtol=1e-12)


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("case", POOLS)
def test_the_specification_has_the_slope_of_its_function(case, include, ceil_mode):
    x_shape, *how = POOLS[case]
    how += [include, ceil_mode]
    x = normal(*x_shape)
    forward = lambda: reference.avgpool2d_forward(x, *how)
    dy = normal(*forward().shape, seed=1)
    found = reference.avgpool2d_backward(dy, x_shape, *how)
    np.testing.assert_allclose(found, slope(forward, x, dy), rtol=1e-7, atol=1e-8)


def test_the_global_mean_has_the_slope_of_its_function():
    x, dy = normal(2, 3, 4, 5), normal(2, 3, 1, 1, seed=1)
    found = reference.global_avgpool2d_backward(dy, x.shape)
    expected = slope(lambda: reference.global_avgpool2d_forward(x), x, dy)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-8)


@st.composite
def geometries(draw):
    window = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    if draw(st.booleans()):
        padding = tuple(draw(st.integers(0, k // 2)) for k in window)
    else:
        padding = tuple(draw(st.integers(0, k - 1)) for k in (*window, *window))
    ends = zip(window, padding[:2], padding[-2:])
    sizes = [draw(st.integers(max(1, k - a - b), 12)) for k, a, b in ends]
    shape = draw(st.integers(0, 3)), draw(st.integers(1, 4)), *sizes
    return shape, window, stride, padding, draw(st.booleans()), draw(st.booleans())


@settings(deadline=None, max_examples=60)
@given(geometries())
def test_the_cpu_computes_what_is_specified(geometry):
    shape, *how = geometry
    x = normal(*shape).astype(np.float32)
    y = cpu.avgpool2d_forward(Tensor(x, "cpu"), *how)
    close(y, reference.avgpool2d_forward(x, *how))
    dy = normal(*y.shape, seed=1).astype(np.float32)
    dx = cpu.avgpool2d_backward(Tensor(dy, "cpu"), shape, *how)
    close(dx, reference.avgpool2d_backward(dy, shape, *how), 25)


@pytest.mark.parametrize(
    "shape", [(0, 3, 4, 4), (1, 1, 1, 1), (3, 33, 7, 7), (2, 5, 31, 257)], ids=str
)
def test_the_global_mean(shape):
    x = normal(*shape).astype(np.float32) + 3
    y = cpu.global_avgpool2d_forward(Tensor(x, "cpu"))
    close(y, reference.global_avgpool2d_forward(x))
    dy = normal(*y.shape, seed=1).astype(np.float32)
    dx = cpu.global_avgpool2d_backward(Tensor(dy, "cpu"), shape)
    close(dx, reference.global_avgpool2d_backward(dy, shape))


LAYERS = {
    "two by two": (nn.AvgPool2d, (2,), {}),
    "overlapping": (nn.AvgPool2d, ((3, 2), (1, 2), (1, 1)), {}),
    "without padding": (nn.AvgPool2d, (5, 2, 2), {"count_include_pad": False}),
    "whole plane": (nn.AdaptiveAvgPool2d, (1,), {}),
    "over the edge": (nn.AvgPool2d, (3, 2, 1), {"ceil_mode": True}),
    "over the edge, without padding": (
        nn.AvgPool2d, ((2, 3), (3, 2), 1),
        {"ceil_mode": True, "count_include_pad": False},
    ),
    "larger than the image": (nn.AvgPool2d, ((10, 9), (4, 9)), {"ceil_mode": True}),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYERS)
def test_layers(case):
    kind, arguments, options = LAYERS[case]
    layer = kind(*arguments, **options)
    x = normal(3, 4, 9, 8).astype(np.float32)
    y = layer(x)
    if kind is nn.AvgPool2d:
        how = (
            layer.kernel_size, layer.stride, layer.padding, layer.count_include_pad,
            layer.ceil_mode,
        )  # fmt: skip
        expected = reference.avgpool2d_forward(x, *how)
        gradient = lambda dy: reference.avgpool2d_backward(dy, x.shape, *how)
    else:
        expected = reference.global_avgpool2d_forward(x)
        gradient = lambda dy: reference.global_avgpool2d_backward(dy, x.shape)
    close(y, expected)
    dy = normal(*y.shape, seed=1).astype(np.float32)
    close(layer.backward(dy), gradient(dy), 25)
    with pytest.raises(RuntimeError, match="backward without a forward"):
        layer.backward(dy)
    layer(x)
    assert layer.backward(dy, input_grad=False) is None
    layer(x)
    with pytest.raises(ShapeError, match="gradient has shape"):
        layer.backward(dy[:1])


@pytest.mark.parametrize("case", LAYERS)
def test_against_pytorch(case):
    torch = pytest.importorskip("torch")
    kind, arguments, options = LAYERS[case]
    x = normal(3, 4, 9, 8).astype(np.float32)
    tensor = torch.tensor(x, requires_grad=True)
    expected = getattr(torch.nn, kind.__name__)(*arguments, **options)(tensor)
    dy = normal(*expected.shape, seed=1).astype(np.float32)
    expected.backward(torch.tensor(dy))
    layer = kind(*arguments, **options)
    close(layer(x), expected.detach().numpy())
    close(layer.backward(dy), tensor.grad.numpy(), 25)


@pytest.mark.parametrize("padding", [(0, 0, 1, 1), (1, 0, 2, 2), (2, 1, 0, 2)], ids=str)
def test_uneven_padding_is_that_of_a_layer_in_front(padding):
    top, left, bottom, right = padding
    x = normal(3, 4, 9, 8).astype(np.float32)
    for kind in (nn.AvgPool2d, nn.MaxPool2d):
        frame = np.zeros if kind is nn.AvgPool2d else lambda n: np.full(n, -np.inf)
        padded = frame((3, 4, 9 + top + bottom, 8 + left + right))
        padded[:, :, top : top + 9, left : left + 8] = x
        wanted = kind(3, 2)(padded.astype(np.float32)).numpy()
        layer = kind(3, 2, padding)
        np.testing.assert_array_equal(layer(x).numpy(), wanted)


def test_arguments_and_names():
    assert repr(nn.AvgPool2d(2)) == "AvgPool2d(kernel_size=(2, 2))"
    assert repr(nn.AvgPool2d(3, 1, 1, count_include_pad=False)) == (
        "AvgPool2d(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), "
        "count_include_pad=False)"
    )
    assert repr(
        nn.AvgPool2d(3, 1, (0, 2, 1, 0), ceil_mode=True, count_include_pad=False)
    ) == (
        "AvgPool2d(kernel_size=(3, 3), stride=(1, 1), padding=(0, 2, 1, 0), "
        "ceil_mode=True, count_include_pad=False)"
    )
    assert repr(nn.AdaptiveAvgPool2d()) == "AdaptiveAvgPool2d(output_size=1)"
    assert nn.AdaptiveAvgPool2d((1, 1)).output_size == (1, 1)
    with pytest.raises(ShapeError, match="only 1 is there, .* use AvgPool2d"):
        nn.AdaptiveAvgPool2d((2, 1))
    with pytest.raises(ShapeError, match="AvgPool2d: padding=.* more than half"):
        nn.AvgPool2d(2, padding=2)
    for wrong in (1, 1, 1), (1,), ():
        with pytest.raises(ShapeError, match="padding is .* or four"):
            nn.AvgPool2d(3, padding=wrong)
    with pytest.raises(ShapeError, match="padding is array.*expected an integer"):
        nn.AvgPool2d(3, padding=np.array(1))
    with pytest.raises(TypeError, match="count_include_pad must be True or False"):
        nn.AvgPool2d(2, count_include_pad=1)
    with pytest.raises(ShapeError, match=r"AvgPool2d\(.*does not fit into an image"):
        nn.AvgPool2d(4)(np.zeros((1, 1, 3, 5), np.float32))
    with pytest.raises(ShapeError, match="AdaptiveAvgPool2d.*planes of 0 x 3"):
        nn.AdaptiveAvgPool2d()(np.zeros((1, 1, 0, 3), np.float32))
    with pytest.raises(ShapeError, match="AdaptiveAvgPool2d.*4 axes"):
        nn.AdaptiveAvgPool2d()(np.zeros((1, 3), np.float32))
