"""LayerNorm on the GPU against its specification, and captured."""

import numpy as np
import pytest
from bounds import F32, assert_close, assert_same_bits, on_gpu, poison

from cycnn import Tensor, nn
from cycnn.ops import reference

EPS = 1e-5
# a warp a row, a block a row; one part of the rows, several
SHAPES = ((1, 1), (3, 31), (33, 33), (257, 10), (5, 2048), (3, 5001), (1000, 65))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison(monkeypatch)


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("affine", (True, False), ids=("affine", "plain"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward(ops, shape, affine):
    x = normal(*shape) + 3
    weight, bias = normal(2, shape[1], seed=1) if affine else (None, None)
    run = lambda: ops.layer_norm_forward(on_gpu(x), on_gpu(weight), on_gpu(bias), EPS)
    got, want = run(), reference.layer_norm_forward(x, weight, bias, EPS)
    r = (1 / np.sqrt(want[2] + EPS))[:, None]
    scale = 1 if weight is None else np.abs(weight)
    assert_close(got[0], want[0], 64 * F32 * (1 + 8 * r * scale + np.abs(want[0])))
    assert_close(got[1], want[1], 32 * F32)
    assert_close(got[2], want[2], 1e-5 * want[2] + 64 * F32)
    for one, other in zip(got, run()):
        assert_same_bits(one, other)


@pytest.mark.parametrize("accumulate", (False, True), ids=("write", "accumulate"))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward(ops, shape, accumulate):
    n, f = shape
    x, dy, weight = normal(n, f), normal(n, f, seed=1), normal(f, seed=2)
    statistics = x.mean(axis=1), x.var(axis=1) + np.float32(0.1)
    before = np.full(f, 3 if accumulate else np.nan, np.float32)

    def run(weight, need_dx=True, only_bias=False):
        dw, db = None if only_bias else on_gpu(before), on_gpu(before)
        dx = ops.layer_norm_backward(
            on_gpu(dy), on_gpu(x), on_gpu(weight), *map(on_gpu, statistics), dw, db,
            EPS, need_dx, accumulate,
        )  # fmt: skip
        return dx, dw, db

    got = run(weight)
    dw, db = before.astype(np.float64), before.astype(np.float64)
    want = reference.layer_norm_backward(
        dy, x, weight, *statistics, dw, db, EPS, True, accumulate
    )
    r = (1 / np.sqrt(statistics[1].astype(np.float64) + EPS))[:, None]
    u = np.abs(x - statistics[0][:, None]) * r
    sums = np.abs(dy).sum(axis=0) + 3, (np.abs(dy) * u).sum(axis=0) + 3
    assert_close(got[2], db, 128 * F32 * sums[0])
    assert_close(got[1], dw, 128 * F32 * sums[1])
    g = np.abs(dy * weight)
    means = g.mean(axis=1, keepdims=True), (g * u).mean(axis=1, keepdims=True)
    assert_close(got[0], want, 128 * F32 * r * (g + means[0] + u * means[1]) + 1e-30)
    for one, other in zip(got, run(weight)):
        assert_same_bits(one, other)
    nothing, no_dw, db_again = run(weight, need_dx=False, only_bias=True)
    assert nothing is None and no_dw is None
    assert_same_bits(db_again, got[2])
    want = reference.layer_norm_backward(dy, x, None, *statistics, None, None, EPS)
    g = np.abs(dy)
    means = g.mean(axis=1, keepdims=True), (g * u).mean(axis=1, keepdims=True)
    bound = 128 * F32 * r * (g + means[0] + u * means[1]) + 1e-30
    assert_close(run(None)[0], want, bound)


def test_an_empty_batch(ops):
    x = on_gpu(np.zeros((0, 3), "f"))
    dw, db = (on_gpu(np.full(3, np.nan, "f")) for _ in range(2))
    y, mean, variance = ops.layer_norm_forward(x, None, None, EPS)
    dx = ops.layer_norm_backward(x, x, None, mean, variance, dw, db, EPS)
    assert y.shape == dx.shape == (0, 3)
    assert (dw.numpy() == 0).all() and (db.numpy() == 0).all()


def test_captured_has_the_bits_of_eager():
    from cycnn.gpu.graph import Graph

    layer = nn.LayerNorm((3, 8, 8)).to("cuda")
    x, dy = on_gpu(normal(300, 3, 8, 8)), on_gpu(normal(300, 3, 8, 8, seed=1))
    gradients = [parameter.grad for parameter in layer.parameters()]

    def run():
        y = layer(x)
        return y, layer.backward(dy)

    graph = Graph(0)
    graph.rehearse(run)
    captured = graph.record(run)
    for seed in range(2):
        x.copy_(normal(*x.shape, seed=seed))
        graph.launch()
        replayed = [*captured, *(Tensor(gradient) for gradient in gradients)]
        for got, want in zip(replayed, [*run(), *gradients]):
            assert_same_bits(got, want)


def test_both_devices_agree():
    results = []
    for device in ("cpu", "cuda"):
        layer = nn.LayerNorm((4, 6)).to(device)
        y = layer(Tensor(normal(5, 3, 4, 6), device))
        dx = layer.backward(Tensor(normal(5, 3, 4, 6, seed=1), device))
        gradients = [parameter.grad.numpy() for parameter in layer.parameters()]
        results.append([y.numpy(), dx.numpy(), *gradients])
    for on_cpu, on_device in zip(*results):
        np.testing.assert_allclose(on_device, on_cpu, rtol=1e-4, atol=1e-5)
