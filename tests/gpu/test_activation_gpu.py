"""Activation functions on the GPU against their specification, and captured."""

import numpy as np
import pytest
from bounds import F32, SIZES, assert_close, assert_same_bits, on_gpu, poison
from test_activation import (
    ELEMENTWISE,
    LAYERS,
    ends_and_what_lies_near,
    functions,
    inputs,
)

import cycnn
from cycnn import Tensor, nn
from cycnn.ops import reference


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


@pytest.mark.parametrize("case", ELEMENTWISE)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", (0, 1), ids=("aligned", "unaligned"))
@np.errstate(invalid="ignore", over="ignore")
def test_elementwise(ops, case, size, offset):
    x, dy = (np.roll(array, offset) for array in inputs(size + offset))
    forward, backward, of_output = functions(ops, case)
    expected, expected_backward, _ = functions(reference, case)
    a, d = on_gpu(x)[offset:], on_gpu(dy)[offset:]
    x, dy = x[offset:], dy[offset:]
    y = forward(a)
    assert_close(y, expected(x), 32 * F32 * (1 + np.abs(expected(x))))
    seen = y if of_output else a
    want = expected_backward(dy, seen.numpy())
    assert_close(backward(d, seen), want, 64 * F32 * (1 + np.abs(dy)))
    assert_same_bits(forward(a), y)


@pytest.mark.parametrize(
    "ends", ((-0.75, 1.5), (0.0, 6.0), (-np.inf, 0.5), (-1.0, np.inf)), ids=str
)
@pytest.mark.parametrize("size", (1, 5, 4099))
def test_hardtanh_at_its_ends(ops, ends, size):
    x, dy = ends_and_what_lies_near(*ends, size, seed=size)
    y = ops.hardtanh_forward(on_gpu(x), *ends).numpy()
    np.testing.assert_array_equal(y, reference.hardtanh_forward(x, *ends))
    dx = ops.hardtanh_backward(on_gpu(dy), on_gpu(x), *ends).numpy()
    np.testing.assert_array_equal(dx, reference.hardtanh_backward(dy, x, *ends))


# a warp a row, partly filled; a block a row
@pytest.mark.parametrize(
    "shape",
    ((0, 3), (1, 1), (3, 31), (33, 33), (257, 10), (5, 2048), (3, 5001)),
    ids=str,
)
def test_softmax(ops, shape):
    rng = np.random.default_rng(0)
    x, dy = 5 * rng.standard_normal((2, *shape), dtype=np.float32)
    y = ops.softmax_forward(on_gpu(x))
    want = reference.softmax_forward(x)
    assert_close(y, want, 64 * F32 * want + 1e-37)
    y_host = y.numpy()
    sums = (np.abs(dy) * y_host).sum(axis=1, keepdims=True)
    bound = 8 * F32 * y_host * (np.abs(dy) + (shape[1] // 32 + 8) * sums) + 1e-37
    want = reference.softmax_backward(dy, y_host)
    assert_close(ops.softmax_backward(on_gpu(dy), y), want, bound)
    assert_same_bits(ops.softmax_forward(on_gpu(x)), y)


@pytest.mark.parametrize("case", [*LAYERS, "softmax"])
def test_captured_has_the_bits_of_eager(case):
    from cycnn.gpu.graph import Graph

    layer = LAYERS.get(case, nn.Softmax)()
    rng = np.random.default_rng(1)
    x, dy = (on_gpu(a) for a in rng.standard_normal((2, 33, 31), dtype=np.float32))

    def both():
        y = layer(x)
        return y, layer.backward(dy)

    graph = Graph(0)
    graph.rehearse(both)
    captured = graph.record(both)
    for _ in range(2):
        x.copy_(rng.standard_normal(x.shape, dtype=np.float32))
        graph.launch()
        for got, want in zip(captured, both()):
            assert_same_bits(got, want)


@pytest.mark.parametrize("case", [*LAYERS, "softmax"])
def test_both_devices_agree(case):
    layer = LAYERS.get(case, nn.Softmax)()
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((2, 31, 33), dtype=np.float32)
    results = []
    for device in ("cpu", "cuda"):
        y = layer(Tensor(x, device))
        results.append((y.numpy(), layer.backward(Tensor(dy, device)).numpy()))
    for on_cpu, on_device in zip(*results):
        np.testing.assert_allclose(on_device, on_cpu, rtol=1e-5, atol=4e-6)
    predicted = nn.Sequential(nn.Linear(33, 33), layer).to("cuda")
    y = predicted.predict(x)
    np.testing.assert_allclose(y, predicted(x).numpy(), rtol=1e-3, atol=1e-3)
    assert predicted.device == cycnn.device("cuda")
