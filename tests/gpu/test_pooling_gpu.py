"""Average pooling on the GPU against its specification, and captured."""

import numpy as np
import pytest
from bounds import F32, assert_close, assert_same_bits, on_gpu, poison

from cycnn import Tensor, nn
from cycnn.ops import reference


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# x, window, stride, padding, and whether rounded up
POOLS = (
    ((0, 2, 4, 4), (2, 2), (2, 2), (0, 0)),
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
    ((3, 5, 31, 33), (2, 2), (2, 2), (0, 0)),
    ((2, 33, 7, 9), (3, 2), (2, 1), (1, 1)),
    ((2, 3, 9, 8), (2, 3), (3, 4), (0, 0)),
    ((1, 2, 5, 5), (5, 5), (1, 1), (2, 2)),
    ((257, 3, 4, 4), (4, 4), (4, 4), (0, 0)),
    ((3, 5, 8, 7), (3, 3), (2, 2), (0, 0), True),
    ((3, 5, 8, 7), (3, 3), (2, 2), (1, 1), True),
    ((2, 3, 3, 5), (4, 7), (4, 3), (0, 0), True),
    ((3, 2, 8, 9), (2, 3), (2, 2), (0, 0, 1, 2)),
    ((2, 5, 9, 7), (3, 4), (3, 2), (2, 0, 1, 3), True),
)


def check_avgpool2d(ops, shape, *how):
    """how: window, stride, padding, count_include_pad, ceil_mode."""
    x = normal(*shape)
    terms = how[0][0] * how[0][1]
    y = ops.avgpool2d_forward(on_gpu(x), *how)
    want = reference.avgpool2d_forward(x, *how)
    bound = reference.avgpool2d_forward(np.abs(x), *how)
    assert_close(y, want, 2 * (terms + 2) * F32 * bound)
    dy = normal(*want.shape, seed=1)
    dx = ops.avgpool2d_backward(on_gpu(dy), shape, *how)
    want = reference.avgpool2d_backward(dy, shape, *how)
    bound = reference.avgpool2d_backward(np.abs(dy), shape, *how)
    assert_close(dx, want, 2 * (terms + 2) * F32 * bound)
    assert_same_bits(dx, ops.avgpool2d_backward(on_gpu(dy), shape, *how))


@pytest.mark.parametrize("include", (True, False), ids=("padding", "no padding"))
@pytest.mark.parametrize("case", POOLS, ids=str)
def test_avgpool2d(ops, case, include):
    shape, window, stride, padding, *rounded_up = case
    check_avgpool2d(ops, shape, window, stride, padding, include, *rounded_up)


@pytest.mark.parametrize("seed", range(24))
def test_avgpool2d_of_any_shape(ops, seed):
    rng = np.random.default_rng(seed)
    window = tuple(map(int, rng.integers(1, 6, 2)))
    stride = tuple(map(int, rng.integers(1, 7, 2)))
    padding = tuple(int(rng.integers(0, k)) for k in (*window, *window))
    size = [k + int(rng.integers(0, 30)) for k in window]
    shape = int(rng.integers(1, 5)), int(rng.integers(1, 9)), *size
    how = seed % 2 == 1, seed % 4 > 1
    check_avgpool2d(ops, shape, window, stride, padding, *how)


# a warp a plane, the last block partly filled; a block a plane
@pytest.mark.parametrize(
    "shape",
    ((0, 2, 4, 4), (1, 1, 1, 1), (3, 11, 7, 7), (257, 3, 1, 33), (2, 3, 64, 65)),
    ids=str,
)
def test_global_avgpool2d(ops, shape):
    x = normal(*shape) + 1
    y = ops.global_avgpool2d_forward(on_gpu(x))
    bound = reference.global_avgpool2d_forward(np.abs(x))
    bound = 2 * (shape[2] * shape[3] // 32 + 12) * F32 * bound
    assert_close(y, reference.global_avgpool2d_forward(x), bound)
    dy = normal(*y.shape, seed=1)
    dx = ops.global_avgpool2d_backward(on_gpu(dy), shape)
    want = reference.global_avgpool2d_backward(dy, shape)
    assert_close(dx, want, 2 * F32 * np.abs(want))
    assert_same_bits(y, ops.global_avgpool2d_forward(on_gpu(x)))


LAYERS = {
    "overlapping": lambda: nn.AvgPool2d((3, 2), (1, 2), (1, 1)),
    "without padding": lambda: nn.AvgPool2d(5, 2, 2, count_include_pad=False),
    "over the edge": lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "uneven": lambda: nn.AvgPool2d(3, 2, (0, 2, 1, 0), count_include_pad=False),
    "whole plane": nn.AdaptiveAvgPool2d,
}


@pytest.mark.parametrize("case", LAYERS)
def test_captured_has_the_bits_of_eager(case):
    from cycnn.gpu.graph import Graph

    layer = LAYERS[case]()
    x = on_gpu(normal(5, 3, 13, 9))
    dy = on_gpu(normal(*layer(x).shape, seed=1))

    def both():
        y = layer(x)
        return y, layer.backward(dy)

    graph = Graph(0)
    graph.rehearse(both)
    captured = graph.record(both)
    for seed in range(2):
        x.copy_(normal(*x.shape, seed=seed))
        graph.launch()
        for got, want in zip(captured, both()):
            assert_same_bits(got, want)


@pytest.mark.parametrize("case", LAYERS)
def test_both_devices_agree(case):
    layer = LAYERS[case]()
    x = normal(5, 3, 13, 9)
    results = []
    for device in ("cpu", "cuda"):
        y = layer(Tensor(x, device))
        dx = layer.backward(Tensor(normal(*y.shape, seed=1), device))
        results.append((y.numpy(), dx.numpy()))
    for on_cpu, on_device in zip(*results):
        np.testing.assert_allclose(on_device, on_cpu, rtol=1e-5, atol=1e-6)
