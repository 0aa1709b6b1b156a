"""Transposed and depth-wise convolution on a GPU."""

import numpy as np
import pytest
from test_conv_transpose import (
    DEPTHWISE,
    TRANSPOSED,
    compare,
    depthwise_arrays,
    floats,
    run,
    trained,
    transposed_arrays,
)

import cycnn
from cycnn import Tensor, nn

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import cuda

    return cuda


def on_gpu(array):
    return None if array is None else Tensor(array, "cuda")


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed(ops, case):
    compare(ops, on_gpu, *transposed_arrays(case), transposed=True)


@pytest.mark.parametrize("case", DEPTHWISE)
def test_depthwise(ops, case, precision):
    """In float32 whatever the precision."""
    compare(ops, on_gpu, *depthwise_arrays(case), transposed=False)


def test_a_transposed_convolution_in_parts(ops, monkeypatch):
    """Where the workspace holds a few images only."""
    import cycnn.ops.cuda as module
    import cycnn.ops.cuda_conv_transpose as transposed

    transposed._forward_plan.cache_clear()
    module._conv_backward_plan.cache_clear()
    module._conv_forward_plan.cache_clear()
    monkeypatch.setattr(module, "_COLUMN_BYTES", 2000)
    try:
        compare(ops, on_gpu, *transposed_arrays("twice as large"), transposed=True)
    finally:
        transposed._forward_plan.cache_clear()
        module._conv_backward_plan.cache_clear()
        module._conv_forward_plan.cache_clear()


@pytest.mark.parametrize("case", ["3x3", "5x5 of stride 2", "uneven", "large"])
def test_the_same_bits_each_time(ops, case):
    arrays, settings = depthwise_arrays(case)
    runs = [
        run(ops, on_gpu, ops.conv2d_forward, ops.conv2d_backward, arrays, settings)
        for _ in range(2)
    ]
    for first, second in zip(*runs):
        np.testing.assert_array_equal(first.numpy(), second.numpy())


@pytest.mark.parametrize("n", [0, 1, 33])
def test_layer(n):
    made = []
    for device in "cpu", "cuda":
        cycnn.manual_seed(7)
        made.append(
            nn.ConvTranspose2d(6, 4, (3, 4), 2, (0, 1), (1, 0), groups=2).to(device)
        )
    x = floats(n, 6, 5, 7)
    here, there = (layer(x).numpy() for layer in made)
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-5)
    dy = floats(*here.shape, seed=1)
    here, there = (layer.backward(dy).numpy() for layer in made)
    np.testing.assert_allclose(there, here, rtol=0, atol=1e-5)
    for a, b in zip(made[0].parameters(), made[1].parameters()):
        scale = np.abs(a.grad.numpy()).max() + 1
        np.testing.assert_allclose(b.grad.numpy(), a.grad.numpy(), atol=1e-5 * scale)


@pytest.mark.long
@pytest.mark.parametrize("fuse", [False, True])
def test_a_recorded_step_trains_as_an_eager_one(fuse):
    _, *captured = trained("cuda", True, fuse)
    assert trained("cuda", True, fuse)[1:] == tuple(captured)
    if not fuse:  # with fused layers the recorded update sums in another order
        assert trained("cuda", False, fuse)[1:] == tuple(captured)
