"""The backward of two convolution blocks in one kernel, against float64 and itself.

A gradient is a sum of products; each operand is off by at most a unit of roundoff of its
precision, and every addition by a unit of float32 of the sum of the absolute products.
The gradient of the first block's weights goes through both convolutions.
"""

from typing import NamedTuple

import numpy as np
import pytest

from cycnn import Tensor
from cycnn.errors import ShapeError
from cycnn.ops import reference

# of fp32, three products of the halves of two numbers: what is left out is below 2^-20
OPERANDS = {"fp32": 2.0**-20, "tf32": 2.0**-10, "bf16": 2.0**-7}
F32 = 2.0**-24
BLOCK = (2, 2), (1, 1), (0, 0)  # pool, stride, padding
REFERENCE = 32, 64
# C and K: fewer and more than a tile of filters, and a part of one
CHANNELS = [REFERENCE, (8, 16), (16, 40)]


@pytest.fixture(scope="module")
def fused():
    from cycnn.ops import fused_cuda_backward

    return fused_cuda_backward


@pytest.fixture(scope="module")
def pair():
    from cycnn.ops import fused_cuda_pair_backward

    return fused_cuda_pair_backward


class Given(NamedTuple):
    dy: np.ndarray
    code2: np.ndarray
    y1: np.ndarray
    code1: np.ndarray
    x: np.ndarray
    weight2: np.ndarray

    def on_gpu(self):
        return [Tensor(array, "cuda") for array in self]


def given(batch, channels, filters, seed=5):
    """Random numbers; a fifth of the windows let no gradient through."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.standard_normal(shape, dtype=np.float32)

    def code(*shape):
        return rng.integers(0, 5, shape, dtype=np.uint8)

    first, second = (batch, channels, 12, 12), (batch, filters, 4, 4)
    return Given(
        normal(*second),
        code(*second),
        normal(*first),
        code(*first),
        normal(batch, 1, 28, 28),
        normal(filters, channels, 5, 5),
    )


def unpooled(dy, code):
    n, k, p, q = dy.shape
    dz = np.zeros((n, k, p, 2, q, 2))
    for place in range(4):
        dz[:, :, :, place // 2, :, place % 2] = np.where(code == place + 1, dy, 0.0)
    return dz.reshape(n, k, 2 * p, 2 * q)


def specification(g):
    """dweight2, dbias2, dweight1, dbias1."""
    filters, channels = g.weight2.shape[:2]
    dw2, db2 = np.empty(g.weight2.shape), np.empty(filters)
    dw1, db1 = np.empty((channels, 1, 5, 5)), np.empty(channels)
    dz2 = unpooled(g.dy, g.code2)
    dy1 = reference.conv2d_backward(dz2, g.y1, g.weight2, dw2, db2, (1, 1), (0, 0))
    weight1 = np.zeros((channels, 1, 5, 5))
    reference.conv2d_backward(
        unpooled(dy1, g.code1), g.x, weight1, dw1, db1, (1, 1), (0, 0)
    )
    return dw2, db2, dw1, db1


def run(pair, tensors, channels, filters, bias=True):
    shapes = (filters, channels, 5, 5), (filters,), (channels, 1, 5, 5), (channels,)
    results = [
        Tensor(np.full(shape, np.nan, np.float32), "cuda")
        if bias or len(shape) == 4
        else None
        for shape in shapes
    ]
    pair.conv_pair_backward(*tensors, *results)
    return [None if result is None else result.numpy() for result in results]


def bounds(g, precision):
    pixels = len(g.dy) * 64
    return [
        sums * (operands * OPERANDS[precision] + (products + 16) * F32) + 1e-30
        for sums, operands, products in zip(
            specification(Given(*(np.abs(array) for array in g))),
            (2, 1, 4, 3),
            (pixels, pixels, 9 * pixels, 9 * pixels),
        )
    ]


@pytest.mark.parametrize("batch", [1, 4, 31, 33, 96, 128, 257])
@pytest.mark.parametrize("channels, filters", CHANNELS)
def test_gradients(pair, precision, batch, channels, filters):
    g = given(batch, channels, filters)
    found = run(pair, g.on_gpu(), channels, filters)
    for got, want, bound in zip(found, specification(g), bounds(g, precision)):
        error = np.abs(got.astype(np.float64) - want)
        # NaN is never within
        assert (error <= bound).all(), f"off by {(error / bound).max():.3g} bounds"
        # bounds are wide after two convolutions
        norm = np.linalg.norm(error) / np.linalg.norm(want)
        assert norm <= 2 * OPERANDS[precision]


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0xFFC00000])
@pytest.mark.parametrize("channels, filters", CHANNELS)
def test_nan_goes_where_the_reference_has_it(pair, precision, channels, filters, bits):
    """The first is the one that a GPU makes: rounding must not carry into its sign."""
    g = given(9, channels, filters)
    g.dy.view(np.uint32)[1, 3, 2, 1] = bits
    g.code2[1, 3, 2, 1] = 2
    found = run(pair, g.on_gpu(), channels, filters)
    for got, want in zip(found, specification(g)):
        assert np.isnan(want).any()
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))


@pytest.mark.parametrize("batch", [1, 33, 128, 1024])
def test_it_equals_the_kernels_of_one_block(pair, fused, precision, batch):
    channels, filters = REFERENCE
    g = given(batch, channels, filters)
    dy, code2, y1, code1, x, weight2 = tensors = g.on_gpu()
    found = run(pair, tensors, channels, filters)
    wanted = [Tensor(np.zeros_like(array), "cuda") for array in found]
    arguments = True, *BLOCK
    dy1 = fused.conv_block_backward(
        dy, None, code2, y1, weight2, *wanted[:2], *arguments
    )
    weight1 = Tensor(np.zeros((channels, 1, 5, 5), np.float32), "cuda")
    fused.conv_block_backward(
        dy1, None, code1, x, weight1, *wanted[2:], *arguments, need_dx=False
    )
    for got, want in zip(found, wanted):
        scale = np.linalg.norm(got)
        error = np.linalg.norm(got - want.numpy())
        assert error <= 2 * OPERANDS[precision] * scale


@pytest.mark.parametrize("batch", [33, 300])
def test_equal_bits(pair, precision, batch):
    channels, filters = REFERENCE
    tensors = given(batch, channels, filters).on_gpu()
    first, second = (run(pair, tensors, channels, filters) for _ in range(2))
    for one, other in zip(first, second):
        np.testing.assert_array_equal(one, other)


def test_windows_that_let_nothing_through(pair, precision):
    channels, filters = REFERENCE
    g = given(5, channels, filters)
    g.code2[...] = 0
    for gradient in run(pair, g.on_gpu(), channels, filters):
        assert not gradient.any()
    g = given(5, channels, filters)
    g.code1[...] = 0
    dw2, _, *of_first = run(pair, g.on_gpu(), channels, filters)
    assert dw2.any() and not of_first[0].any() and not of_first[1].any()


def test_no_more_than_asked(pair):
    channels, filters = REFERENCE
    tensors = given(8, channels, filters).on_gpu()
    dw2, db2, dw1, db1 = run(pair, tensors, channels, filters, bias=False)
    assert db2 is None and db1 is None
    with_bias = run(pair, tensors, channels, filters)
    np.testing.assert_array_equal(dw2, with_bias[0])
    np.testing.assert_array_equal(dw1, with_bias[2])


def test_an_empty_batch(pair):
    channels, filters = REFERENCE
    tensors = given(0, channels, filters).on_gpu()
    assert pair.conv_pair_backward_partials(*tensors) == (None, None)
    for gradient in run(pair, tensors, channels, filters):
        assert not gradient.any()


def test_partials_add_up(pair):
    channels, filters = REFERENCE
    tensors = given(257, channels, filters).on_gpu()
    whole = run(pair, tensors, channels, filters)
    parts = pair.conv_pair_backward_partials(*tensors)
    for partials, wholes in zip(parts, (whole[:2], whole[2:])):
        assert partials.splits > 1
        for part, total in zip(partials, wholes):
            sums = np.abs(part.numpy()).sum(0)
            error = np.abs(part.numpy().sum(0, dtype=np.float64) - total)
            assert (error <= partials.splits * F32 * sums + 1e-30).all()


@pytest.mark.parametrize("batch", [1, 33])
def test_what_is_settled_is_only_fetched_earlier(pair, precision, batch):
    tensors = given(batch, *REFERENCE).on_gpu()
    late, early = (
        pair.conv_pair_backward_partials(*tensors, settled=settled)
        for settled in (False, True)
    )
    for one, other in zip((*late[0], *late[1]), (*early[0], *early[1])):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_what_is_supported(pair):
    x = 8, 1, 28, 28
    first, second = ((32, 1, 5, 5), *BLOCK), ((64, 32, 5, 5), *BLOCK)
    assert pair.conv_pair_backward_supported(x, first, second, 0)
    for other in (
        ((8, 3, 28, 28), first, second),
        ((8, 1, 32, 32), first, second),
        (x, ((6, 1, 5, 5), *BLOCK), ((16, 6, 5, 5), *BLOCK)),
        (x, first, ((64, 32, 3, 3), *BLOCK)),
        (x, (first[0], None, *BLOCK[1:]), second),
        (x, first, ((72, 32, 5, 5), *BLOCK)),
    ):
        assert not pair.conv_pair_backward_supported(*other, 0)


def test_shapes_that_do_not_fit(pair):
    tensors = given(3, *REFERENCE).on_gpu()
    for i, message in ((0, "dy"), (1, "code2"), (2, "y1"), (3, "code1")):
        wrong = list(tensors)
        wrong[i] = Tensor(wrong[i].numpy()[1:], "cuda")
        with pytest.raises(ShapeError, match=message):
            pair.conv_pair_backward_partials(*wrong)
    wrong = list(tensors)
    wrong[4] = Tensor(np.zeros((3, 1, 27, 28), np.float32), "cuda")
    with pytest.raises(NotImplementedError, match="two convolutions"):
        pair.conv_pair_backward_partials(*wrong)
