"""The fused forward kernels against the operations they fuse, in float64.

Tolerances are bounds. A sum of L products in float32 is off by at most about L units of
roundoff of the sum of the absolute products, two units where tensor cores truncate; the
rounded operands add their own. "fp32" splits each operand into two tf32 numbers: what
is left out of a product, its rest and the product of both rests, is below 2^-21 of it.
"""

import numpy as np
import pytest
from random_blocks import draw_block

from cycnn import Tensor, shapes
from cycnn.errors import ShapeError
from cycnn.gpu import device as gpu_device
from cycnn.ops import fused, reference

F32 = 2.0**-24
OPERANDS = {"fp32": 2.0**-21, "tf32": 2.0**-10, "bf16": 2.0**-7}  # of a product

# x, (K, R, S), relu, bias, pool, stride, padding
CONVOLUTIONS = [
    ((128, 32, 12, 12), (64, 5, 5), True, True, (2, 2), (1, 1), (0, 0)),
    ((13, 64, 4, 4), (128, 3, 3), True, True, None, (1, 1), (0, 0)),
    ((9, 6, 14, 14), (16, 5, 5), True, True, (2, 2), (1, 1), (0, 0)),
    ((3, 64, 16, 16), (128, 3, 3), True, True, (2, 2), (1, 1), (1, 1)),
    ((20, 40, 4, 4), (72, 3, 3), True, True, None, (1, 1), (1, 1)),
    ((3, 5, 9, 11), (10, 3, 3), False, True, None, (1, 1), (1, 1)),
    ((7, 16, 8, 8), (24, 1, 1), True, False, (3, 3), (1, 1), (0, 0)),
    ((4, 8, 15, 15), (12, 3, 3), True, True, None, (2, 2), (1, 1)),
    ((2, 12, 20, 18), (40, 7, 7), False, True, (3, 3), (1, 1), (3, 3)),
    ((6, 33, 7, 5), (17, 2, 4), True, False, (2, 1), (1, 2), (1, 2)),
    ((2, 7, 30, 30), (9, 3, 3), True, True, (4, 2), (3, 3), (0, 0)),
    ((1, 130, 3, 3), (1, 3, 3), True, True, None, (1, 1), (0, 0)),
    # deep inside of a large network, and at its beginning
    ((2, 256, 8, 8), (256, 3, 3), True, True, None, (1, 1), (1, 1)),
    ((1, 512, 4, 4), (64, 3, 3), True, True, None, (1, 1), (1, 1)),
    ((2, 64, 64, 64), (8, 3, 3), True, True, (2, 2), (1, 1), (1, 1)),
    ((2, 64, 14, 14), (16, 7, 7), True, True, None, (1, 1), (3, 3)),
    ((1, 20, 32, 32), (24, 7, 7), True, True, (2, 2), (2, 2), (3, 3)),
    # more images than there are multiprocessors, of few numbers
    ((1024, 8, 8, 8), (8, 3, 3), True, True, (2, 2), (1, 1), (1, 1)),
]
FIRST_CONVOLUTIONS = [
    ((128, 1, 28, 28), (32, 5, 5), True, True, (2, 2), (1, 1), (0, 0)),
    ((4, 1, 28, 28), (6, 5, 5), True, True, (2, 2), (1, 1), (2, 2)),
    ((3, 3, 32, 32), (64, 3, 3), True, True, None, (1, 1), (1, 1)),
    ((3, 3, 37, 33), (20, 7, 7), True, True, (3, 3), (2, 2), (3, 3)),
    ((3, 2, 9, 9), (5, 3, 3), False, False, (2, 3), (1, 1), (0, 0)),
    ((2, 4, 16, 16), (130, 3, 3), True, True, None, (2, 1), (1, 1)),
    ((1, 1, 5, 300), (3, 1, 1), True, True, None, (1, 1), (0, 0)),
    ((1024, 4, 8, 8), (8, 3, 3), True, True, None, (1, 1), (1, 1)),
]
# x, first (K, R, S, pool, padding), second
PAIRS = [
    ((128, 1, 28, 28), (32, 5, 5, (2, 2), (0, 0)), (64, 5, 5, (2, 2), (0, 0))),
    ((5, 1, 28, 28), (6, 5, 5, (2, 2), (2, 2)), (16, 5, 5, (2, 2), (0, 0))),
    ((6, 3, 20, 20), (20, 3, 3, (2, 2), (1, 1)), (30, 3, 3, None, (1, 1))),
    ((3, 3, 17, 13), (10, 3, 3, None, (1, 1)), (9, 2, 4, (3, 2), (1, 2))),
]


@pytest.fixture(scope="module")
def ops():
    from cycnn.ops import fused_cuda_forward

    return fused_cuda_forward


@pytest.fixture(autouse=True)
def poison(ops, monkeypatch):
    """New memory is full of NaN and 255: what a kernel does not write shows."""
    empty = ops.empty_on_gpu

    def poisoned(shape, dtype, device):
        tensor = empty(shape, dtype, device)
        if tensor.size:
            tensor.fill_(float("nan") if dtype == np.float32 else 255)
        return tensor

    monkeypatch.setattr(ops, "empty_on_gpu", poisoned)


@pytest.fixture
def rng():
    return np.random.default_rng(21)


def on_gpu(array):
    return None if array is None else Tensor(array, "cuda")


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def numpy(tensors):
    return [None if tensor is None else tensor.numpy() for tensor in tensors]


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.tobytes() == b.tobytes()


def product_bound(precision, length, absolute):
    return (OPERANDS[precision] + 2.0 * (length + 4) * F32) * absolute


def assert_close(got, want, bound):
    """|got - want| <= bound, and NaN where NaN is wanted."""
    assert got.shape == want.shape
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    error = np.abs(np.nan_to_num(got.astype(np.float64) - want))
    worst = np.max(error / np.nan_to_num(bound, nan=1.0), initial=0.0)
    assert worst <= 1.0, f"off by up to {worst:.3g} bounds"


def windows(z, pool):
    """(N, K, P', Q', positions) of (N, K, P, Q)."""
    n, k, p, q = z.shape
    high, wide = pool or (1, 1)
    rows, columns = p // high, q // wide
    z = z[:, :, : rows * high, : columns * wide]
    z = z.reshape(n, k, rows, high, columns, wide).transpose(0, 1, 2, 4, 3, 5)
    return z.reshape(n, k, rows, columns, high * wide)


def check_block(precision, y, code, x, weight, bias, relu, pool, stride, padding):
    z = reference.conv2d_forward(x, weight, bias, stride, padding)
    absolute = reference.conv2d_forward(
        np.abs(x),
        np.abs(weight),
        None if bias is None else np.abs(bias),
        stride,
        padding,
    )
    bound = product_bound(precision, weight[0].size, absolute)
    candidates, bounds = windows(z, pool), windows(bound, pool).max(-1)
    want = candidates.max(-1)
    assert_close(y, reference.relu_forward(want) if relu else want, bounds)
    if pool is None:
        assert code is None
        return
    assert code.dtype == np.uint8 and code.max() <= candidates.shape[-1]
    np.testing.assert_array_equal(code == 0, relu & (y <= 0))
    position = np.maximum(code.astype(int) - 1, 0)[..., None]
    taken = np.take_along_axis(candidates, position, -1)[..., 0]
    assert (np.isnan(want) | (code == 0) | (taken >= want - 2 * bounds)).all()


def block_arguments(rng, x_shape, filter_shape, bias):
    outputs, *extent = filter_shape
    x = normal(rng, *x_shape)
    weight = normal(rng, outputs, x_shape[1], *extent)
    return x, weight, normal(rng, outputs) if bias else None


@pytest.mark.parametrize(
    "x_shape, filter_shape, relu, bias, pool, stride, padding",
    CONVOLUTIONS + FIRST_CONVOLUTIONS,
)
def test_conv_block(
    ops, precision, rng, x_shape, filter_shape, relu, bias, pool, stride, padding
):
    x, weight, bias = block_arguments(rng, x_shape, filter_shape, bias)
    geometry = relu, pool, stride, padding
    given = on_gpu(x), on_gpu(weight), on_gpu(bias)
    assert ops.conv_block_supported(
        x_shape, weight.shape, pool, stride, padding, given[0].device.index
    )
    got = numpy(ops.conv_block_forward(*given, *geometry))
    check_block(precision, *got, x, weight, bias, *geometry)
    assert_same_bits(got, numpy(ops.conv_block_forward(*given, *geometry)))
    packed = ops.pack_filter(given[1], x_shape, pool, stride, padding)
    for _ in range(2):
        assert_same_bits(got, numpy(ops.conv_block_forward(*given, *geometry, packed)))
        if packed is not None:
            packed.settled = True  # what packed it has finished, as numpy() shows


@pytest.mark.parametrize("seed", range(16))
def test_conv_block_of_any_shape(ops, precision, rng, seed):
    batch, image, weight_shape, stride, padding, pool, relu = draw_block(seed)
    x, weight, bias = block_arguments(rng, (batch, *image), weight_shape, True)
    geometry = relu, pool, stride, padding
    got = numpy(ops.conv_block_forward(*map(on_gpu, (x, weight, bias)), *geometry))
    check_block(precision, *got, x, weight, bias, *geometry)


@pytest.mark.parametrize("n", [0, 1, 2, 31, 97])
def test_conv_block_of_any_batch(ops, precision, rng, n):
    for channels in (1, 8):
        x, weight, bias = block_arguments(rng, (n, channels, 6, 6), (16, 3, 3), True)
        geometry = True, (2, 2), (1, 1), (1, 1)
        y, code = ops.conv_block_forward(*map(on_gpu, (x, weight, bias)), *geometry)
        assert y.shape == code.shape == (n, 16, 3, 3)
        if n:
            check_block(precision, y.numpy(), code.numpy(), x, weight, bias, *geometry)


@pytest.mark.parametrize("channels", [1, 16])
def test_first_of_equal_candidates_wins(ops, precision, channels):
    x = on_gpu(np.ones((2, channels, 8, 8), np.float32))
    weight = on_gpu(np.ones((8, channels, 3, 3), np.float32))
    y, code = ops.conv_block_forward(x, weight, None, True, (2, 2))
    np.testing.assert_array_equal(y.numpy(), 9.0 * channels)
    np.testing.assert_array_equal(code.numpy(), 1)


@pytest.mark.parametrize("channels", [1, 16])
def test_nan_goes_where_it_belongs(ops, precision, rng, channels):
    x, weight, bias = block_arguments(rng, (3, channels, 10, 10), (8, 3, 3), True)
    x[1, 0, 4, 7] = np.nan
    geometry = True, (2, 2), (1, 1), (0, 0)
    y, code = ops.conv_block_forward(*map(on_gpu, (x, weight, bias)), *geometry)
    assert np.isnan(y.numpy()).any()
    check_block(precision, y.numpy(), code.numpy(), x, weight, bias, *geometry)


def test_shapes_that_do_not_fit(ops, rng):
    x, weight, bias = map(on_gpu, block_arguments(rng, (2, 8, 6, 6), (16, 3, 3), True))
    with pytest.raises(ShapeError):
        ops.conv_block_forward(x, bias, bias, True, None)
    with pytest.raises(ShapeError):
        ops.conv_block_forward(x, weight, bias, True, (7, 7))
    with pytest.raises(ShapeError):
        ops.linear_block_forward(bias, weight, None, True)


def gathered(rng, n, shape):
    images = rng.integers(0, 256, (50, *shape), dtype=np.uint8)
    index = rng.integers(0, 50, n, dtype=np.int32)
    scale, shift = 1 / 255, -0.5
    x = images[index] * np.float32(scale) + np.float32(shift)
    written = on_gpu(np.full(x.shape, np.nan, np.float32))
    batch = fused.Gather(on_gpu(images), on_gpu(index), scale, shift, written)
    np.testing.assert_allclose(batch.made().numpy(), x, rtol=0, atol=2 * F32)
    return x, batch, written


def test_first_convolution_gathers_its_batch(ops, precision, rng):
    x, batch, written = gathered(rng, 7, (1, 28, 28))
    _, weight, bias = block_arguments(rng, x.shape, (6, 5, 5), True)
    geometry = True, (2, 2), (1, 1), (2, 2)
    got = ops.conv_block_forward(batch, on_gpu(weight), on_gpu(bias), *geometry)
    np.testing.assert_array_equal(written.numpy(), batch.made().numpy())
    check_block(precision, *numpy(got), written.numpy(), weight, bias, *geometry)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("x_shape, first, second", PAIRS)
def test_conv_pair(ops, precision, rng, x_shape, first, second, gather):
    if gather:
        x, source, written = gathered(rng, x_shape[0], x_shape[1:])
    else:
        x = normal(rng, *x_shape)
        source = on_gpu(x)
    arguments, channels = [], x_shape[1]
    for k, r, s, pool, padding in (first, second):
        # about as large as its input, so that no layer's bound is about nothing
        weight = normal(rng, k, channels, r, s) / np.float32(channels * r * s) ** 0.5
        arguments.append((weight, normal(rng, k), True, pool, (1, 1), padding))
        channels = k
    blocks = [
        fused.ConvBlock(on_gpu(weight), on_gpu(bias), *geometry)
        for weight, bias, *geometry in arguments
    ]
    if not ops.conv_pair_supported(x_shape, *blocks, 0, gather):
        # two tf32 halves of both operands do not fit beside each other
        assert precision == "fp32"
        with pytest.raises(NotImplementedError):
            ops.conv_pair_forward(source, *blocks)
        return
    got = numpy(ops.conv_pair_forward(source, *blocks))
    if gather:
        np.testing.assert_array_equal(written.numpy(), source.made().numpy())
        x = written.numpy()
    check_block(precision, *got[:2], x, *arguments[0])
    check_block(precision, *got[2:], got[0], *arguments[1])
    assert_same_bits(got, numpy(ops.conv_pair_forward(source, *blocks)))
    packed = ops.pack_pair_filter(x_shape, *blocks, gather)
    for _ in range(2):
        assert_same_bits(got, numpy(ops.conv_pair_forward(source, *blocks, packed)))
        packed.settled = True


def linear(precision, x, weight, bias, relu):
    """(y in float64, its bound)"""
    y = reference.linear_forward(x, weight, bias)
    absolute = reference.linear_forward(np.abs(x), np.abs(weight), np.abs(bias))
    bound = product_bound(precision, x.shape[1], absolute)
    return (reference.relu_forward(y) if relu else y), bound


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    "n, inputs, outputs",
    [(128, 512, 128), (1, 1, 1), (5, 7, 3), (33, 130, 70), (200, 1000, 300)],
)
def test_linear_block(ops, precision, rng, n, inputs, outputs, relu):
    x, weight, bias = (
        normal(rng, n, inputs), normal(rng, outputs, inputs), normal(rng, outputs),
    )  # fmt: skip
    given = on_gpu(x), on_gpu(weight), on_gpu(bias), relu
    got = ops.linear_block_forward(*given).numpy()
    assert_close(got, *linear(precision, x, weight, bias, relu))
    assert_same_bits([got], [ops.linear_block_forward(*given).numpy()])


def check_head(log_probs, losses, dlogits, logits, bound, labels):
    """losses: one an image, or their mean; bound: of the logits."""
    n, classes = logits.shape
    want = reference.log_softmax_forward(logits)
    # log-sum-exp is off by no more than the worst logit; expf and logf by a few units
    row = bound.max(1, keepdims=True) + 8 * F32 * (
        1 + np.abs(logits).max(1, keepdims=True)
    )
    row = row + classes * F32
    assert_close(log_probs, want, np.broadcast_to(2 * row, want.shape))
    terms = -want[np.arange(n), labels]
    if losses.shape:
        assert_close(losses, terms, 2 * row[:, 0])
    else:
        assert_close(
            losses, terms.mean(), 2 * row.max() + n * F32 * np.abs(terms).mean()
        )
    gradient = reference.cross_entropy_backward(want, labels)
    # the derivative of exp: at most e^bound - 1 of a probability below 1
    assert_close(dlogits, gradient, np.broadcast_to(np.expm1(3 * row) / n, want.shape))


@pytest.mark.parametrize(
    "n, inputs, classes",
    [(128, 128, 10), (1, 5, 2), (5, 33, 3), (200, 64, 100), (17, 100, 1000)],
)
def test_head(ops, precision, rng, n, inputs, classes):
    x, weight, bias = (
        normal(rng, n, inputs),
        normal(rng, classes, inputs) / np.float32(inputs) ** 0.5,
        normal(rng, classes),
    )
    labels = rng.integers(0, classes, n, dtype=np.int32)
    given = [on_gpu(array) for array in (x, weight, bias, labels)]
    got = numpy(ops.head_forward(*given))
    check_head(*got, *linear(precision, x, weight, bias, False), labels)
    assert_same_bits(got, numpy(ops.head_forward(*given)))


@pytest.mark.parametrize(
    "n, inputs, hidden, classes",
    [(128, 512, 128, 10), (1, 5, 7, 2), (5, 33, 20, 3), (200, 100, 256, 32)],
)
def test_tail(ops, precision, rng, n, inputs, hidden, classes):
    x, weight, bias = (
        normal(rng, n, inputs),
        normal(rng, hidden, inputs) / np.float32(inputs) ** 0.5,
        normal(rng, hidden),
    )
    weight_out = normal(rng, classes, hidden) / np.float32(hidden) ** 0.5
    bias_out = normal(rng, classes)
    labels = rng.integers(0, classes, n, dtype=np.int32)
    given = [on_gpu(array) for array in (x, weight, bias)]
    given += [True, *map(on_gpu, (weight_out, bias_out, labels))]
    if not ops.tail_supported(inputs, hidden, classes, given[0].device.index):
        with pytest.raises(NotImplementedError):
            ops.tail_forward(*given)
        return
    got = numpy(ops.tail_forward(*given))
    assert_close(got[0], *linear(precision, x, weight, bias, True))
    # the head is float32 in every precision
    logits = linear("fp32", got[0], weight_out, bias_out, False)
    check_head(*got[1:], *logits, labels)
    for settled in (False, True):  # what wrote the weights has finished
        assert_same_bits(got, numpy(ops.tail_forward(*given, settled)))


# x, (K, R, S), stride, padding, hidden, classes; biases and ReLUs
CONV_TAILS = [
    ((128, 64, 4, 4), (128, 3, 3), (1, 1), (0, 0), 128, 10, True),
    ((13, 64, 4, 4), (128, 3, 3), (1, 1), (0, 0), 128, 10, True),
    ((1, 64, 4, 4), (128, 3, 3), (1, 1), (0, 0), 100, 7, False),
    ((31, 40, 4, 4), (64, 3, 3), (1, 1), (0, 0), 70, 3, True),
    ((9, 8, 3, 3), (128, 3, 3), (1, 1), (0, 0), 5, 16, False),
    ((2, 128, 2, 2), (128, 2, 2), (1, 1), (0, 0), 101, 10, True),
    ((7, 16, 4, 4), (128, 3, 3), (2, 2), (1, 1), 128, 10, True),
    ((10, 24, 5, 3), (64, 3, 2), (2, 1), (0, 0), 64, 7, False),
    ((117, 32, 2, 2), (64, 1, 1), (1, 1), (0, 0), 32, 2, True),
]


def conv_tail(rng, x_shape, filter_shape, hidden, classes, geometry, full):
    """Arrays of x, block and tail, and labels; all about as large as the input."""

    def weights(outputs, *shape):
        size = np.float32(np.prod(shape)) ** 0.5
        return normal(rng, outputs, *shape) / size, normal(rng, outputs)

    k, *extent = filter_shape
    block = [*weights(k, x_shape[1], *extent), full, None, *geometry]
    y_shape = shapes.conv2d_output_shape(x_shape, block[0].shape, *geometry)
    inputs = int(np.prod(y_shape[1:]))
    tail = [*weights(hidden, inputs), full, *weights(classes, hidden)]
    if not full:
        block[1] = tail[1] = tail[4] = None
    labels = rng.integers(0, classes, x_shape[0], dtype=np.int32)
    return normal(rng, *x_shape), block, tail, labels


def on_gpu_as(kind, items):
    return kind(*(on_gpu(i) if isinstance(i, np.ndarray) else i for i in items))


@pytest.mark.parametrize(
    "x_shape, filter_shape, stride, padding, hidden, classes, full", CONV_TAILS
)
def test_conv_tail(
    ops, precision, rng, x_shape, filter_shape, stride, padding, hidden, classes, full
):
    x, block, tail, labels = conv_tail(
        rng, x_shape, filter_shape, hidden, classes, (stride, padding), full
    )
    given = (
        on_gpu(x),
        on_gpu_as(fused.ConvBlock, block),
        on_gpu_as(fused.Tail, tail),
        on_gpu(labels),
    )
    index = given[0].device.index
    supported = ops.conv_tail_supported(
        x_shape, given[1].geometry, given[2].geometry, index
    )
    if not supported:
        assert precision == "fp32" or gpu_device.get(index).capability < (9, 0)
        with pytest.raises(NotImplementedError):
            ops.conv_tail_forward(*given)
        return
    got = numpy(ops.conv_tail_forward(*given))
    check_block(precision, got[0], None, x, *block)
    flat = got[0].reshape(len(x), -1)
    weight, bias, relu, weight_out, bias_out = tail
    if bias is None:
        bias, bias_out = np.zeros(len(weight)), np.zeros(len(weight_out))
    assert_close(got[1], *linear(precision, flat, weight, bias, relu))
    # the head is float32 in every precision
    check_head(*got[2:], *linear("fp32", got[1], weight_out, bias_out, False), labels)
    packed = ops.pack_conv_tail_filter(x_shape, given[1])
    for settled in (False, True):
        for _ in range(2):
            again = ops.conv_tail_forward(*given, packed, settled)
            assert_same_bits(got, numpy(again))
            packed.settled = True  # what packed it has finished, as numpy() shows


@pytest.mark.parametrize("label", [-1, 10, 2**31 - 1])
def test_label_that_is_no_class_of_a_conv_tail(ops, rng, label, monkeypatch):
    monkeypatch.setattr(ops, "get_precision", lambda: "tf32")
    given = conv_tail(rng, (11, 64, 4, 4), (128, 3, 3), 128, 10, ((1, 1), (0, 0)), True)
    x, block, tail, labels = given
    labels[[0, 9]] = label
    block, tail = on_gpu_as(fused.ConvBlock, block), on_gpu_as(fused.Tail, tail)
    if not ops.conv_tail_supported(x.shape, block.geometry, tail.geometry, 0):
        return
    losses = ops.conv_tail_forward(on_gpu(x), block, tail, on_gpu(labels))[3].numpy()
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(losses)), [0, 9])


def test_conv_tail_of_no_images(ops, rng, monkeypatch):
    monkeypatch.setattr(ops, "get_precision", lambda: "tf32")
    given = conv_tail(rng, (0, 64, 4, 4), (128, 3, 3), 128, 10, ((1, 1), (0, 0)), True)
    x, block, tail, labels = given
    block, tail = on_gpu_as(fused.ConvBlock, block), on_gpu_as(fused.Tail, tail)
    if not ops.conv_tail_supported(x.shape, block.geometry, tail.geometry, 0):
        return
    y, *rest = ops.conv_tail_forward(on_gpu(x), block, tail, on_gpu(labels))
    assert y.shape == (0, 128, 2, 2)
    assert [t.shape for t in rest] == [(0, 128), (0, 10), (0,), (0, 10)]


def test_label_that_is_no_class(ops, rng):
    x, weight = on_gpu(normal(rng, 4, 8)), on_gpu(normal(rng, 3, 8))
    for label in (-1, 3):
        labels = on_gpu(np.array([0, 1, label, 2], np.int32))
        _, loss, _ = ops.head_forward(x, weight, None, labels)
        assert np.isnan(loss.numpy())


def test_head_of_no_rows(ops, rng):
    x, labels = on_gpu(normal(rng, 0, 8)), on_gpu(np.zeros(0, np.int32))
    log_probs, loss, dlogits = ops.head_forward(
        x, on_gpu(normal(rng, 3, 8)), None, labels
    )
    assert log_probs.shape == dlogits.shape == (0, 3)
    assert np.isnan(loss.numpy())


def test_rows_that_start_anywhere(ops, precision, rng):
    """A view of a foreign array need not start at a multiple of 16 bytes."""
    flat = on_gpu(normal(rng, 1 + 20 * 16))
    x = flat[1:].reshape(20, 16)
    weight, bias = normal(rng, 9, 16), normal(rng, 9)
    got = ops.linear_block_forward(x, on_gpu(weight), on_gpu(bias), True).numpy()
    assert_close(got, *linear(precision, x.numpy(), weight, bias, True))
